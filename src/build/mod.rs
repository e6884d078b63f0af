//! Builders: a resolved specification becomes a graph of composite operations.
//!
//! **Invariant:** builders see [`ModelSpec`] and the shape of the output that is asked for. They know no
//! configuration, no checkpoint and no target. A parameter's name follows from the scope in which it is asked for.

mod altup;
mod attention;
mod builder;
mod embedding;
mod feed_forward;
mod indexer;
mod infer;
mod layer;
mod mixture;
mod op;
mod per_layer;
mod states;

pub use builder::Builder;
pub use op::{AttentionOp, Composite, IndexOp, Kind, Model, MoeOp, NormOp, Parameter};

use crate::error::Result;
use crate::graph::{Dim, Graph, Symbol, Type, ValueId};
use crate::spec::{HeadTransform, Layer, ModelSpec, Norm, PerLayer};
use layer::Stream;
use states::{State, states};
pub use states::{caches, is_cache};

/// Which positions' logits a graph computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Logits {
    /// Those of every new token.
    #[default]
    All,
    /// Those of each row's last kept token only, which saves the projection to the vocabulary for a prompt.
    Last,
}

/// The values that layers share.
struct Inputs {
    attention_mask: ValueId,
    position_ids: ValueId,
    /// Past states of each layer.
    pasts: Vec<Vec<ValueId>>,
}

/// What a layer may read beside its stream.
struct Context<'a> {
    inputs: &'a Inputs,
    /// Its own states.
    pasts: &'a [ValueId],
    /// Present states of the layers before it.
    presents: &'a [Vec<ValueId>],
    /// The keys that the last indexer chose.
    index: Option<ValueId>,
    /// The output of the last layer's shortcut.
    shortcut: Option<ValueId>,
    /// Its part of the per-layer embedding.
    per_layer: Option<(&'a PerLayer, ValueId)>,
}

/// What a layer leaves behind beside its stream.
struct Built {
    presents: Vec<ValueId>,
    index: Option<ValueId>,
    shortcut: Option<ValueId>,
}

/// Builds the graph of a decoder with the signature that consumers expect: `input_ids`, `attention_mask`,
/// `position_ids` and `past_key_values.{i}.key|value` in, `logits` and `present.{i}.key|value` out.
pub fn decoder(spec: &ModelSpec, logits: Logits) -> Result<Graph<Model>> {
    let mut b = Builder::default();
    let slots: Vec<Vec<State>> = spec.layers.iter().enumerate().map(|(i, layer)| states(i, layer)).collect();
    let (ids, inputs) = inputs(&mut b, &slots);
    let (hidden, presents) = b.within("model", |b| model(b, spec, ids, &inputs))?;
    let logits = head(&mut b, spec, hidden, inputs.attention_mask, logits)?;
    b.output("logits", logits);
    for (slot, value) in slots.iter().flatten().zip(presents.into_iter().flatten()) {
        slot.output(&mut b, value);
    }
    b.finish()
}

fn inputs(b: &mut Builder, slots: &[Vec<State>]) -> (ValueId, Inputs) {
    let batch = Dim::from(Symbol::Batch);
    let sequence = Dim::from(Symbol::Sequence);
    let total = &Dim::from(Symbol::Past) + &sequence;
    let ids = b.input("input_ids", Type::new(Kind::Integer, [batch.clone(), sequence.clone()]));
    let attention_mask = b.input("attention_mask", Type::new(Kind::Integer, [batch.clone(), total]));
    let position_ids = b.input("position_ids", Type::new(Kind::Integer, [batch, sequence]));
    let pasts = slots.iter().map(|slots| slots.iter().map(|slot| slot.input(b)).collect()).collect();
    (ids, Inputs { attention_mask, position_ids, pasts })
}

/// Embedding, layers, final norm. Every state between layers is named `hidden_states.{i}`, as transformers
/// numbers them (the last one is behind the final norm), so that a mismatch can be traced to its layer.
fn model(b: &mut Builder, spec: &ModelSpec, ids: ValueId, inputs: &Inputs) -> Result<(ValueId, Vec<Vec<ValueId>>)> {
    let embedded = embedding::build(b, &spec.embedding, (spec.vocab_size, spec.hidden_size), ids, inputs)?;
    b.name(embedded, "hidden_states.0");
    let parts = per_layer::embed(b, spec, ids, embedded)?;
    let mut stream = Stream::new(match &spec.altup {
        Some(altup) => altup::spread(b, altup, embedded)?,
        None => embedded,
    });
    let mut presents = Vec::new();
    let (mut index, mut shortcut) = (None, None);
    for (i, (layer, pasts)) in spec.layers.iter().zip(&inputs.pasts).enumerate() {
        let per_layer = per_layer::part(b, spec, parts, i)?;
        let context = Context { inputs, pasts, presents: &presents, index, shortcut, per_layer };
        let module = module(layer, i);
        let built = b.within(&format!("layers.{module}"), |b| match &spec.altup {
            Some(altup) => altup::layer(b, altup, layer, &mut stream, &context),
            None => layer::build(b, layer, &mut stream, &context),
        })?;
        (index, shortcut) = (built.index.or(index), built.shortcut);
        presents.push(built.presents);
        let next = spec.layers.get(i + 1).map(|next| self::module(next, i + 1));
        // Layers that share a module have no state of transformers between them, and several streams have none either.
        if next.is_some_and(|next| next != module) && spec.altup.is_none() {
            stream.name(b, format!("hidden_states.{}", module + 1));
        }
    }
    if let Some(altup) = &spec.altup {
        let streams = stream.value(b)?;
        stream = Stream::new(altup::merge(b, altup, streams)?);
    }
    let hidden = stream.normed(b, spec.final_norm.as_ref())?;
    let modules = spec.layers.iter().enumerate().map(|(i, layer)| module(layer, i) + 1).max().unwrap_or(0);
    b.name(hidden, &format!("hidden_states.{modules}"));
    Ok((hidden, presents))
}

/// Index below which the checkpoint holds a layer.
fn module(layer: &Layer, index: usize) -> usize {
    layer.modules.as_ref().map_or(index, |modules| modules.layer)
}

fn head(b: &mut Builder, spec: &ModelSpec, hidden: ValueId, mask: ValueId, logits: Logits) -> Result<ValueId> {
    let hidden = b.within("lm_head", |b| match logits {
        Logits::All => b.emit("EveryToken", Composite::EveryToken, &[hidden, mask]),
        Logits::Last => b.emit("LastToken", Composite::LastToken, &[hidden, mask]),
    })?;
    let hidden = match spec.embedding.size {
        Some(size) => b.within("model", |b| b.linear("project_out", hidden, size, false))?,
        None => hidden,
    };
    let hidden = match &spec.head.transform {
        Some(transform) => b.within("lm_head", |b| transformed(b, transform, hidden))?,
        None => hidden,
    };
    let shape = [spec.vocab_size, b.width(hidden)];
    let tied = spec.head.tied.then(|| b.within("model.embed_tokens", |b| b.parameter("weight", shape, Kind::Real)));
    b.within("lm_head", |b| {
        let weight = tied.unwrap_or_else(|| b.parameter("weight", shape, Kind::Real));
        let mut operands = vec![hidden, weight];
        if spec.head.bias {
            operands.push(b.parameter("bias", [spec.vocab_size], Kind::Real));
        }
        let logits = b.emit("Linear", Composite::Linear, &operands)?;
        let mut logits = b.emit("Convert", Composite::Convert(Kind::Full), &[logits])?;
        if let Some(scale) = spec.head.scale {
            logits = b.emit("Scale", Composite::Scale(scale), &[logits])?;
        }
        if let Some(cap) = spec.head.softcap {
            logits = b.emit("Softcap", Composite::Softcap(cap), &[logits])?;
        }
        Ok(logits)
    })
}

/// `norm(act(dense(x)))`
fn transformed(b: &mut Builder, spec: &HeadTransform, hidden: ValueId) -> Result<ValueId> {
    let width = b.width(hidden);
    let hidden = b.linear("dense", hidden, width, spec.bias)?;
    let hidden = feed_forward::activate(b, spec.activation, hidden)?;
    b.norm(&spec.norm, hidden)
}

impl From<&Norm> for NormOp {
    fn from(norm: &Norm) -> Self {
        Self {
            kind: norm.kind,
            eps: norm.eps,
            weight: norm.weight,
            bias: norm.bias,
            offset: norm.offset && norm.weight,
        }
    }
}
