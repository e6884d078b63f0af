//! The graph file: a lowered graph as protobuf, its weights as references into the data file.

use prost::Message;

use super::layout::{DataFile, Extent};
use crate::bind::Plan;
use crate::element::ElementType;
use crate::graph::{Branch, Dim, Graph, Node, Source, Type, Value, ValueId};
use crate::lower::{Attribute, Constant, Onnx, Operator};
use crate::onnx::{
    AttributeProto, Dimension, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, TensorShapeProto, TypeProto, TypeProtoTensor, ValueInfoProto, dimension,
};
use crate::opset::Target;

/// Serialises a graph whose initializers lie at `extents` of files beside it; `location` gives their names.
pub fn encode(
    graph: &Graph<Onnx>,
    target: &Target,
    plan: &Plan,
    extents: &[Extent],
    location: impl Fn(DataFile) -> String,
) -> Vec<u8> {
    let external = plan.initializers.iter().zip(extents).map(|(initializer, extent)| {
        let entry = |key: &str, value: String| StringStringEntryProto { key: key.to_owned(), value };
        TensorProto {
            dims: initializer.shape.iter().map(|size| i64::try_from(*size).unwrap_or(i64::MAX)).collect(),
            data_type: initializer.element.onnx(),
            name: initializer.name.clone(),
            external_data: vec![
                entry("location", location(extent.file)),
                entry("offset", extent.offset.to_string()),
                entry("length", extent.length.to_string()),
            ],
            data_location: 1,
            ..TensorProto::default()
        }
    });
    let inline = graph.values().filter_map(|(_, value)| constant(value));
    let info = |id: &ValueId| value_info(&graph.value(*id).name, &graph.value(*id).ty);
    ModelProto {
        ir_version: target.ir_version,
        opset_import: target
            .opsets
            .iter()
            .map(|(domain, version)| OperatorSetIdProto { domain: domain.clone(), version: i64::from(*version) })
            .collect(),
        producer_name: env!("CARGO_PKG_NAME").to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph: Some(GraphProto {
            node: graph.nodes.iter().map(|n| node(graph, n)).collect(),
            name: "decoder".to_owned(),
            initializer: inline.chain(external).collect(),
            input: graph.inputs.iter().map(info).collect(),
            output: graph.outputs.iter().map(info).collect(),
            value_info: Vec::new(),
        }),
        metadata_props: Vec::new(),
    }
    .encode_to_vec()
}

fn constant(value: &Value<Onnx>) -> Option<TensorProto> {
    let Source::Literal(Constant::Inline(bytes)) = &value.source else { return None };
    Some(TensorProto {
        dims: value.ty.shape.iter().map(|dim| dim.value().unwrap_or(0)).collect(),
        data_type: value.ty.element.onnx(),
        name: value.name.clone(),
        raw_data: bytes.clone(),
        ..TensorProto::default()
    })
}

fn node(graph: &Graph<Onnx>, node: &Node<Operator>) -> NodeProto {
    let name = |id: &Option<ValueId>| id.map_or(String::new(), |id| graph.value(id).name.clone());
    let attributes = node.op.attributes.iter().map(|(name, value)| attribute(name, value));
    let branches = node.branches.iter().map(|b| branch(graph, b));
    NodeProto {
        input: node.inputs.iter().map(name).collect(),
        output: node.outputs.iter().map(name).collect(),
        name: node.name.clone(),
        op_type: node.op.op_type.to_owned(),
        attribute: attributes.chain(branches).collect(),
        domain: node.op.domain.to_owned(),
    }
}

fn branch(graph: &Graph<Onnx>, branch: &Branch<Operator>) -> AttributeProto {
    let body = GraphProto {
        node: branch.nodes.iter().map(|n| node(graph, n)).collect(),
        name: branch.name.to_owned(),
        output: branch.results.iter().map(|id| value_info(&graph.value(*id).name, &graph.value(*id).ty)).collect(),
        ..GraphProto::default()
    };
    AttributeProto { name: branch.name.to_owned(), g: Some(Box::new(body)), r#type: 5, ..AttributeProto::default() }
}

fn attribute(name: &str, value: &Attribute) -> AttributeProto {
    let mut proto = AttributeProto { name: name.to_owned(), ..AttributeProto::default() };
    match value {
        Attribute::Float(value) => (proto.f, proto.r#type) = (*value, 1),
        Attribute::Int(value) => (proto.i, proto.r#type) = (*value, 2),
        Attribute::String(value) => (proto.s, proto.r#type) = (value.as_bytes().to_vec(), 3),
        Attribute::Ints(values) => (proto.ints, proto.r#type) = (values.clone(), 7),
    }
    proto
}

fn value_info(name: &str, ty: &Type<ElementType>) -> ValueInfoProto {
    let dim = |dim: &Dim| Dimension {
        value: Some(match dim.value() {
            Some(size) => dimension::Value::DimValue(size),
            None => dimension::Value::DimParam(dim.to_string()),
        }),
    };
    let shape = TensorShapeProto { dim: ty.shape.iter().map(dim).collect() };
    let tensor_type = Some(TypeProtoTensor { elem_type: ty.element.onnx(), shape: Some(shape) });
    ValueInfoProto { name: name.to_owned(), r#type: Some(TypeProto { tensor_type }) }
}
