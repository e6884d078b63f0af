//! One tensor's whole way: checkpoint -> parameter -> initializer -> nodes.

use std::fmt;

use serde::Serialize;

use crate::compile::Compiled;
use crate::describe::distance;
use crate::error::{Code, Error, Result};
use crate::graph::{Node, Source, ValueId};
use crate::lower::Constant;

/// The way of a tensor, a parameter or an initializer into the graph.
#[derive(Debug, Serialize)]
pub struct Trace {
    /// The name that was asked for.
    pub name: String,
    /// Tensors of the checkpoint.
    pub tensors: Vec<TensorStep>,
    /// Why the tensor is left out, if it is.
    pub dropped: Option<String>,
    /// Parameters that are made of them.
    pub parameters: Vec<ParameterStep>,
    /// Initializers that hold them.
    pub initializers: Vec<InitializerStep>,
}

/// A tensor of the checkpoint.
#[derive(Debug, Serialize)]
pub struct TensorStep {
    name: String,
    file: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
    /// The format of a quantised weight, which the others say decoded.
    #[serde(skip_serializing_if = "Option::is_none")]
    stored: Option<String>,
}

/// A parameter of the model.
#[derive(Debug, Serialize)]
pub struct ParameterStep {
    name: String,
    shape: Vec<usize>,
    from: String,
}

/// A stored tensor of the graph.
#[derive(Debug, Serialize)]
pub struct InitializerStep {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
    from: String,
    nodes: Vec<NodeStep>,
}

/// A node that takes an initializer.
#[derive(Debug, Serialize)]
pub struct NodeStep {
    name: String,
    operator: String,
}

/// Follows a name: of a tensor, a parameter or an initializer.
pub fn trace(compiled: &Compiled, name: &str) -> Result<Trace> {
    let plan = &compiled.plan;
    let mut initializers = Vec::new();
    let graph = &compiled.lowered.graph;
    let mut parameters: Vec<&str> = Vec::new();
    let of_tensor =
        |parameter: &&crate::bind::Parameter| parameter.name == name || parameter.weight.sources().contains(&name);
    parameters.extend(plan.parameters.iter().filter(of_tensor).map(|parameter| parameter.name.as_str()));
    for (id, value) in graph.values() {
        let Source::Literal(Constant::Weight(weight)) = &value.source else { continue };
        let sources = weight.sources();
        if value.name == name {
            parameters
                .extend(sources.iter().filter(|source| !parameters.contains(source)).copied().collect::<Vec<_>>());
        } else if !sources.iter().any(|source| parameters.contains(source)) {
            continue;
        }
        if let Some(planned) = plan.initializers.iter().find(|planned| planned.value == id) {
            initializers.push(InitializerStep {
                name: value.name.clone(),
                dtype: planned.element.to_string(),
                shape: planned.shape.clone(),
                bytes: planned.bytes(),
                from: weight.to_string(),
                nodes: users(compiled, id),
            });
        }
    }
    let bound: Vec<_> = plan.parameters.iter().filter(|p| parameters.contains(&p.name.as_str())).collect();
    let checkpoint = &compiled.repository.checkpoint;
    let own = checkpoint.get(name).is_some();
    let mut sources: Vec<&str> = bound.iter().flat_map(|parameter| parameter.weight.sources()).collect();
    if own {
        sources = vec![name];
    }
    sources.dedup();
    if !own && bound.is_empty() {
        return Err(unknown(compiled, name));
    }
    Ok(Trace {
        name: name.to_owned(),
        tensors: sources.into_iter().filter_map(|source| tensor(compiled, source)).collect(),
        dropped: plan.dropped.get(name).cloned(),
        parameters: bound.iter().map(|p| step(p)).collect(),
        initializers,
    })
}

fn step(parameter: &crate::bind::Parameter) -> ParameterStep {
    ParameterStep { name: parameter.name.clone(), shape: parameter.shape.clone(), from: parameter.weight.to_string() }
}

fn tensor(compiled: &Compiled, name: &str) -> Option<TensorStep> {
    let checkpoint = &compiled.repository.checkpoint;
    let info = checkpoint.get(name)?;
    let file = checkpoint.files().get(info.file)?;
    let stored = checkpoint.logical(info).map(|logical| logical.encoding.format.clone());
    Some(TensorStep {
        name: name.to_owned(),
        file: file.name.clone(),
        dtype: info.dtype.to_string(),
        shape: info.shape.clone(),
        bytes: info.length,
        stored,
    })
}

fn users(compiled: &Compiled, id: ValueId) -> Vec<NodeStep> {
    let nodes = compiled.lowered.graph.nodes.iter().flat_map(Node::whole);
    let nodes = nodes.filter(|node| node.inputs.contains(&Some(id)));
    nodes.map(|node| NodeStep { name: node.name.clone(), operator: node.op.to_string() }).collect()
}

fn unknown(compiled: &Compiled, name: &str) -> Error {
    let tensors = compiled.repository.checkpoint.tensors().map(|tensor| tensor.name.as_str());
    let parameters = compiled.plan.parameters.iter().map(|parameter| parameter.name.as_str());
    let initializers = compiled.plan.initializers.iter().map(|initializer| initializer.name.as_str());
    let mut known: Vec<&str> = tensors.chain(parameters).chain(initializers).collect();
    known.sort_unstable();
    known.dedup();
    known.sort_by_cached_key(|known| distance(known, name));
    Error::new(Code::UsageInvalid, format!("--tensor {name}"))
        .found("no such tensor, parameter or initializer")
        .help(format!("the nearest names are {}", known.iter().take(4).copied().collect::<Vec<_>>().join(", ")))
}

/// Longer lists are cut in the middle of the output, never in `--json`.
const SHOWN: usize = 8;

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for tensor in self.tensors.iter().take(SHOWN) {
            writeln!(f, "tensor       {}", tensor.name)?;
            let size = super::bytes(tensor.bytes);
            writeln!(f, "             {} {:?}, {size}, in {}", tensor.dtype, tensor.shape, tensor.file)?;
            if let Some(stored) = &tensor.stored {
                writeln!(f, "             decoded from {stored}")?;
            }
        }
        if let Some(more) = self.tensors.len().checked_sub(SHOWN + 1) {
            writeln!(f, "             and {} more", more + 1)?;
        }
        if let Some(reason) = &self.dropped {
            writeln!(f, "left out     {reason}")?;
        }
        for parameter in &self.parameters {
            writeln!(f, "parameter    {} {:?}", parameter.name, parameter.shape)?;
            writeln!(f, "             = {}", parameter.from)?;
        }
        for initializer in &self.initializers {
            let size = super::bytes(initializer.bytes);
            let (name, dtype, shape) = (&initializer.name, &initializer.dtype, &initializer.shape);
            writeln!(f, "initializer  {name} {dtype} {shape:?}, {size}")?;
            writeln!(f, "             = {}", initializer.from)?;
            for node in &initializer.nodes {
                writeln!(f, "node         {}", node.name)?;
                writeln!(f, "             {}", node.operator)?;
            }
        }
        Ok(())
    }
}
