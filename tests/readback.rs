//! A second opinion on every file that is written: another crate decodes it, and it says what was meant.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use common::models::{TARGETS, build_with, options};
use common::{TestResult, cases, kjv_llama, scratch};
use hf2onnx::compile::{Compiled, Options};
use hf2onnx::graph::{Node, Source, Type};
use hf2onnx::lower::{Attribute, Constant, Operator};
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_proto::DataLocation;
use onnx_protobuf::{AttributeProto, GraphProto, Message as _, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use onnx_protobuf::{tensor_shape_proto, type_proto};
use rayon::prelude::*;

#[test]
fn every_model_reads_back_as_what_was_meant() -> TestResult {
    let mut jobs = Vec::new();
    for target in TARGETS {
        jobs.push((format!("kjv-llama on {target}"), options(&kjv_llama(), target)?));
        for case in cases()? {
            jobs.push((format!("{} on {target}", case.name), case.options(target)?));
        }
    }
    let wrong: Vec<String> = jobs
        .par_iter()
        .filter_map(|(name, options)| check(options).err().map(|error| format!("{name}: {error}")))
        .collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}

fn check(options: &Options) -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("model");
    let compiled = build_with(options, &output)?;
    let model = ModelProto::parse_from_bytes(&fs::read(output.join("onnx").join("model.onnx"))?)?;
    same("ir_version", &model.ir_version, &options.target.ir_version)?;
    let imports = model.opset_import.iter().map(|import| (import.domain.clone(), import.version));
    let wanted = options.target.opsets.iter().map(|(domain, version)| (domain.clone(), i64::from(*version)));
    same("opset imports", &imports.collect::<BTreeMap<_, _>>(), &wanted.collect())?;
    let graph = model.graph.as_ref().ok_or("no graph")?;
    signature(graph, &compiled)?;
    nodes(&graph.node, &compiled.lowered.graph.nodes, &compiled)?;
    initializers(graph, &compiled, &output.join("onnx"))?;
    order(graph, &BTreeSet::new())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, wanted: &T) -> TestResult {
    if found == wanted { Ok(()) } else { Err(format!("{what}: found {found:?}, expected {wanted:?}").into()) }
}

/// Inputs and outputs with their types.
fn signature(graph: &GraphProto, compiled: &Compiled) -> TestResult {
    let lowered = &compiled.lowered.graph;
    for (what, found, wanted) in
        [("inputs", &graph.input, &lowered.inputs), ("outputs", &graph.output, &lowered.outputs)]
    {
        let found: Vec<_> = found.iter().map(described).collect();
        let wanted = wanted.iter().map(|id| lowered.value(*id)).map(|value| (value.name.clone(), spelled(&value.ty)));
        same(what, &found, &wanted.collect())?;
    }
    Ok(())
}

/// Name, element type and dimensions of a value of the file.
fn described(info: &ValueInfoProto) -> (String, (i32, Vec<String>)) {
    let mut dims = Vec::new();
    let mut element = 0;
    if let Some(type_proto::Value::TensorType(tensor)) = info.type_.as_ref().and_then(|ty| ty.value.as_ref()) {
        element = tensor.elem_type;
        dims.extend(tensor.shape.dim.iter().map(|dim| match &dim.value {
            Some(tensor_shape_proto::dimension::Value::DimValue(size)) => size.to_string(),
            Some(tensor_shape_proto::dimension::Value::DimParam(name)) => name.clone(),
            _ => "?".to_owned(),
        }));
    }
    (info.name.clone(), (element, dims))
}

fn spelled(ty: &Type<hf2onnx::element::ElementType>) -> (i32, Vec<String>) {
    (ty.element.onnx(), ty.shape.iter().map(ToString::to_string).collect())
}

fn nodes(found: &[NodeProto], wanted: &[Node<Operator>], compiled: &Compiled) -> TestResult {
    let lowered = &compiled.lowered.graph;
    same("number of nodes", &found.len(), &wanted.len())?;
    let name = |id: &Option<_>| id.map_or(String::new(), |id| lowered.value(id).name.clone());
    for (found, wanted) in found.iter().zip(wanted) {
        let whole = [&found.name, &found.op_type, &found.domain].map(String::as_str);
        same("node", &whole, &[wanted.name.as_str(), wanted.op.op_type, wanted.op.domain])?;
        same(&wanted.name, &found.input, &wanted.inputs.iter().map(name).collect())?;
        same(&wanted.name, &found.output, &wanted.outputs.iter().map(name).collect())?;
        let attributes = wanted.op.attributes.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        let (graphs, plain): (Vec<_>, Vec<_>) = found.attribute.iter().partition(|attribute| attribute.g.is_some());
        let read = plain.into_iter().map(attribute).collect::<TestResult<Vec<_>>>()?;
        let wanted_texts = attributes.map(|(name, value)| (name, shown(&value)));
        same(&wanted.name, &read, &wanted_texts.collect())?;
        same(&wanted.name, &graphs.len(), &wanted.branches.len())?;
        for (graph, branch) in graphs.into_iter().zip(&wanted.branches) {
            same(
                &wanted.name,
                &(graph.name.as_str(), graph.g.input.len(), graph.g.initializer.len()),
                &(branch.name, 0, 0),
            )?;
            let results = branch.results.iter().map(|id| (lowered.value(*id).name.clone(), spelled(lowered.ty(*id))));
            let read = graph.g.output.iter().map(described).collect::<Vec<_>>();
            same(branch.name, &read, &results.collect())?;
            nodes(&graph.g.node, &branch.nodes, compiled)?;
        }
    }
    Ok(())
}

fn shown(value: &Attribute) -> String {
    match value {
        Attribute::Int(value) => format!("int {value}"),
        Attribute::Float(value) => format!("float {value:?}"),
        Attribute::Ints(values) => format!("ints {values:?}"),
        Attribute::String(value) => format!("string {value}"),
    }
}

fn attribute(attribute: &AttributeProto) -> TestResult<(String, String)> {
    let text = match attribute.type_.enum_value() {
        Ok(AttributeType::INT) => format!("int {}", attribute.i),
        Ok(AttributeType::FLOAT) => format!("float {:?}", attribute.f),
        Ok(AttributeType::INTS) => format!("ints {:?}", attribute.ints),
        Ok(AttributeType::STRING) => format!("string {}", String::from_utf8(attribute.s.clone())?),
        other => return Err(format!("attribute {} is of type {other:?}", attribute.name).into()),
    };
    Ok((attribute.name.clone(), text))
}

/// Every initializer is a constant or a weight of the plan, and the weights fill the data file without overlap.
fn initializers(graph: &GraphProto, compiled: &Compiled, folder: &Path) -> TestResult {
    // Element type, dimensions, and the bytes of a constant.
    let mut wanted = BTreeMap::new();
    for (_, value) in compiled.lowered.graph.values() {
        let Source::Literal(literal) = &value.source else { continue };
        let dims: Vec<i64> =
            value.ty.shape.iter().map(|dim| dim.value().ok_or("an open size")).collect::<Result<_, _>>()?;
        let bytes = match literal {
            Constant::Inline(bytes) => Some(bytes.as_slice()),
            Constant::Weight(_) | Constant::Stored(_) | Constant::Quantized(_) => None,
        };
        wanted.insert(value.name.as_str(), (value.ty.element.onnx(), dims, bytes));
    }
    same("number of initializers", &graph.initializer.len(), &wanted.len())?;
    let mut extents = Vec::new();
    for tensor in &graph.initializer {
        let (element, dims, bytes) = wanted.remove(tensor.name.as_str()).ok_or(format!("{} twice", tensor.name))?;
        same(&tensor.name, &(tensor.data_type, &tensor.dims), &(element, &dims))?;
        match bytes {
            Some(bytes) => same(&tensor.name, &tensor.raw_data.as_slice(), &bytes)?,
            None => extents.push(extent(tensor, folder)?),
        }
    }
    extents.sort_unstable();
    let overlap = extents.windows(2).find(|pair| matches!(pair, [a, b] if a.1 > b.0));
    same("overlapping weights", &overlap, &None)
}

/// Where a weight lies, checked against its size and its file.
fn extent(tensor: &TensorProto, folder: &Path) -> TestResult<(u64, u64)> {
    same(&tensor.name, &tensor.data_location.enum_value(), &Ok(DataLocation::EXTERNAL))?;
    let entries: BTreeMap<&str, &str> =
        tensor.external_data.iter().map(|entry| (entry.key.as_str(), entry.value.as_str())).collect();
    let get = |key: &str| entries.get(key).copied().ok_or_else(|| format!("{}: no {key}", tensor.name));
    let (offset, length): (u64, u64) = (get("offset")?.parse()?, get("length")?.parse()?);
    let file = fs::metadata(folder.join(get("location")?))?.len();
    // float32 only in these builds.
    let size = tensor.dims.iter().product::<i64>() * 4;
    same(&format!("length of {}", tensor.name), &i64::try_from(length)?, &size)?;
    if offset + length > file {
        return Err(format!("{}: ends at {}, the file at {file}", tensor.name, offset + length).into());
    }
    Ok((offset, offset + length))
}

/// Single assignment: no name twice, and nothing used before it is there.
fn order(graph: &GraphProto, outside: &BTreeSet<&str>) -> TestResult {
    let mut known: BTreeSet<&str> = outside.clone();
    let inputs = graph.input.iter().map(|input| input.name.as_str());
    for name in inputs.chain(graph.initializer.iter().map(|tensor| tensor.name.as_str())) {
        if name.is_empty() || !known.insert(name) {
            return Err(format!("value {name:?} twice, or without a name").into());
        }
    }
    let mut names = BTreeSet::new();
    for node in &graph.node {
        if !names.insert(node.name.as_str()) {
            return Err(format!("node {} twice", node.name).into());
        }
        if let Some(early) = node.input.iter().find(|name| !name.is_empty() && !known.contains(name.as_str())) {
            return Err(format!("node {} uses {early} before it is there", node.name).into());
        }
        for attribute in node.attribute.iter().filter(|attribute| attribute.g.is_some()) {
            order(&attribute.g, &known)?;
        }
        if let Some(twice) = node.output.iter().find(|name| !name.is_empty() && !known.insert(name)) {
            return Err(format!("value {twice} twice").into());
        }
    }
    let outputs = graph.output.iter().find(|output| !known.contains(output.name.as_str()));
    same("outputs without a value", &outputs.map(|output| &output.name), &None)
}
