//! Whether a head that the configuration ties to the embedding is the embedding: the checkpoint decides.
//!
//! A checkpoint that holds a head of other values has a head of its own, whatever the configuration says; so does
//! transformers have it (`tie_weights`, which ties only what is equal or what one of the two is missing of).

use std::collections::BTreeMap;

use super::plan::parameter_shapes;
use super::values::equal;
use crate::build::{self, Logits, Model};
use crate::describe::{Description, TensorRules};
use crate::element::ElementType;
use crate::error::Result;
use crate::graph::Graph;
use crate::read::Checkpoint;
use crate::weight::Weight;

/// The head's matrix, as parameters are named.
const HEAD: &str = "lm_head.weight";
/// The table that it is tied to.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// What a checkpoint holds of a head that is tied to the embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    /// Nothing, or nothing is tied: the specification stands as it is.
    AsDescribed,
    /// The embedding again, in these tensors.
    Again(Vec<String>),
    /// Other values: a head of its own.
    Own(String),
}

impl Head {
    /// A model as its checkpoint has it: with a head of its own where that is what is stored.
    pub fn settle(
        model: Graph<Model>,
        description: &mut Description,
        checkpoint: &Checkpoint,
        logits: Logits,
    ) -> Result<(Graph<Model>, Self)> {
        let head = Self::compare(&model, &description.rules, checkpoint)?;
        if !matches!(head, Self::Own(_)) {
            return Ok((model, head));
        }
        description.spec.head.tied = false;
        Ok((build::decoder(&description.spec, logits)?, head))
    }

    /// What became of it against the configuration.
    pub fn note(&self) -> Option<&String> {
        match self {
            Self::Own(note) => Some(note),
            Self::AsDescribed | Self::Again(_) => None,
        }
    }

    /// Compares the two, if the model ties them and the checkpoint holds both. Nothing else is read.
    fn compare(model: &Graph<Model>, rules: &TensorRules, checkpoint: &Checkpoint) -> Result<Self> {
        let shapes = parameter_shapes(model);
        if shapes.contains_key(HEAD) {
            return Ok(Self::AsDescribed);
        }
        let (head, embedding) = (tied(rules, &shapes, checkpoint)?, own_table(rules, &shapes, checkpoint)?);
        let (Some(head), Some(embedding)) = (head, embedding) else { return Ok(Self::AsDescribed) };
        let names: Vec<String> = head.sources().into_iter().map(str::to_owned).collect();
        // Neither floats nor of one shape: binding the head says what is wrong with it.
        let number = |name: &String| {
            checkpoint.get(name).and_then(|tensor| tensor.dtype.element()).is_some_and(ElementType::is_float)
        };
        if names.iter().all(number) && equal(&head, &embedding, checkpoint)? {
            return Ok(Self::Again(names));
        }
        Ok(Self::Own(format!(
            "tie_word_embeddings is true, but {head} differs from {embedding}: the head is its own, as in transformers"
        )))
    }
}

/// The table of embeddings, under its own name.
fn own_table(
    rules: &TensorRules,
    shapes: &BTreeMap<String, Vec<usize>>,
    checkpoint: &Checkpoint,
) -> Result<Option<Weight>> {
    rules.stored(EMBEDDING, shapes, &|name| checkpoint.get(name).is_some())
}

/// The head's tensors in a checkpoint of a model that ties it.
fn tied(rules: &TensorRules, shapes: &BTreeMap<String, Vec<usize>>, checkpoint: &Checkpoint) -> Result<Option<Weight>> {
    let Some(shape) = shapes.get(EMBEDDING) else { return Ok(None) };
    let mut shapes = shapes.clone();
    shapes.insert(HEAD.to_owned(), shape.clone());
    rules.stored(HEAD, &shapes, &|name| checkpoint.get(name).is_some())
}

/// Another way to store a parameter: a tied table may have the head's name alone.
pub(super) fn instead(
    parameter: &str,
    rules: &TensorRules,
    shapes: &BTreeMap<String, Vec<usize>>,
    checkpoint: &Checkpoint,
) -> Result<Option<Weight>> {
    if parameter != EMBEDDING || shapes.contains_key(HEAD) {
        return Ok(None);
    }
    tied(rules, shapes, checkpoint)
}
