//! What is built, as text that a person reviews: the resolved specification, and the graph before and after lowering.
//!
//! Of layers that are alike only the first is kept: a graph that is right for one is right for all.

mod common;

use common::models::TARGETS;
use common::{Case, TestResult};
use hf2onnx::build::{self, Logits};
use hf2onnx::compile::{Options, compile};
use hf2onnx::lower;
use hf2onnx::spec::ModelSpec;

/// Plain, with windows and biases, latent with routed experts, a stranger, and a mixture.
const CASES: [&str; 5] = ["llama", "qwen2", "deepseek_v3", "my_model", "mixtral"];

#[test]
fn specifications() -> TestResult {
    for name in CASES {
        let spec = spec(name)?;
        insta::assert_snapshot!(format!("{name}.spec"), serde_json::to_string_pretty(&spec)?);
    }
    Ok(())
}

#[test]
fn composite_graphs() -> TestResult {
    for name in CASES {
        let graph = build::decoder(&spec(name)?, Logits::All)?;
        insta::assert_snapshot!(format!("{name}.composite"), graph.to_string());
    }
    Ok(())
}

#[test]
fn lowered_graphs() -> TestResult {
    for name in CASES {
        let graph = build::decoder(&spec(name)?, Logits::All)?;
        for target in TARGETS.into_iter().chain(["ort-cuda"]) {
            let options = Case::named(name)?.options(target)?;
            let options = Options { element: options.target.usual_dtype(), ..options };
            let lowered = lower::lower(&graph, &options.lowering(None, None))?;
            insta::assert_snapshot!(format!("{name}.{target}"), lowered.graph.to_string());
        }
    }
    Ok(())
}

fn spec(name: &str) -> TestResult<ModelSpec> {
    let mut spec = compile(&Case::named(name)?.options("primitive")?)?.description.spec;
    let mut kinds = Vec::new();
    for layer in std::mem::take(&mut spec.layers) {
        if !kinds.contains(&layer) {
            kinds.push(layer);
        }
    }
    spec.layers = kinds;
    Ok(spec)
}
