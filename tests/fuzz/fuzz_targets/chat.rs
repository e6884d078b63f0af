#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hf2onnx_fuzz::chat(bytes));
