//! Integers that checkpoints hold, in arrangements that the recorded ones lack: made here, built as they are and decoded,
//! and both builds have to compute the same.
// Cases are made on purpose; one that is not what it was fails its test.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use common::models::{build_with, options, runtime};
use common::packers::{Format, Packing, packed, widened};
use common::quantized::Repository;
use common::{Case, TestResult, repository, scratch};
use hf2onnx::compile::Options;
use hf2onnx::element::StoredType;
use hf2onnx::golden::Golden;
use hf2onnx::recipe::{Changes, Recipe};
use hf2onnx::session::{self, Decoder};
use serde_json::Value;

/// What became of a repository whose integers were kept.
struct Kept {
    /// How many nodes of each operator.
    operators: BTreeMap<&'static str, usize>,
    /// `exact`.
    exact: Value,
    reordered: usize,
    /// Reasons against parameters.
    decoded: BTreeMap<String, String>,
    /// Largest difference of a logit from the decoded build's, relative to the largest one.
    difference: f32,
}

impl Kept {
    fn operator(&self, name: &str) -> usize {
        self.operators.get(name).copied().unwrap_or(0)
    }

    fn reasons(&self) -> BTreeSet<&str> {
        self.decoded.values().map(String::as_str).collect()
    }
}

/// Builds a repository with its integers and decoded, and runs both.
fn kept(made: &Repository, golden: &Path, target: &str, level: i64) -> TestResult<Kept> {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    let repo = place.path().join("repo");
    fs::create_dir(&repo)?;
    made.write(&repo);
    let build = |quant: &str, target: &str, output: &str| {
        let recipe = Recipe::new(quant, &Changes { accuracy_level: Some(level), ..Changes::default() })?;
        build_with(&Options { recipe: Some(recipe), ..options(&repo, target)? }, &place.path().join(output))
    };
    let compiled = build("stored", target, "integers")?;
    // Another lowering, with nothing in it that knows of integers.
    build("float", "primitive", "floats")?;
    let record = fs::read(place.path().join("integers").join("hf2onnx.json"))?;
    let record: Value = serde_json::from_slice(&record)?;
    let from = &record["quantization"]["checkpoint"];
    let (integers, floats) =
        (logits(&place.path().join("integers"), golden)?, logits(&place.path().join("floats"), golden)?);
    let largest = floats.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let most = integers.iter().zip(&floats).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(integers.len() == floats.len() && largest > 0.0);
    let mut operators = BTreeMap::new();
    for node in &compiled.lowered.graph.nodes {
        *operators.entry(node.op.op_type).or_insert(0) += 1;
    }
    Ok(Kept {
        operators,
        exact: from["exact"].clone(),
        reordered: from["reordered"].as_array().map_or(0, Vec::len),
        decoded: serde_json::from_value(from["decoded"].clone())?,
        difference: most / largest,
    })
}

fn logits(model: &Path, golden: &Path) -> TestResult<Vec<f32>> {
    let prompt = Golden::read(golden)?;
    let [ids, mask, positions] =
        [&prompt.input_ids, &prompt.attention_mask, &prompt.position_ids].map(|given| given.first_rows(1));
    let mut decoder = Decoder::open(model, &session::Options { threads: 1, ..session::Options::default() })?;
    let mut state = decoder.empty_state(1)?;
    Ok(decoder.run(&ids, &mask, &positions, &mut state)?.logits.data)
}

/// A recorded repository with every float in float32, so that decoding rounds nothing.
fn recorded(name: &str) -> Repository {
    let mut made = Repository::open(name);
    for tensor in made.tensors.values_mut() {
        if matches!(tensor.dtype, StoredType::F16 | StoredType::BF16) {
            *tensor = widened(tensor);
        }
    }
    made
}

fn golden_of(name: &str) -> std::path::PathBuf {
    repository().join("golden").join("quantized").join(name).join("golden.safetensors")
}

/// Float32 throughout: what is between two builds is the order of sums.
const SAME: f32 = 2e-5;

fn set_groups(made: &mut Repository, module: &str, group_of: impl Fn(usize) -> i32) {
    let tensor = made.tensors.get_mut(&format!("{module}.g_idx")).unwrap();
    tensor.bytes = (0..tensor.shape[0]).flat_map(|column| group_of(column).to_le_bytes()).collect();
}

/// Nodes that put inputs in the order of a matrix's columns: those that the same model without an order has not.
fn gathers(ordered: &Kept, plain: &Kept) -> usize {
    ordered.operator("Gather") - plain.operator("Gather")
}

#[test]
fn inputs_are_gathered_once_for_each_order() -> TestResult {
    let golden = golden_of("gptq-actorder");
    for target in ["ort-cpu", "standard"] {
        let plain = kept(&recorded("gptq"), &golden_of("gptq"), target, 1)?;
        assert!(plain.difference < SAME && plain.reordered == 0, "{target}: {}", plain.difference);
        let ordered = kept(&recorded("gptq-actorder"), &golden, target, 1)?;
        assert!(ordered.difference < SAME && ordered.exact == true, "{target}: {}", ordered.difference);
        // One for q, k and v, one for o, one each for gate and up, whose orders differ, and one for down: three groups,
        // whose zero points DequantizeLinear does not read.
        let (matrices, orders) = if target == "ort-cpu" { (14, 10) } else { (12, 8) };
        assert_eq!((ordered.reordered, gathers(&ordered, &plain)), (matrices, orders), "{target}");
        // Products of one input are joined where they have one order.
        let (operator, products) = if target == "ort-cpu" { ("MatMulNBits", 10) } else { ("DequantizeLinear", 12) };
        assert_eq!(ordered.operator(operator), products, "{target}");
        let reasons: Vec<&str> = ordered.reasons().into_iter().collect();
        let odd = "the zero points of a row with an odd number of blocks end within a byte";
        assert_eq!(reasons, if target == "ort-cpu" { vec![] } else { vec![odd] }, "{target}");
    }
    Ok(())
}

#[test]
fn groups_that_are_no_blocks_are_decoded() -> TestResult {
    let q = "model.layers.0.self_attn.q_proj";
    let mut made = recorded("gptq-actorder");
    // 33 and 31 columns.
    let first = i32::from(made.tensors[&format!("{q}.g_idx")].bytes[0] == 0);
    made.tensors.get_mut(&format!("{q}.g_idx")).unwrap().bytes[..4].copy_from_slice(&first.to_le_bytes());
    let one_less = kept(&made, &golden_of("gptq-actorder"), "ort-cpu", 1)?;
    assert!(one_less.difference < SAME, "{}", one_less.difference);
    assert!(one_less.reordered == 13 && one_less.exact == true);
    assert_eq!(one_less.decoded.keys().collect::<Vec<_>>(), [&format!("{q}.weight")]);
    let reason = "gptq, 4 bits, groups of 32: its groups have not all as many columns as a block";
    assert_eq!(one_less.reasons(), BTreeSet::from([reason]));
    // 96 columns in groups of 64: the short one has to be the last.
    for (short, reordered) in [(1, 2), (0, 0)] {
        let mut made = recorded("gptq");
        for layer in 0..2 {
            let group_of = |column: usize| if column.is_multiple_of(3) { short } else { 1 - short };
            set_groups(&mut made, &format!("model.layers.{layer}.mlp.down_proj"), group_of);
        }
        let built = kept(&made, &golden_of("gptq"), "ort-cpu", 1)?;
        assert!(built.difference < SAME && built.exact == true, "{short}: {}", built.difference);
        assert_eq!((built.reordered, built.decoded.len()), (reordered, 2 - reordered), "{short}");
    }
    Ok(())
}

const GPTQ: Packing = Packing { format: Format::Gptq, bits: 4, group: 32, symmetric: false, order: 0 };
const PACKED: Packing = Packing { format: Format::Packed, ..GPTQ };

/// A golden case with everything in its layers packed but routers.
fn case(name: &str, how: impl Fn(&str) -> Packing) -> TestResult<(Repository, std::path::PathBuf)> {
    let case = Case::named(name)?;
    let in_layers =
        |module: &str| module.contains(".layers.") && !module.ends_with("mlp.gate") && !module.ends_with("moe.gate");
    let made = packed(&case, |module| in_layers(module).then(|| how(module)))?;
    Ok((made, case.golden()))
}

/// Matrices that are stored as one have one order, and their inputs are gathered once.
#[test]
fn pieces_of_a_reordered_matrix() -> TestResult {
    let (plain, golden) = case("phi3", |_| GPTQ)?;
    let plain = kept(&plain, &golden, "ort-cpu", 1)?;
    let (ordered, _) = case("phi3", |module| Packing { order: module.len(), ..GPTQ })?;
    let ordered = kept(&ordered, &golden, "ort-cpu", 1)?;
    assert!(ordered.difference < SAME && ordered.exact == true, "{}", ordered.difference);
    assert_eq!((ordered.reordered, ordered.decoded.len()), (14, 0));
    assert_eq!(gathers(&ordered, &plain), 8);
    Ok(())
}

/// Products of one input stay apart where their orders differ.
#[test]
fn one_input_in_many_orders() -> TestResult {
    let built = |order: fn(&str) -> usize| -> TestResult<Kept> {
        let (made, golden) = case("qwen2", |module| Packing { order: order(module), ..GPTQ })?;
        kept(&made, &golden, "ort-cpu", 1)
    };
    let plain = built(|_| 0)?;
    // Letters of `q_proj`, `k_proj`, ..., of which no two sums are the same.
    let apart = built(|module| module.rsplit('.').next().unwrap_or(module).bytes().map(usize::from).sum())?;
    assert!(apart.difference < SAME && apart.exact == true, "{}", apart.difference);
    assert_eq!((apart.reordered, gathers(&apart, &plain), apart.operator("MatMulNBits")), (21, 21, 21));
    let together = built(|_| 5)?;
    assert!(together.difference < SAME && together.exact == true, "{}", together.difference);
    // Queries, keys and values, o, gate and up, down.
    assert_eq!((together.reordered, gathers(&together, &plain), together.operator("MatMulNBits")), (21, 12, 12));
    Ok(())
}

/// A mixture's packing, and what becomes of its experts.
struct Mixture {
    case: &'static str,
    packing: Packing,
    level: i64,
    /// Mixtures that run on integers; if none, why.
    fused: Result<usize, &'static [&'static str]>,
}

const ORDERED: &str = "its columns are permuted (act-order), which only products of one matrix can follow";
const ONE_FLOAT: &str = "the operator takes integers for all projections, and one is floats";

#[test]
fn experts_run_on_stored_integers() -> TestResult {
    let mixtures = [
        // 16 rows inside: a block of 16.
        Mixture { case: "qwen3_moe", packing: Packing { group: 16, ..GPTQ }, level: 1, fused: Ok(2) },
        Mixture { case: "qwen3_moe", packing: Packing { group: 16, ..PACKED }, level: 1, fused: Ok(2) },
        Mixture {
            case: "qwen3_moe",
            packing: Packing { group: 16, symmetric: true, ..PACKED },
            level: 1,
            fused: Ok(2),
        },
        // 24 rows inside: the last block of the second projection is short.
        Mixture { case: "mixtral", packing: Packing { group: 16, ..GPTQ }, level: 1, fused: Ok(2) },
        Mixture { case: "mixtral", packing: GPTQ, level: 1, fused: Ok(2) },
        // 64 columns in one group, which is one block, and 24 in one, which fill a smaller one.
        Mixture {
            case: "mixtral",
            packing: Packing { group: 64, ..GPTQ },
            level: 1,
            fused: Err(&["the operator takes one scheme for all projections"]),
        },
        Mixture { case: "qwen3_moe", packing: Packing { bits: 8, group: 16, ..GPTQ }, level: 0, fused: Ok(2) },
        Mixture {
            case: "mixtral",
            packing: Packing { bits: 8, ..GPTQ },
            level: 1,
            fused: Err(&["with 8 bits its kernel rounds activations to 8 bits, whatever is asked"]),
        },
        Mixture {
            case: "qwen3_moe",
            packing: Packing { bits: 2, group: 16, ..GPTQ },
            level: 1,
            fused: Err(&["the operator has no kernel for 2 bits, nor for float zero points"]),
        },
        Mixture { case: "mixtral", packing: Packing { order: 7, ..GPTQ }, level: 1, fused: Err(&[ORDERED, ONE_FLOAT]) },
        Mixture { case: "mixtral", packing: Packing { order: 7, group: 16, ..GPTQ }, level: 1, fused: Err(&[ORDERED]) },
    ];
    for Mixture { case: name, packing, level, fused } in mixtures {
        let words = format!("{name}, {packing:?}");
        let (made, golden) = case(name, |_| packing).map_err(|error| format!("{words}: {error}"))?;
        let built = kept(&made, &golden, "ort-cpu", level).map_err(|error| format!("{words}: {error}"))?;
        // The kernel of 8 bits rounds activations to 8 bits: near, and no more.
        let bar = if level == 0 { 0.02 } else { SAME };
        assert!(built.difference < bar && built.exact == true, "{words}: {}", built.difference);
        assert_eq!(built.operator("QMoE"), fused.unwrap_or(0), "{words}: {:?}", built.decoded);
        assert_eq!(built.reasons(), fused.err().into_iter().flatten().copied().collect(), "{words}");
    }
    Ok(())
}

/// Floats made in the graph from the integers of all experts at once.
#[test]
fn experts_on_a_target_of_plain_operators() -> TestResult {
    let (made, golden) = case("qwen3_moe", |_| Packing { group: 16, symmetric: true, ..PACKED })?;
    let built = kept(&made, &golden, "standard", 1)?;
    assert!(built.difference < SAME && built.exact == true, "{}", built.difference);
    assert!(built.decoded.is_empty(), "{:?}", built.decoded);
    // Two mixtures of three projections, a plain layer, and attention in all of them.
    assert_eq!(built.operator("DequantizeLinear"), 2 * 3 + 3 + 3 * 4);
    Ok(())
}
