//! The `hf2onnx` program.

fn main() -> std::process::ExitCode {
    forbid_telemetry();
    hf2onnx::cli::main()
}

/// onnxruntime 1.32 writes a device's number and a database of events into the user's cache as soon as it is loaded,
/// before its API can forbid it; only this variable does. A library has no right to its host's environment, so the
/// program sets it, and the processes that it starts inherit it.
#[expect(unsafe_code, reason = "setting a variable is sound only while no other thread reads the environment")]
fn forbid_telemetry() {
    // SAFETY: the first statement of `main`; no other thread has been started.
    unsafe { std::env::set_var("ORT_DISABLE_TELEMETRY", "1") };
}
