//! Graphs as text, a line for each version, input, node and output, and the lines by which two of them differ.

use std::time::Duration;

use serde::Serialize;
use similar::{ChangeTag, TextDiff};

use super::model::{Built, type_name};
use crate::onnx::{AttributeProto, NodeProto, ValueInfoProto, dimension};

/// How long the shortest list of changes is looked for; after that a longer one will do.
const PATIENCE: Duration = Duration::from_secs(5);

/// The lines by which two graphs differ.
#[derive(Debug, Default, Serialize)]
pub struct GraphChange {
    /// Lines of the first graph alone.
    pub only_a: usize,
    /// Lines of the second graph alone.
    pub only_b: usize,
    /// Those lines in the order of the graphs, after `- ` (the first) or `+ ` (the second).
    pub lines: Vec<String>,
}

impl GraphChange {
    /// True if the graphs are the same.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}

pub(super) fn compare(a: &Built, b: &Built) -> GraphChange {
    let (a, b) = (lines(a), lines(b));
    let (a, b): (Vec<&str>, Vec<&str>) =
        (a.iter().map(String::as_str).collect(), b.iter().map(String::as_str).collect());
    let diff = TextDiff::configure().timeout(PATIENCE).diff_slices(&a, &b);
    let mut change = GraphChange::default();
    for part in diff.iter_all_changes() {
        let (sign, count) = match part.tag() {
            ChangeTag::Equal => continue,
            ChangeTag::Delete => ('-', &mut change.only_a),
            ChangeTag::Insert => ('+', &mut change.only_b),
        };
        *count += 1;
        change.lines.push(format!("{sign} {}", part.value()));
    }
    change
}

/// The text of a graph, in the form of `hf2onnx inspect --graph`; initializers are compared by themselves.
fn lines(built: &Built) -> Vec<String> {
    let header = &built.header;
    let mut lines = vec![format!("ir_version {}", header.ir_version)];
    lines.push(format!("producer {} {}", header.producer_name, header.producer_version));
    let mut opsets: Vec<String> =
        header.opset_import.iter().map(|o| format!("opset {} {}", domain(&o.domain), o.version)).collect();
    opsets.sort();
    lines.extend(opsets);
    lines.extend(header.metadata_props.iter().map(|entry| format!("metadata {}={:?}", entry.key, entry.value)));
    let graph = &built.graph;
    lines.push(format!("graph {}", graph.name));
    lines.extend(graph.input.iter().map(|value| format!("input {}", typed(value))));
    lines.extend(graph.value_info.iter().map(|value| format!("value {}", typed(value))));
    graph.node.iter().for_each(|each| node(each, 0, &mut lines));
    lines.extend(graph.output.iter().map(|value| format!("output {}", typed(value))));
    lines
}

fn domain(name: &str) -> &str {
    if name.is_empty() { "ai.onnx" } else { name }
}

fn typed(value: &ValueInfoProto) -> String {
    let Some(tensor) = value.r#type.as_ref().and_then(|ty| ty.tensor_type.as_ref()) else {
        return format!("{}: no tensor type", value.name);
    };
    let dims = tensor.shape.as_ref().map_or(&[] as &[_], |shape| &shape.dim);
    let dims: Vec<String> = dims
        .iter()
        .map(|dim| match &dim.value {
            Some(dimension::Value::DimValue(size)) => size.to_string(),
            Some(dimension::Value::DimParam(symbol)) => symbol.clone(),
            None => "?".to_owned(),
        })
        .collect();
    format!("{}: {}[{}]", value.name, type_name(tensor.elem_type), dims.join(", "))
}

/// A node, and what is within it.
fn node(node: &NodeProto, depth: usize, lines: &mut Vec<String>) {
    let names = |values: &[String]| {
        let names: Vec<&str> = values.iter().map(|name| if name.is_empty() { "_" } else { name }).collect();
        names.join(", ")
    };
    let mut text = format!("{}{} = ", "  ".repeat(depth), names(&node.output));
    if !node.domain.is_empty() {
        text = text + &node.domain + ".";
    }
    text += &node.op_type;
    // Their order says nothing.
    let plain = node.attribute.iter().filter(|attribute| attribute.g.is_none());
    let mut attributes: Vec<String> = plain.map(attribute).collect();
    attributes.sort();
    if !attributes.is_empty() {
        text = text + "{" + &attributes.join(", ") + "}";
    }
    text = text + "(" + &names(&node.input) + ")";
    // A node is mostly named as its output is.
    if !node.output.iter().any(|output| output.starts_with(&node.name)) {
        text = text + "  # " + &node.name;
    }
    lines.push(text);
    for (name, graph) in node.attribute.iter().filter_map(|attribute| Some((&attribute.name, attribute.g.as_ref()?))) {
        let indent = "  ".repeat(depth);
        lines.push(format!("{indent}  {name}:"));
        graph.node.iter().for_each(|each| self::node(each, depth + 2, lines));
        let results: Vec<&str> = graph.output.iter().map(|value| value.name.as_str()).collect();
        lines.push(format!("{indent}    results {}", results.join(", ")));
    }
}

fn attribute(attribute: &AttributeProto) -> String {
    let value = match attribute.r#type {
        1 => format!("{:?}", attribute.f),
        2 => attribute.i.to_string(),
        3 => format!("{:?}", String::from_utf8_lossy(&attribute.s)),
        6 => format!("{:?}", attribute.floats),
        7 => format!("{:?}", attribute.ints),
        other => format!("<attribute type {other}>"),
    };
    format!("{}={value}", attribute.name)
}
