//! Models on their way through the library: the options of a test, and builds into a folder.

use std::path::Path;

use hf2onnx::build::Logits;
use hf2onnx::compile::{self, Compiled, KvCache, Options, Weights, compile};
use hf2onnx::element::ElementType;
use hf2onnx::lower::Padding;
use hf2onnx::opset::Target;
use hf2onnx::read::Adapter;
use hf2onnx::runtime::{Search, ensure};
use hf2onnx::write::Force;

use super::{Case, TestResult};

/// The targets that run on onnxruntime's CPU provider.
pub const TARGETS: [&str; 3] = ["ort-cpu", "standard", "primitive"];

/// The plain options for a repository.
pub fn options(repository: &Path, target: &str) -> TestResult<Options> {
    let target = Target::named(target)?;
    Ok(Options {
        adapter: Adapter::Refuse,
        repository: repository.to_owned(),
        template: None,
        target,
        element: ElementType::F32,
        padding: Padding::Any,
        positions: target.positions,
        logits: Logits::All,
        max_length: None,
        allowed_keys: Vec::new(),
        allowed_tensors: Vec::new(),
        weights: Weights::Pack { shard_size: None },
        recipe: None,
        cache: KvCache::Float,
    })
}

impl Case {
    /// The plain options for this case.
    pub fn options(&self, target: &str) -> TestResult<Options> {
        Ok(Options { template: self.template(), ..options(&self.repo()?, target)? })
    }
}

/// Compiles and writes a whole directory.
pub fn build_with(options: &Options, output: &Path) -> TestResult<Compiled> {
    let compiled = compile(options)?;
    compile::write(&compiled, options, output, Force::No, |_| {})?.commit()?;
    Ok(compiled)
}

/// Loads onnxruntime, once for the process.
pub fn runtime() -> TestResult {
    ensure(&Search::default(), &mut |_| {})?;
    Ok(())
}
