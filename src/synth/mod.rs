//! Synthesis: a random checkpoint of a model's shapes from its `config.json` alone, for benches and tests of models
//! whose weights are not at hand or too large to keep.
//!
//! What a model is made of is what the compiler itself would ask of a checkpoint: the template's tensor rules, read
//! backwards from the parameters to the tensors that published checkpoints hold.

mod draw;
mod invert;
mod shards;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

pub use shards::write;

use crate::bind::parameter_shapes;
use crate::build::{self, Logits, Model};
use crate::describe::{self, Template, TensorRules};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Graph, Source};
use crate::read::json_file;
use crate::weight::Weight;

/// How a checkpoint is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Type of every tensor: float32, float16 or bfloat16.
    pub element: ElementType,
    /// Chooses the values: the same seed gives the same bytes on every machine.
    pub seed: u64,
    /// Most bytes of data in one file, unless a single tensor is larger.
    pub shard_size: u64,
    /// Leave the data out: the files have their sizes and read as zeros, but hold holes where the system has holes.
    pub sparse: bool,
}

/// A tensor that a checkpoint of the model holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Around which its values lie: 1 for norms and other scales, else 0.
    pub mean: f32,
}

impl Tensor {
    /// Number of elements.
    fn elements(&self) -> Result<u64> {
        let count = self.shape.iter().try_fold(1_u64, |count, size| count.checked_mul(u64::try_from(*size).ok()?));
        count.ok_or_else(|| {
            Error::new(Code::SpecInvalid, format!("tensor {}", self.name))
                .found(format!("shape {:?}", self.shape))
                .expected("a number of elements that fits 64 bits")
        })
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of data, holes included.
    pub bytes: u64,
    /// Names of the safetensors files.
    pub files: Vec<String>,
}

/// The tensors of a checkpoint for a configuration, in the order in which the model first uses them.
///
/// Of several ways to store a parameter it is the first, which is how checkpoints are published.
pub fn tensors(template: &Template, config: &Map<String, Value>, allowed_keys: &[String]) -> Result<Vec<Tensor>> {
    let description = describe::describe(template, config, allowed_keys)?;
    let model = build::decoder(&description.spec, Logits::All)?;
    let shapes = parameter_shapes(&model);
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (_, value) in model.values().filter(|(_, value)| matches!(value.source, Source::Literal(_))) {
        let (name, bound) = (value.name.as_str(), description.rules.bind(&value.name, &shapes)?);
        let shape = shapes.get(name).cloned().unwrap_or_default();
        let weight = bound.alternatives.first().ok_or_else(|| error(name).found("no way to store it"))?;
        for (tensor, shape) in invert::sources(weight, shape).map_err(|found| error(name).found(found))? {
            let mean = mean(name, &shape, weight);
            match places.get(&tensor).and_then(|place| tensors.get(*place)) {
                None => {
                    places.insert(tensor.clone(), tensors.len());
                    tensors.push(Tensor { name: tensor, shape, mean });
                }
                Some(first) if first.shape == shape => {}
                Some(first) => {
                    return Err(error(name)
                        .found(format!("tensor {tensor} of shape {shape:?}"))
                        .expected(format!("shape {:?}, as other parameters take it", first.shape)));
                }
            }
        }
    }
    Ok(tensors)
}

/// Shapes of the tensors that a checkpoint of a model may hold, whichever way it stores a parameter.
pub(crate) fn tensor_shapes(model: &Graph<Model>, rules: &TensorRules) -> BTreeMap<String, Vec<usize>> {
    let parameters = parameter_shapes(model);
    let mut shapes = BTreeMap::new();
    for (name, shape) in &parameters {
        let alternatives = rules.bind(name, &parameters).map(|bound| bound.alternatives).unwrap_or_default();
        for weight in alternatives {
            for (tensor, shape) in invert::sources(&weight, shape.clone()).unwrap_or_default() {
                shapes.extend(rules.spellings(&tensor).into_iter().map(|name| (name, shape.clone())));
            }
        }
    }
    shapes
}

fn error(parameter: &str) -> Error {
    Error::new(Code::SpecInvalid, format!("parameter {parameter}"))
        .help("its rule in the template's [tensors] does not say which tensors a checkpoint holds")
}

/// Matrices and biases lie around 0; what multiplies a hidden state lies around 1, and is stored without that 1
/// where the rule adds it.
fn mean(parameter: &str, shape: &[usize], weight: &Weight) -> f32 {
    let (module, kind) = parameter.rsplit_once('.').unwrap_or(("", parameter));
    let norm = kind == "weight" && (shape.len() == 1 || module.rsplit('.').next().is_some_and(|m| m.contains("norm")));
    let scale = norm || kind.contains("scale") || kind.contains("scalar");
    if scale && !invert::adds_one(weight) { 1.0 } else { 0.0 }
}

/// A checkpoint that can be written.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Its tensors, in the order in which the model first uses them.
    pub tensors: Vec<Tensor>,
    /// The bytes of the `config.json` that lies beside them.
    pub config: Vec<u8>,
}

impl Checkpoint {
    /// Bytes of all tensors. An error when they do not fit 63 bits.
    pub fn bytes(&self, layout: &Layout) -> Result<u64> {
        shards::total(&self.tensors, layout)
    }
}

/// What a checkpoint for the model of a `config.json` holds.
pub fn plan(config: &Path, template: Option<&Path>, allowed_keys: &[String]) -> Result<Checkpoint> {
    let values = json_file(config)?;
    let template = describe::choose(&values, template)?;
    let tensors = tensors(&template, &values, allowed_keys)?;
    let config =
        crate::regular::read(config, crate::regular::CONFIGURATION).map_err(|error| Error::io(config, &error))?;
    Ok(Checkpoint { tensors, config })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_lie_around_one() {
        let plain = Weight::source("x");
        assert_eq!(mean("model.norm.weight", &[8], &plain).to_bits(), 1.0_f32.to_bits());
        assert_eq!(mean("model.layers.0.self_attn.q_norm.weight", &[2, 8], &plain).to_bits(), 1.0_f32.to_bits());
        assert_eq!(mean("model.layers.0.layer_scalar", &[1], &plain).to_bits(), 1.0_f32.to_bits());
        assert_eq!(mean("model.norm.weight", &[8], &Weight::AddOne(Box::new(plain.clone()))).to_bits(), 0);
        assert_eq!(mean("model.norm.bias", &[8], &plain).to_bits(), 0);
        assert_eq!(mean("model.layers.0.norm_attn.q_proj.weight", &[8, 8], &plain).to_bits(), 0);
    }
}
