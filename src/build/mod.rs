//! Builders: a resolved specification becomes a graph of composite operations.
//!
//! **Invariant:** builders see [`ModelSpec`] and the shape of the output that is asked for. They know no
//! configuration, no checkpoint and no target. A parameter's name follows from the scope in which it is asked for.

mod attention;
mod builder;
mod feed_forward;
mod op;

pub use builder::Builder;
pub use op::{AttentionOp, Composite, Kind, Model, MoeOp, NormOp, Parameter};

use crate::error::Result;
use crate::graph::{Dim, Graph, Symbol, Type, ValueId};
use crate::spec::{Layer, ModelSpec, Norm};

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
    caches: Vec<(ValueId, ValueId)>,
}

/// Builds the graph of a decoder with the signature that consumers expect: `input_ids`, `attention_mask`,
/// `position_ids` and `past_key_values.{i}.key|value` in, `logits` and `present.{i}.key|value` out.
pub fn decoder(spec: &ModelSpec, logits: Logits) -> Result<Graph<Model>> {
    let mut b = Builder::default();
    let batch = Dim::from(Symbol::Batch);
    let sequence = Dim::from(Symbol::Sequence);
    let past = Dim::from(Symbol::Past);
    let total = &past + &sequence;
    let ids = b.input("input_ids", Type::new(Kind::Integer, [batch.clone(), sequence.clone()]));
    let mut inputs = Inputs {
        attention_mask: b.input("attention_mask", Type::new(Kind::Integer, [batch.clone(), total])),
        position_ids: b.input("position_ids", Type::new(Kind::Integer, [batch.clone(), sequence])),
        caches: Vec::new(),
    };
    for (i, layer) in spec.layers.iter().enumerate() {
        let attention = &layer.attention;
        let shape = |size: usize| [batch.clone(), Dim::from(attention.kv_heads), past.clone(), Dim::from(size)];
        let key = Type::new(Kind::Real, shape(attention.key_size));
        let value = Type::new(Kind::Real, shape(attention.value_size));
        let key = b.input(&format!("past_key_values.{i}.key"), key);
        inputs.caches.push((key, b.input(&format!("past_key_values.{i}.value"), value)));
    }
    let (hidden, presents) = b.within("model", |b| model(b, spec, ids, &inputs))?;
    let logits = head(&mut b, spec, hidden, inputs.attention_mask, logits)?;
    b.output("logits", logits);
    for (i, (key, value)) in presents.into_iter().enumerate() {
        b.output(&format!("present.{i}.key"), key);
        b.output(&format!("present.{i}.value"), value);
    }
    Ok(b.finish())
}

type Caches = Vec<(ValueId, ValueId)>;

/// Embedding, layers, final norm. Every state between layers is named `hidden_states.{i}`, as transformers
/// numbers them (the last one is behind the final norm), so that a mismatch can be traced to its layer.
fn model(b: &mut Builder, spec: &ModelSpec, ids: ValueId, inputs: &Inputs) -> Result<(ValueId, Caches)> {
    let mut residual = b.within("embed_tokens", |b| {
        let table = b.parameter("weight", [spec.vocab_size, spec.hidden_size], Kind::Real);
        let embedded = b.emit("Embed", Composite::Embed, &[ids, table])?;
        match spec.embedding.scale {
            Some(scale) => b.emit("Scale", Composite::Scale(scale), &[embedded]),
            None => Ok(embedded),
        }
    })?;
    b.name(residual, "hidden_states.0");
    let first = spec.layers.first().map_or(&spec.final_norm, |layer| &layer.norms.attention_input);
    let first_scope = if spec.layers.is_empty() { String::new() } else { "layers.0".to_owned() };
    let mut normed = b.within(&first_scope, |b| norm(b, first, residual))?;
    let mut presents = Caches::new();
    for (i, (layer, cache)) in spec.layers.iter().zip(&inputs.caches).enumerate() {
        let (delta, after_attention, present) =
            b.within(&format!("layers.{i}"), |b| decoder_layer(b, layer, (residual, normed), inputs, *cache))?;
        presents.push(present);
        let (scope, next) = match spec.layers.get(i + 1) {
            Some(next) => (format!("layers.{}", i + 1), &next.norms.attention_input),
            None => (String::new(), &spec.final_norm),
        };
        (residual, normed) = b.within(&scope, |b| add_norm(b, next, after_attention, delta))?;
        if i + 1 < spec.layers.len() {
            b.name(residual, &format!("hidden_states.{}", i + 1));
        }
    }
    b.name(normed, &format!("hidden_states.{}", spec.layers.len()));
    Ok((normed, presents))
}

/// A pre-norm layer. Takes the residual and its norm; returns the last branch, the residual it is to be added
/// to, and the layer's cache. The addition is left to the caller, who knows the norm that follows it.
fn decoder_layer(
    b: &mut Builder,
    layer: &Layer,
    (residual, normed): (ValueId, ValueId),
    inputs: &Inputs,
    cache: (ValueId, ValueId),
) -> Result<(ValueId, ValueId, (ValueId, ValueId))> {
    let (mixed, present) = b.within("self_attn", |b| attention::build(b, &layer.attention, normed, inputs, cache))?;
    let (residual, normed) = add_norm(b, &layer.norms.feed_forward_input, residual, mixed)?;
    let delta = b.within("mlp", |b| feed_forward::build(b, &layer.feed_forward, normed))?;
    Ok((delta, residual, present))
}

fn head(b: &mut Builder, spec: &ModelSpec, hidden: ValueId, mask: ValueId, logits: Logits) -> Result<ValueId> {
    let hidden = match logits {
        Logits::All => hidden,
        Logits::Last => b.within("lm_head", |b| b.emit("LastToken", Composite::LastToken, &[hidden, mask]))?,
    };
    let shape = [spec.vocab_size, spec.hidden_size];
    let tied = spec.head.tied.then(|| b.within("model.embed_tokens", |b| b.parameter("weight", shape, Kind::Real)));
    b.within("lm_head", |b| {
        let weight = tied.unwrap_or_else(|| b.parameter("weight", shape, Kind::Real));
        let mut operands = vec![hidden, weight];
        if spec.head.bias {
            operands.push(b.parameter("bias", [spec.vocab_size], Kind::Real));
        }
        let logits = b.emit("Linear", Composite::Linear, &operands)?;
        b.emit("Convert", Composite::Convert(Kind::Full), &[logits])
    })
}

fn norm(b: &mut Builder, norm: &Norm, x: ValueId) -> Result<ValueId> {
    b.within(&norm.name, |b| {
        let weight = b.norm_weight(x);
        b.emit("Norm", Composite::Norm(norm.into()), &[x, weight])
    })
}

/// `residual + delta`, and the norm of that.
fn add_norm(b: &mut Builder, norm: &Norm, residual: ValueId, delta: ValueId) -> Result<(ValueId, ValueId)> {
    b.within(&norm.name, |b| {
        let weight = b.norm_weight(residual);
        let op = Composite::AddNorm(norm.into());
        b.emit_pair(["Add", "Norm"], op, &[residual, delta, weight])
    })
}

impl From<&Norm> for NormOp {
    fn from(norm: &Norm) -> Self {
        Self { kind: norm.kind, eps: norm.eps, offset: norm.offset }
    }
}
