//! The target for the CUDA provider, as far as it can be judged without a GPU: every node has a kernel there, and what
//! the graphs compute is right. onnxruntime's CPU provider runs the same graphs, in float32 and float16.
#![allow(clippy::print_stderr)]

mod common;

use common::{TestResult, cases};
use hf2onnx::compile::{Options, compile};
use hf2onnx::element::ElementType;
use hf2onnx::opset;
use rayon::prelude::*;

const TARGET: &str = "ort-cuda";
const DTYPES: [ElementType; 3] = [ElementType::F16, ElementType::BF16, ElementType::F32];

/// Nodes of a graph that the CUDA provider has no kernel for, one line each.
fn without_kernel(name: &str, options: &Options) -> TestResult<Vec<String>> {
    let graph = compile(options)?.lowered.graph;
    let element = |id: &Option<hf2onnx::graph::ValueId>| id.map(|id| graph.ty(id).element);
    let mut lines = Vec::new();
    for node in &graph.nodes {
        let inputs: Vec<_> = node.inputs.iter().map(element).collect();
        let outputs: Vec<_> = node.outputs.iter().map(element).collect();
        if !opset::runs(options.target, node.op.domain, node.op.op_type, &inputs, &outputs) {
            let types: Vec<String> = inputs.iter().flatten().map(ToString::to_string).collect();
            lines.push(format!("{name} in {}: {} ({}) of {}", options.element, node.name, node.op, types.join(", ")));
        }
    }
    Ok(lines)
}

#[test]
fn every_node_has_a_kernel() -> TestResult {
    let mut jobs = Vec::new();
    for case in cases()? {
        for element in DTYPES {
            jobs.push((case.name.clone(), Options { element, ..case.options(TARGET)? }));
        }
    }
    let lines: Vec<String> = jobs
        .par_iter()
        .flat_map_iter(|(name, options)| {
            without_kernel(name, options).unwrap_or_else(|error| vec![format!("{name} in {}: {error}", options.element)])
        })
        .collect();
    assert!(lines.is_empty(), "{} nodes:\n{}", lines.len(), lines.join("\n"));
    Ok(())
}
