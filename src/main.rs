//! scratch
use hf2onnx::compile::{Options, compile, write};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let options = Options {
        repository: a[1].clone().into(),
        template: a.get(4).map(Into::into),
        target: hf2onnx::opset::Target::named(&a[3]).unwrap(),
        element: hf2onnx::element::ElementType::F32,
        padding: Default::default(),
        logits: Default::default(),
        max_length: None,
        allowed_keys: vec![],
        allowed_tensors: vec![],
    };
    let compiled = match compile(&options) {
        Ok(c) => c,
        Err(e) => {
            eprintln!("{e}");
            std::process::exit(1)
        }
    };
    if std::env::var("TEXT").is_ok() {
        println!("{}\n{}", compiled.model, compiled.lowered.graph);
    }
    for n in &compiled.lowered.notes {
        println!("{n:?}");
    }
    match write(&compiled, &options, std::path::Path::new(&a[2]), hf2onnx::write::Force::Yes, |_| {})
        .and_then(hf2onnx::compile::Written::commit)
    {
        Ok(()) => {}
        Err(e) => {
            eprintln!("{e}");
            std::process::exit(1)
        }
    }
}
