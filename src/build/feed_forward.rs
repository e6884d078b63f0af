//! The feed-forward part of a layer: one MLP, or a router and experts.

use super::Builder;
use super::op::{Composite, Kind, MoeOp};
use crate::error::{Code, Error, Result};
use crate::graph::ValueId;
use crate::spec::{Activation, FeedForward, Mlp, Moe, Score, SharedExpert};

/// Builds the feed-forward part on its normalised input.
pub(super) fn build(b: &mut Builder, spec: &FeedForward, x: ValueId) -> Result<ValueId> {
    match spec {
        FeedForward::Dense(spec) => mlp(b, spec, x),
        FeedForward::Moe(spec) => moe(b, spec, x, x),
    }
}

/// `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.
fn mlp(b: &mut Builder, spec: &Mlp, x: ValueId) -> Result<ValueId> {
    let hidden = b.width(x);
    let mut inner = if spec.gated {
        let gate = b.linear("gate_proj", x, spec.intermediate_size, spec.bias)?;
        let up = b.linear("up_proj", x, spec.intermediate_size, spec.bias)?;
        if let Activation::ClampedSwiglu { alpha, limit } = spec.activation {
            b.emit("Gated", Composite::ClampedSwiglu { alpha, limit }, &[gate, up])?
        } else {
            let gate = sparse(b, spec, gate)?;
            let gate = activate(b, spec.activation, gate)?;
            b.emit("Gated", Composite::Multiply, &[gate, up])?
        }
    } else {
        let up = b.linear("up_proj", x, spec.intermediate_size, spec.bias)?;
        activate(b, spec.activation, up)?
    };
    if let Some(norm) = &spec.inner_norm {
        inner = b.norm(norm, inner)?;
    }
    b.linear("down_proj", inner, hidden, spec.bias)
}

/// Zeroes the smaller elements, about the share that is asked for.
fn sparse(b: &mut Builder, spec: &Mlp, gate: ValueId) -> Result<ValueId> {
    match spec.sparsity {
        Some(share) => b.emit("Sparsity", Composite::SparseRelu(share), &[gate]),
        None => Ok(gate),
    }
}

/// A non-linearity, with its slopes if it has learned ones.
pub(super) fn activate(b: &mut Builder, activation: Activation, x: ValueId) -> Result<ValueId> {
    b.within("act_fn", |b| {
        let mut operands = vec![x];
        if activation == Activation::Xielu {
            operands.extend(["alpha_p", "alpha_n"].map(|name| b.parameter(name, [1], Kind::Real)));
            operands.extend(["beta", "eps"].map(|name| b.parameter(name, [], Kind::Real)));
        }
        b.emit("Activate", Composite::Activate(activation), &operands)
    })
}

/// Routed experts, plus whatever sees every token beside them. The router may read something else than they do.
pub(super) fn moe(b: &mut Builder, spec: &Moe, x: ValueId, routed: ValueId) -> Result<ValueId> {
    check_sparsemixer(spec)?;
    let mut operands = vec![x, router(b, spec, routed)?];
    if spec.routing.correction_bias {
        let width = spec.experts + spec.routing.identity_experts;
        operands.push(b.within("gate", |b| b.parameter("e_score_correction_bias", [width], Kind::Full)));
    }
    if spec.routing.expert_scale {
        operands.push(b.within("gate", |b| b.parameter("per_expert_scale", [spec.experts], Kind::Full)));
    }
    b.within("experts", |b| experts(b, spec, x, &mut operands));
    let op = MoeOp {
        experts: spec.experts,
        top_k: spec.top_k,
        intermediate_size: spec.expert.intermediate_size,
        activation: spec.expert.activation,
        gated: spec.expert.gated,
        bias: spec.expert.bias,
        weigh_input: spec.weigh_input,
        routing: spec.routing.clone(),
    };
    let mut y = b.within("experts", |b| b.emit("Moe", Composite::Moe(op), &operands))?;
    if let Some(shared) = &spec.shared {
        let shared = shared_expert(b, shared, x)?;
        y = b.emit("AddShared", Composite::Add, &[y, shared])?;
    }
    if let Some(dense) = &spec.dense {
        let dense = mlp(b, dense, x)?;
        y = b.emit("AddDense", Composite::Add, &[y, dense])?;
    }
    if spec.output_bias {
        let bias = b.parameter("bias", [b.width(x)], Kind::Real);
        y = b.emit("AddBias", Composite::Add, &[y, bias])?;
    }
    Ok(y)
}

/// Sparsemixer chooses two experts and weighs them itself: what other routings do behind that it would not do.
fn check_sparsemixer(spec: &Moe) -> Result<()> {
    let routing = &spec.routing;
    #[expect(clippy::float_cmp, reason = "one is what a template without the key says")]
    let plain = spec.top_k == 2
        && routing.scale == 1.0
        && !routing.normalize
        && !routing.correction_bias
        && routing.groups.is_none();
    if plain || !matches!(routing.score, Score::Sparsemixer { .. }) {
        return Ok(());
    }
    Err(Error::new(Code::SpecInvalid, "moe.routing")
        .found(format!("sparsemixer with {} experts for a token, and {routing:?}", spec.top_k))
        .expected("two experts for a token, and nothing behind the choice"))
}

/// The router decides in float32 whatever the computation's type is: a rounded logit chooses another expert.
fn router(b: &mut Builder, spec: &Moe, mut x: ValueId) -> Result<ValueId> {
    if let Some(norm) = &spec.routing.norm {
        x = b.within("gate", |b| b.norm(norm, x))?;
    }
    if let Some(scale) = spec.routing.input_scale {
        x = b.within("gate", |b| b.emit("InputScale", Composite::Scale(scale), &[x]))?;
    }
    let full = b.within("gate", |b| b.emit("Convert", Composite::Convert(Kind::Full), &[x]))?;
    b.linear("gate", full, spec.experts + spec.routing.identity_experts, spec.routing.bias)
}

/// Weights of all experts, each followed by its bias.
fn experts(b: &mut Builder, spec: &Moe, x: ValueId, operands: &mut Vec<ValueId>) {
    let (experts, inner, hidden) = (spec.experts, spec.expert.intermediate_size, b.width(x));
    let mut projection = |name: &str, out: usize, width: usize| {
        operands.push(b.parameter(&format!("{name}.weight"), [experts, out, width], Kind::Real));
        if spec.expert.bias {
            operands.push(b.parameter(&format!("{name}.bias"), [experts, out], Kind::Real));
        }
    };
    if spec.expert.gated {
        projection("gate_proj", inner, hidden);
    }
    projection("up_proj", inner, hidden);
    projection("down_proj", hidden, inner);
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
