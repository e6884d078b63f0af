//! The graph of a mixture of experts is the same whatever the number of its experts, but for shapes.

mod common;

use common::{Case, TestResult};
use hf2onnx::build::{self, Logits};
use hf2onnx::describe;
use hf2onnx::lower;
use hf2onnx::opset::Target;
use hf2onnx::read::json_file;
use serde_json::json;

/// The operators of a case's graph, in order, with another number of experts.
fn operators(case: &str, key: &str, experts: usize, target: &'static Target) -> TestResult<Vec<String>> {
    let mut config = json_file(&Case::named(case)?.dir.join("config.json"))?;
    config.insert(key.to_owned(), json!(experts));
    let template = describe::choose(&config, None)?;
    let spec = describe::describe(&template, &config, &[])?.spec;
    let model = build::decoder(&spec, Logits::All)?;
    let options = lower::Options::plain(target);
    let lowered = lower::lower(&model, &options)?;
    Ok(lowered.graph.nodes.iter().map(|node| format!("{} {}", node.name, node.op.op_type)).collect())
}

#[test]
fn nodes_do_not_grow_with_experts() -> TestResult {
    let cases = [("mixtral", "num_local_experts"), ("deepseek_v3", "n_routed_experts"), ("qwen3_moe", "num_experts")];
    for (case, key) in cases {
        for target in Target::all()? {
            // 9 divides into the three groups of deepseek_v3, and so does 63.
            let (few, many) = if case == "deepseek_v3" { (9, 63) } else { (8, 64) };
            let (few, many) = (operators(case, key, few, target)?, operators(case, key, many, target)?);
            assert_eq!(few, many, "{case} on {}", target.name);
        }
    }
    Ok(())
}
