//! A decoder of ten nodes for tests: its logits are the sum of the embeddings of all kept tokens so far.

use std::path::Path;

use prost::Message as _;

use crate::element::ElementType;
use crate::onnx::{
    AttributeProto, Dimension, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, TensorShapeProto, TypeProto, TypeProtoTensor, ValueInfoProto, dimension,
};

/// What may be wrong with the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// Padding is summed like tokens.
    IgnoresMask,
    /// What is cached counts twice.
    DoublesCache,
}

const VOCABULARY: usize = 16;

/// Writes the decoder with its weights in an external file, as a build lays it out.
pub(crate) fn write(directory: &Path, fault: Fault) {
    std::fs::create_dir_all(directory.join("onnx")).unwrap();
    let weights: Vec<u8> = (0..VOCABULARY * VOCABULARY)
        .flat_map(|k| (f32::from(u16::try_from(k * 7919 % 251).unwrap()) / 251.0 - 0.5).to_le_bytes())
        .collect();
    let put = |name: &str, bytes: &[u8]| std::fs::write(directory.join(name), bytes).unwrap();
    put("onnx/model.onnx_data", &weights);
    put("onnx/model.onnx", &model(fault).encode_to_vec());
    put("genai_config.json", br#"{"model": {"decoder": {"filename": "onnx/model.onnx"}}}"#);
    put("config.json", format!(r#"{{"vocab_size": {VOCABULARY}, "max_position_embeddings": 64}}"#).as_bytes());
}

fn model(fault: Fault) -> ModelProto {
    let opset = OperatorSetIdProto { domain: String::new(), version: 17 };
    ModelProto { ir_version: 8, opset_import: vec![opset], graph: Some(graph(fault)), ..Default::default() }
}

fn graph(fault: Fault) -> GraphProto {
    let masked = if fault == Fault::IgnoresMask { "all_kept" } else { "kept" };
    let past = if fault == Fault::DoublesCache { "doubled" } else { "past_key_values.0.key" };
    let mut node = vec![
        op("Gather", &["embedding", "input_ids"], "hidden_states.0"),
        op("Unsqueeze", &["hidden_states.0", "one"], "heads"),
        op("Add", &["past_key_values.0.key", "past_key_values.0.key"], "doubled"),
        op("Concat", &[past, "heads"], "present.0.key"),
        op("Cast", &["attention_mask"], "mask"),
        op("Unsqueeze", &["mask", "one_and_three"], "kept"),
        op("Exp", &["zero"], "all_kept"),
        op("Mul", &["present.0.key", masked], "summands"),
        op("CumSum", &["summands", "two"], "sums"),
        op("Shape", &["input_ids"], "shape"),
        op("Gather", &["shape", "one"], "new"),
        op("Neg", &["new"], "from"),
        op("Slice", &["sums", "from", "end", "two_list"], "last"),
        op("Squeeze", &["last", "one"], "logits"),
    ];
    for (index, name, value) in [(3, "axis", 2), (4, "to", 1)] {
        node[index].attribute = vec![AttributeProto { name: name.into(), i: value, r#type: 2, ..Default::default() }];
    }
    let (batch, length, v) = ("batch_size", "sequence_length", VOCABULARY.to_string());
    let total = "past_sequence_length + sequence_length";
    GraphProto {
        node,
        name: "toy".into(),
        initializer: initializers(),
        input: vec![
            value("input_ids", ElementType::I64, &[batch, length]),
            value("attention_mask", ElementType::I64, &[batch, total]),
            value("past_key_values.0.key", ElementType::F32, &[batch, "1", "past_sequence_length", &v]),
        ],
        output: vec![
            value("logits", ElementType::F32, &[batch, length, &v]),
            value("present.0.key", ElementType::F32, &[batch, "1", total, &v]),
        ],
        ..Default::default()
    }
}

fn initializers() -> Vec<TensorProto> {
    let integers = |name: &str, dims: &[i64], values: &[i64]| TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: ElementType::I64.onnx(),
        raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ..Default::default()
    };
    let size = i64::try_from(VOCABULARY).unwrap();
    let entry = |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
    vec![
        TensorProto {
            name: "embedding".into(),
            dims: vec![size, size],
            data_type: ElementType::F32.onnx(),
            external_data: vec![entry("location", "model.onnx_data"), entry("offset", "0")],
            data_location: 1,
            ..Default::default()
        },
        TensorProto {
            name: "zero".into(),
            data_type: ElementType::F32.onnx(),
            raw_data: vec![0; 4],
            ..Default::default()
        },
        integers("one", &[1], &[1]),
        integers("one_and_three", &[2], &[1, 3]),
        integers("two", &[], &[2]),
        integers("two_list", &[1], &[2]),
        integers("end", &[1], &[i64::MAX]),
    ]
}

fn op(operator: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: operator.into(),
        name: format!("/{output}"),
        input: inputs.iter().map(|&i| i.into()).collect(),
        output: vec![output.into()],
        ..Default::default()
    }
}

fn value(name: &str, element: ElementType, shape: &[&str]) -> ValueInfoProto {
    let dim = |text: &&str| Dimension {
        value: Some(
            text.parse().map_or_else(|_| dimension::Value::DimParam((*text).into()), dimension::Value::DimValue),
        ),
    };
    let shape = TensorShapeProto { dim: shape.iter().map(dim).collect() };
    let tensor = TypeProtoTensor { elem_type: element.onnx(), shape: Some(shape) };
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { tensor_type: Some(tensor) }) }
}
