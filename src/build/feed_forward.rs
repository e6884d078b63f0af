//! The feed-forward part of a layer: one MLP, or a router and experts.

use super::Builder;
use super::op::{Composite, Kind, MoeOp};
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, ValueId};
use crate::spec::{FeedForward, Mlp, Moe, SharedExpert};

/// Builds the feed-forward part on its normalised input.
pub(super) fn build(b: &mut Builder, spec: &FeedForward, x: ValueId) -> Result<ValueId> {
    match spec {
        FeedForward::Dense(spec) => mlp(b, spec, x),
        FeedForward::Moe(spec) => moe(b, spec, x),
    }
}

fn width(b: &Builder, x: ValueId) -> usize {
    b.shape(x).last().and_then(Dim::value).and_then(|w| usize::try_from(w).ok()).unwrap_or(0)
}

/// `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.
fn mlp(b: &mut Builder, spec: &Mlp, x: ValueId) -> Result<ValueId> {
    let hidden = width(b, x);
    let activate = Composite::Activate(spec.activation);
    let inner = if spec.gated {
        let gate = b.linear("gate_proj", x, spec.intermediate_size, spec.bias)?;
        let gate = b.within("act_fn", |b| b.emit("Activate", activate, &[gate]))?;
        let up = b.linear("up_proj", x, spec.intermediate_size, spec.bias)?;
        b.emit("Gated", Composite::Multiply, &[gate, up])?
    } else {
        let up = b.linear("up_proj", x, spec.intermediate_size, spec.bias)?;
        b.within("act_fn", |b| b.emit("Activate", activate, &[up]))?
    };
    b.linear("down_proj", inner, hidden, spec.bias)
}

/// Routed experts, plus a shared one that sees every token.
fn moe(b: &mut Builder, spec: &Moe, x: ValueId) -> Result<ValueId> {
    let hidden = width(b, x);
    let (experts, inner) = (spec.experts, spec.expert.intermediate_size);
    if spec.expert.bias {
        return Err(Error::new(Code::SpecInvalid, "moe.expert.bias").found(true).expected("experts without biases"));
    }
    // The router decides in float32 whatever the computation's type is: a rounded logit chooses another expert.
    let full = b.within("gate", |b| b.emit("Convert", Composite::Convert(Kind::Full), &[x]))?;
    let mut operands = vec![x, b.linear("gate", full, experts, false)?];
    if spec.routing.correction_bias {
        operands.push(b.within("gate", |b| b.parameter("e_score_correction_bias", [experts], Kind::Full)));
    }
    b.within("experts", |b| {
        if spec.expert.gated {
            operands.push(b.parameter("gate_proj.weight", [experts, inner, hidden], Kind::Real));
        }
        operands.push(b.parameter("up_proj.weight", [experts, inner, hidden], Kind::Real));
        operands.push(b.parameter("down_proj.weight", [experts, hidden, inner], Kind::Real));
    });
    let op = MoeOp {
        experts,
        top_k: spec.top_k,
        intermediate_size: inner,
        activation: spec.expert.activation,
        gated: spec.expert.gated,
        routing: spec.routing.clone(),
    };
    let routed = b.within("experts", |b| b.emit("Moe", Composite::Moe(op), &operands))?;
    match &spec.shared {
        None => Ok(routed),
        Some(shared) => {
            let shared = shared_expert(b, shared, x)?;
            b.emit("Add", Composite::Add, &[routed, shared])
        }
    }
}

fn shared_expert(b: &mut Builder, spec: &SharedExpert, x: ValueId) -> Result<ValueId> {
    let y = b.within(&spec.name, |b| mlp(b, &spec.mlp, x))?;
    if !spec.gate {
        return Ok(y);
    }
    let gate = b.linear(&format!("{}_gate", spec.name), x, 1, false)?;
    let gate = b.emit("Sigmoid", Composite::Sigmoid, &[gate])?;
    b.emit("Multiply", Composite::Multiply, &[y, gate])
}
