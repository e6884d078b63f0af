//! Good nodes are accepted; each kind of mistake is refused with words that name it.

use super::*;
use AttributeKind::{Float, Int, Ints, String as Text};

const F32: Option<ElementType> = Some(ElementType::F32);
const F16: Option<ElementType> = Some(ElementType::F16);
const I64: Option<ElementType> = Some(ElementType::I64);
const I32: Option<ElementType> = Some(ElementType::I32);
const BOOL: Option<ElementType> = Some(ElementType::Bool);

type Types<'a> = &'a [Option<ElementType>];
type Attributes<'a> = &'a [(&'a str, AttributeKind)];
/// Target, operator, inputs, outputs, attributes.
type Node<'a> = (&'a str, &'a str, Types<'a>, Types<'a>, Attributes<'a>);

fn try_node((target, op, inputs, outputs, attributes): Node) -> Result<(), String> {
    let (domain, op) = op.rsplit_once('.').unwrap_or((ONNX, op));
    check(Target::named(target).map_err(|e| e.to_string())?, domain, op, inputs, outputs, attributes)
}

#[test]
fn every_line_parses_and_the_index_has_it() {
    for (domain, table) in TABLES {
        for line in table.lines() {
            let parsed: Result<Schema, _> = serde_json::from_str(line);
            let parsed = parsed.map_err(|error| format!("{error}: {line}"));
            assert!(parsed.is_ok(), "{parsed:?}");
            if let Ok(parsed) = parsed {
                assert_eq!(schema(domain, &parsed.name, parsed.since), Some(&parsed));
                let last = parsed.inputs.iter().rev().skip(1).chain(parsed.outputs.iter().rev().skip(1));
                for parameter in last {
                    assert!(!matches!(parameter.option, ParameterOption::Variadic(_)), "{line}");
                }
            }
        }
    }
    assert!(index().values().flat_map(HashMap::values).map(Vec::len).sum::<usize>() > 300);
}

#[test]
fn the_table_costs_little() {
    let began = std::time::Instant::now();
    let lines: usize = TABLES.iter().flat_map(|(_, table)| table.lines()).filter(|line| head(line).is_some()).count();
    let split = began.elapsed();
    for op in ["Gemm", "Add", "Mul", "Concat", "Reshape", "Softmax", "Cast", "Where", "Gather", "Shape"] {
        assert!(schema(ONNX, op, 21).is_some());
    }
    assert!(lines > 300);
    assert!(split.as_millis() < 50, "{split:?}");
    assert!(began.elapsed().as_millis() < 100, "{:?}", began.elapsed());
}

#[test]
fn targets_are_named() -> Result<()> {
    let target = Target::named("ort-cpu")?;
    assert_eq!((target.ir_version, target.opsets.get(ONNX), target.opsets.get(MICROSOFT)), (10, Some(&21), Some(&1)));
    assert_eq!(target.forms("attention")?, ["GroupQueryAttention.by_length", "GroupQueryAttention", "spelled_out"]);
    assert_eq!(target.dtypes, [ElementType::F32, ElementType::F16, ElementType::BF16]);
    assert_eq!(Target::named("standard")?.opsets.len(), 1);
    let cuda = Target::named("ort-cuda")?;
    assert_eq!((cuda.usual_dtype(), cuda.compute, cuda.provider.as_deref()), (ElementType::F16, None, Some("cuda")));
    assert_eq!((cuda.limits("QMoE").widths, target.limits("QMoE").widths), (64, 1));
    assert_eq!(Target::named("primitive")?.ir_version, 8);
    assert!(target.forms("teleport").is_err());
    let error = Target::named("tpu").err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("ort-cpu, ort-cuda, standard, primitive"), "{error}");
    Ok(())
}

#[test]
fn every_target_has_the_same_composites_and_real_operators() -> Result<()> {
    let composites: Vec<_> = Target::named("ort-cpu")?.lowering.keys().collect();
    for target in Target::all()? {
        assert_eq!(target.lowering.keys().collect::<Vec<_>>(), composites, "{}", target.name);
        for form in target.lowering.values().flatten().filter(|form| form.starts_with(char::is_uppercase)) {
            // A way of calling it may stand behind its name.
            let operator = form.split_once('.').map_or(form.as_str(), |(operator, _)| operator);
            let known = [ONNX, MICROSOFT].iter().any(|domain| schema_for(target, domain, operator).is_ok());
            assert!(known, "{}: {form}", target.name);
        }
    }
    Ok(())
}

#[test]
fn good_nodes_are_accepted() {
    let nodes: &[Node] = &[
        ("primitive", "Gemm", &[F32, F32], &[F32], &[("transB", Int), ("alpha", Float)]),
        ("primitive", "Gemm", &[F32, F32, F32], &[F32], &[]),
        ("primitive", "Concat", &[I64; 7], &[I64], &[("axis", Int)]),
        ("primitive", "Slice", &[F32, I64, I64, None, I64], &[F32], &[]),
        ("primitive", "Slice", &[F32, I32, I32], &[F32], &[]),
        ("primitive", "Where", &[BOOL, F16, F16], &[F16], &[]),
        ("primitive", "TopK", &[F32, I64], &[F32, I64], &[("axis", Int), ("largest", Int), ("sorted", Int)]),
        ("primitive", "Cast", &[I64], &[F32], &[("to", Int)]),
        ("primitive", "Transpose", &[F32], &[F32], &[("perm", Ints)]),
        ("primitive", "Einsum", &[F32, F32], &[F32], &[("equation", Text)]),
        ("primitive", "ReduceMean", &[F32], &[F32], &[("axes", Ints), ("keepdims", Int)]),
        ("primitive", "ReduceSum", &[F32, I64], &[F32], &[("keepdims", Int)]),
        ("standard", "ReduceMean", &[F32, I64], &[F32], &[("keepdims", Int)]),
        ("standard", "Attention", &[F32, F32, F32, F32, F32, F32], &[F32; 3], &[("scale", Float), ("softcap", Float)]),
        ("standard", "Attention", &[F32, F32, F32, BOOL], &[F32], &[("q_num_heads", Int)]),
        ("standard", "RMSNormalization", &[F32, F32], &[F32], &[("epsilon", Float)]),
        ("standard", "RotaryEmbedding", &[F32, F32, F32, I64], &[F32], &[("num_heads", Int)]),
        ("ort-cpu", "SimplifiedLayerNormalization", &[F32, F32], &[F32], &[("epsilon", Float)]),
        ("ort-cpu", "com.microsoft.SkipSimplifiedLayerNormalization", &[F32; 3], &[F32, None, None, F32], &[]),
        ("ort-cpu", "com.microsoft.RotaryEmbedding", &[F32, I64, F32, F32], &[F32], &[("interleaved", Int)]),
        ("ort-cpu", "com.microsoft.FusedMatMul", &[F32, F32], &[F32], &[("transB", Int)]),
        ("ort-cpu", "com.microsoft.QuickGelu", &[F32], &[F32], &[("alpha", Float)]),
        (
            "ort-cpu",
            "com.microsoft.GroupQueryAttention",
            &[F32, F32, F32, F32, F32, I32, I32, None, None, None, F32],
            &[F32; 3],
            &[("num_heads", Int), ("kv_num_heads", Int), ("local_window_size", Int)],
        ),
        (
            "ort-cpu",
            "com.microsoft.MoE",
            &[F32, F32, F32, None, F32],
            &[F32],
            &[("activation_type", Text), ("k", Int), ("activation_alpha", Float)],
        ),
    ];
    for node in nodes {
        assert_eq!(try_node(*node), Ok(()), "{node:?}");
    }
}

#[test]
fn each_mistake_is_refused() {
    let axis: Attributes = &[("axis", Int)];
    let nodes: &[(Node, &str)] = &[
        (("standard", "Gem", &[F32], &[F32], &[]), "standard has no Gem in ai.onnx 23"),
        (("primitive", "Attention", &[F32; 3], &[F32], &[]), "no Attention in ai.onnx 17; it came with ai.onnx 23"),
        (("primitive", "Gelu", &[F32], &[F32], &[]), "it came with ai.onnx 20"),
        (("standard", "com.microsoft.FusedMatMul", &[F32; 2], &[F32], &[]), "does not import the domain"),
        (("standard", "SimplifiedLayerNormalization", &[F32; 2], &[F32], &[]), "has no SimplifiedLayerNormalization"),
        (("ort-cpu", "com.microsoft.SimplifiedLayerNormalization", &[F32; 2], &[F32], &[]), "in com.microsoft 1"),
        (("standard", "Add", &[F32], &[F32], &[]), "1 inputs, and it has 2"),
        (("standard", "Add", &[F32; 3], &[F32], &[]), "3 inputs, and it has 2"),
        (("standard", "Gemm", &[F32; 4], &[F32], &[]), "4 inputs, and it has 2 to 3"),
        (("standard", "Concat", &[], &[F32], axis), "0 inputs, and it has at least 1"),
        (("standard", "TopK", &[F32, I64], &[F32], &[]), "1 outputs, and it has 2"),
        (("standard", "Add", &[F32, None], &[F32], &[]), "input 1 (B) is missing"),
        (("standard", "Add", &[F32, F32], &[None], &[]), "output 0 (C) is missing"),
        (("standard", "Concat", &[F32, None], &[F32], axis), "input 1 (inputs) is missing"),
        (("standard", "Add", &[BOOL, BOOL], &[BOOL], &[]), "input 0 (A) is bool, and T may be float"),
        (("standard", "Add", &[F32, I64], &[F32], &[]), "input 1 (B) is int64, and T is float by its A"),
        (("standard", "Add", &[F32, F32], &[F16], &[]), "output 0 (C) is float16, and T is float by its A"),
        (("standard", "Concat", &[F32, F32, F16], &[F32], axis), "input 2 (inputs) is float16"),
        (("standard", "TopK", &[F32, I32], &[F32, I64], &[]), "input 1 (K) is int32, and it takes int64"),
        (("standard", "Softmax", &[F32], &[F32], &[("axes", Int)]), "no attribute axes; it has [axis]"),
        (("standard", "Softmax", &[F32], &[F32], &[("axis", Ints)]), "attribute axis is ints, and it takes int"),
        (("standard", "Concat", &[F32], &[F32], &[]), "attribute axis is required"),
        (("standard", "Concat", &[F32], &[F32], &[("axis", Int), ("axis", Int)]), "stands twice"),
        (("standard", "ReduceMean", &[F32], &[F32], &[("axes", Ints)]), "ReduceMean-18: no attribute axes"),
    ];
    for (node, words) in nodes {
        let message = try_node(*node).err().unwrap_or_default();
        assert!(message.contains(words), "{node:?}: {message:?} does not say {words:?}");
    }
}
