//! The target for the CUDA provider, as far as it can be judged without a GPU: every node has a kernel there. What the
//! graphs compute is held against the goldens on the CPU, by `golden.rs`.

mod common;

use common::{Case, TestResult, cases};
use hf2onnx::compile::{KvCache, Options, compile};
use hf2onnx::element::{CacheType, ElementType};
use hf2onnx::opset::{self, Positions};
use hf2onnx::recipe::{Changes, Recipe};
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
        let (element, positions) = (ElementType::F16, Positions::Ids);
        jobs.push((format!("{} by position_ids", case.name), Options { element, positions, ..case.options(TARGET)? }));
    }
    // Integers of each kind, where nothing else differs.
    for case in cases()? {
        for (scheme, symmetric) in [("int4", false), ("int4", true), ("int8", true)] {
            let changes = Changes { symmetric: Some(symmetric), ..Changes::default() };
            let recipe = Some(Recipe::new(scheme, &changes)?);
            for element in [ElementType::F16, ElementType::F32] {
                let options = Options { element, recipe: recipe.clone(), ..case.options(TARGET)? };
                jobs.push((format!("{} as {scheme}", case.name), options));
            }
        }
    }
    let lines: Vec<String> = jobs
        .par_iter()
        .flat_map_iter(|(name, options)| {
            without_kernel(name, options)
                .unwrap_or_else(|error| vec![format!("{name} in {}: {error}", options.element)])
        })
        .collect();
    assert!(lines.is_empty(), "{} nodes:\n{}", lines.len(), lines.join("\n"));
    Ok(())
}

/// Wherever the fused attention is, it has a kernel for a cache in 8 bits; elsewhere such a cache is refused.
#[test]
fn every_attention_on_a_cache_in_8_bits_has_a_kernel() -> TestResult {
    let (mut built, mut refused) = (0, 0);
    for case in cases()? {
        for kind in CacheType::ALL {
            for element in [ElementType::F16, ElementType::BF16] {
                let float = Options { element, ..case.options(TARGET)? };
                let attention = |note: &hf2onnx::lower::Note| note.composite == "attention";
                let fused = !compile(&float)?.lowered.notes.iter().any(attention);
                let options = Options { cache: KvCache::Quantized(kind, None), ..float };
                match without_kernel(&case.name, &options) {
                    Ok(lines) => {
                        assert!(lines.is_empty(), "{}", lines.join("\n"));
                        built += 1;
                    }
                    Err(error) => {
                        let text = error.to_string();
                        assert!(!fused && text.contains("--kv-cache"), "{} with {kind}: {text}", case.name);
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(built > 200 && refused > 20, "{built} built, {refused} refused");
    Ok(())
}

/// Half precision keeps the fused operators, shares its cache, and hands out float32.
#[test]
fn what_a_graph_is_made_of() -> TestResult {
    let compiled = |name: &str, element| -> TestResult<_> {
        Ok(compile(&Options { element, ..Case::named(name)?.options(TARGET)? })?.lowered)
    };
    for element in [ElementType::F16, ElementType::BF16] {
        let lowered = compiled("gpt_oss", element)?;
        let graph = &lowered.graph;
        let attention: Vec<_> = graph.nodes.iter().filter(|n| n.op.op_type == "GroupQueryAttention").collect();
        // Ten inputs and no bias, then the sinks.
        assert!(attention.iter().all(|node| node.inputs.len() == 12 && node.inputs[10].is_none()), "{element}");
        assert_eq!((attention.is_empty(), lowered.notes.iter().any(|n| n.composite == "attention")), (false, false));
        let types = |ids: &[hf2onnx::graph::ValueId]| ids.iter().map(|id| graph.ty(*id).element).collect::<Vec<_>>();
        let outputs = types(&graph.outputs);
        assert_eq!(outputs[0], ElementType::F32, "logits");
        assert!(outputs[1..].iter().all(|cache| *cache == element));
        assert!(types(&graph.inputs)[3..].iter().all(|cache| *cache == element));
    }
    let notes = compiled("gpt_oss", ElementType::F32)?.notes;
    let note = notes.iter().find(|note| note.composite == "attention").ok_or("float32 has the fused attention")?;
    assert!(note.reason.contains("no kernel of the operator for f32"), "{}", note.reason);
    let notes = compiled("bloom", ElementType::F16)?.notes;
    assert!(notes.iter().any(|note| note.reason.contains("adds a bias to its scores")), "{notes:?}");
    Ok(())
}
