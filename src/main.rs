//! The `hf2onnx` program.

fn main() -> std::process::ExitCode {
    hf2onnx::cli::main()
}
