//! Builders: a resolved specification becomes a graph of composite operations.
//!
//! **Invariant:** builders see [`ModelSpec`] and the shape of the output that is asked for. They know no
//! configuration, no checkpoint and no target. A parameter's name follows from the scope in which it is asked for.

mod attention;
mod builder;
mod embedding;
mod feed_forward;
mod layer;
mod op;

pub use builder::Builder;
pub use op::{AttentionOp, Composite, Kind, Model, MoeOp, NormOp, Parameter};

use crate::error::Result;
use crate::graph::{Dim, Graph, Symbol, Type, ValueId};
use crate::spec::{HeadTransform, ModelSpec, Norm};
use layer::Stream;

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
    caches: Caches,
}

/// Key and value of each layer.
type Caches = Vec<(ValueId, ValueId)>;

/// Builds the graph of a decoder with the signature that consumers expect: `input_ids`, `attention_mask`,
/// `position_ids` and `past_key_values.{i}.key|value` in, `logits` and `present.{i}.key|value` out.
pub fn decoder(spec: &ModelSpec, logits: Logits) -> Result<Graph<Model>> {
    let mut b = Builder::default();
    let (ids, inputs) = inputs(&mut b, spec);
    let (hidden, presents) = b.within("model", |b| model(b, spec, ids, &inputs))?;
    let logits = head(&mut b, spec, hidden, inputs.attention_mask, logits)?;
    b.output("logits", logits);
    for (i, (key, value)) in presents.into_iter().enumerate() {
        b.output(&format!("present.{i}.key"), key);
        b.output(&format!("present.{i}.value"), value);
    }
    Ok(b.finish())
}

fn inputs(b: &mut Builder, spec: &ModelSpec) -> (ValueId, Inputs) {
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
    (ids, inputs)
}

/// Embedding, layers, final norm. Every state between layers is named `hidden_states.{i}`, as transformers
/// numbers them (the last one is behind the final norm), so that a mismatch can be traced to its layer.
fn model(b: &mut Builder, spec: &ModelSpec, ids: ValueId, inputs: &Inputs) -> Result<(ValueId, Caches)> {
    let embedded = embedding::build(b, &spec.embedding, (spec.vocab_size, spec.hidden_size), ids, inputs)?;
    b.name(embedded, "hidden_states.0");
    let mut stream = Stream::new(embedded);
    let mut presents = Caches::new();
    for (i, (layer, cache)) in spec.layers.iter().zip(&inputs.caches).enumerate() {
        let scope = format!("layers.{i}");
        presents.push(b.within(&scope, |b| layer::build(b, layer, &mut stream, inputs, *cache))?);
        if i + 1 < spec.layers.len() {
            stream.name(b, format!("hidden_states.{}", i + 1));
        }
    }
    let hidden = stream.normed(b, spec.final_norm.as_ref())?;
    b.name(hidden, &format!("hidden_states.{}", spec.layers.len()));
    Ok((hidden, presents))
}

fn head(b: &mut Builder, spec: &ModelSpec, hidden: ValueId, mask: ValueId, logits: Logits) -> Result<ValueId> {
    let hidden = match logits {
        Logits::All => hidden,
        Logits::Last => b.within("lm_head", |b| b.emit("LastToken", Composite::LastToken, &[hidden, mask]))?,
    };
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
