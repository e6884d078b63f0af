//! The plan: initializer <- parameters <- tensors, with every shape checked.

use std::collections::BTreeMap;

use super::head;
use super::left_over::{Rest, left_over};
use crate::build::Model;
use crate::describe::TensorRules;
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Graph, Source, ValueId};
use crate::lower::{Constant, Onnx, Part, Stored};
use crate::quantize::Scheme;
use crate::read::Checkpoint;
use crate::weight::Weight;

/// How a graph's weights come from a checkpoint.
#[derive(Debug)]
pub struct Plan {
    /// What the graph holds, in the order in which it is written.
    pub initializers: Vec<Initializer>,
    /// What the model is made of, by name.
    pub parameters: Vec<Parameter>,
    /// Tensors that are left out, and why.
    pub dropped: BTreeMap<String, String>,
}

/// A stored tensor of the graph.
#[derive(Debug)]
pub struct Initializer {
    /// The value in the graph.
    pub value: ValueId,
    /// Its name.
    pub name: String,
    /// Element type in the graph.
    pub element: ElementType,
    /// Shape.
    pub shape: Vec<usize>,
    /// From tensors of the checkpoint.
    pub weight: Weight,
    /// Where its bytes lie in the checkpoint, if the graph takes them from there.
    pub linked: Option<Linked>,
    /// Which part of the quantised matrix it is, if `weight` is one.
    pub quantized: Option<(Scheme, Part)>,
}

/// Bytes in a file of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linked {
    /// Which of the checkpoint's files.
    pub file: usize,
    /// Bytes before it, from the start of the file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

impl Initializer {
    /// Size in the graph's element type.
    pub fn bytes(&self) -> u64 {
        self.element.bytes(self.shape.iter().fold(1, |count: u64, size| count.saturating_mul(*size as u64)))
    }
}

/// A learned parameter of the model.
#[derive(Debug)]
pub struct Parameter {
    /// Name, as Hugging Face's Llama would call it.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// From tensors of the checkpoint.
    pub weight: Weight,
}

/// Binds every parameter of a model to tensors of the checkpoint.
pub fn parameters(model: &Graph<Model>, rules: &TensorRules, checkpoint: &Checkpoint) -> Result<Vec<Parameter>> {
    let shapes = parameter_shapes(model);
    let bound = shapes.iter().map(|(name, shape)| {
        let weight = bind(name, shape, rules, &shapes, checkpoint)?;
        Ok(Parameter { name: name.clone(), shape: shape.clone(), weight })
    });
    bound.collect()
}

/// How the checkpoint stores these parameters, for a graph that takes them from its files; quantised ones can not be.
pub fn stored(parameters: &[Parameter], checkpoint: &Checkpoint) -> Stored {
    let tensor = |name: &str| {
        let tensor = checkpoint.get(name).filter(|tensor| !tensor.encoded)?;
        Some((tensor.dtype.element()?, tensor.shape.clone()))
    };
    let tensors = parameters.iter().flat_map(|parameter| parameter.weight.sources());
    Stored {
        parameters: parameters.iter().map(|p| (p.name.clone(), p.weight.clone())).collect(),
        tensors: tensors.filter_map(|name| Some((name.to_owned(), tensor(name)?))).collect(),
    }
}

/// Plans where the initializers of a lowered graph come from.
pub fn plan(
    parameters: Vec<Parameter>,
    lowered: &Graph<Onnx>,
    rest: Rest<'_>,
    checkpoint: &Checkpoint,
) -> Result<Plan> {
    let by_name: BTreeMap<&str, &Weight> = parameters.iter().map(|p| (p.name.as_str(), &p.weight)).collect();
    let mut initializers = Vec::new();
    let over_tensors = |weight: &Weight| {
        weight.substitute(&mut |name| {
            let bound = by_name.get(name).map(|weight| (*weight).clone());
            bound.ok_or_else(|| Error::new(Code::SpecInvalid, name).found("an initializer of an unknown parameter"))
        })
    };
    for (value, literal) in lowered.values() {
        let Source::Literal(constant) = &literal.source else { continue };
        let (weight, linked, quantized) = match constant {
            Constant::Inline(_) => continue,
            Constant::Weight(weight) => (over_tensors(weight)?, None, None),
            Constant::Stored(weight) => (weight.clone(), Some(linked(weight, checkpoint)?), None),
            Constant::Quantized(part) => (over_tensors(&part.weight)?, None, Some((part.scheme, part.part))),
        };
        initializers.push(Initializer {
            value,
            name: literal.name.clone(),
            element: literal.ty.element,
            shape: fixed(&literal.ty.shape),
            weight,
            linked,
            quantized,
        });
    }
    let used = parameters.iter().flat_map(|parameter| parameter.weight.sources()).collect();
    let dropped = left_over(&used, rest, checkpoint)?;
    Ok(Plan { initializers, parameters, dropped })
}

/// Where the bytes of an expression that is a part of one tensor lie; none for any other.
pub fn stored_at(weight: &Weight, checkpoint: &Checkpoint) -> Option<Linked> {
    let shape = |name: &str| checkpoint.get(name).map(|tensor| tensor.shape.clone());
    let part = weight.contiguous(&shape)?;
    let tensor = checkpoint.get(part.tensor).filter(|tensor| !tensor.encoded)?;
    let size = tensor.dtype.element()?.size() as u64;
    let (first, length) = ((part.first as u64).checked_mul(size)?, (part.count as u64).checked_mul(size)?);
    let inside = first.checked_add(length)? <= tensor.length;
    inside.then_some(Linked { file: tensor.file, offset: tensor.offset.checked_add(first)?, length })
}

fn linked(weight: &Weight, checkpoint: &Checkpoint) -> Result<Linked> {
    stored_at(weight, checkpoint).ok_or_else(|| {
        Error::new(Code::SpecInvalid, weight).found("a linked initializer that is no part of one tensor")
    })
}

fn fixed(shape: &[Dim]) -> Vec<usize> {
    shape.iter().map(|dim| dim.value().and_then(|size| usize::try_from(size).ok()).unwrap_or(0)).collect()
}

/// Name and shape of every parameter of a model.
pub(crate) fn parameter_shapes(model: &Graph<Model>) -> BTreeMap<String, Vec<usize>> {
    let literals = model.values().filter(|(_, value)| matches!(value.source, Source::Literal(_)));
    literals.map(|(_, value)| (value.name.clone(), fixed(&value.ty.shape))).collect()
}

/// The first way to store a parameter of which the checkpoint has every tensor.
fn bind(
    name: &str,
    shape: &[usize],
    rules: &TensorRules,
    shapes: &BTreeMap<String, Vec<usize>>,
    checkpoint: &Checkpoint,
) -> Result<Weight> {
    let stored = rules.stored(name, shapes, &|tensor| checkpoint.get(tensor).is_some())?;
    let stored = stored.map_or_else(|| head::instead(name, rules, shapes, checkpoint), |weight| Ok(Some(weight)))?;
    let Some(weight) = stored else {
        return Err(missing(name, &rules.bind(name, shapes)?.alternatives, checkpoint));
    };
    for tensor in weight.sources() {
        if let Some(info) =
            checkpoint.get(tensor).filter(|info| !info.dtype.element().is_some_and(ElementType::is_float))
        {
            return Err(Error::new(Code::QuantizationUnsupported, tensor)
                .found(info.dtype.as_str())
                .expected("float32, bfloat16 or float16 weights")
                .help("use the checkpoint from which this one was quantised"));
        }
    }
    let of = |tensor: &str| checkpoint.get(tensor).map(|info| info.shape.clone());
    let subject = || format!("tensor {} for parameter {name}", weight.sources().join(", "));
    let found = weight.shape(&of).map_err(|reason| Error::new(Code::TensorShape, subject()).found(reason))?;
    // Python broadcasts nothing here, but a scalar gate may be stored as [1].
    if found != shape {
        return Err(Error::new(Code::TensorShape, subject())
            .found(format!("{found:?}"))
            .expected(format!("{shape:?}"))
            .help("config.json and the weights do not belong together, or the template takes the wrong size"));
    }
    Ok(weight)
}

fn missing(name: &str, alternatives: &[Weight], checkpoint: &Checkpoint) -> Error {
    let wanted: Vec<String> = alternatives.iter().map(ToString::to_string).collect();
    let absent: Vec<&str> =
        alternatives.iter().flat_map(Weight::sources).filter(|t| checkpoint.get(t).is_none()).collect();
    let near = absent.first().and_then(|absent| {
        let names = checkpoint.tensors().map(|tensor| tensor.name.as_str());
        names.min_by_key(|known| crate::describe::distance(known, absent))
    });
    let near = near.map_or("the checkpoint has no tensors".to_owned(), |near| format!("the nearest name is {near}"));
    let near = checkpoint.notes().iter().fold(near, |near, note| format!("{near}; {note}"));
    Error::new(Code::TensorMissing, format!("parameter {name}"))
        .found(format!("no tensor {}", absent.first().copied().unwrap_or(name)))
        .expected(wanted.join(", or "))
        .help(format!("{near}; a [tensors] rule in the template maps other names"))
}
