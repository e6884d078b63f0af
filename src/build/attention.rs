//! Self-attention: projections, rotation, the attention itself, and the output projection.
//!
//! ```text
//! x ── q_proj ── rotate ──┐
//!   ├─ k_proj ── rotate ──┼── Attention(past, mask) ── o_proj
//!   └─ v_proj ────────────┘
//! ```

use super::op::{AttentionOp, Composite, Kind};
use super::{Builder, Inputs, NormOp};
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, ValueId};
use crate::spec::{Attention, Norm, NormKind, NormSpan, OutputGate, Projection, Rope};

/// Builds the attention of a layer on its normalised input; returns the output and the present cache.
pub(super) fn build(
    b: &mut Builder,
    spec: &Attention,
    x: ValueId,
    inputs: &Inputs,
    (past_key, past_value): (ValueId, ValueId),
) -> Result<(ValueId, (ValueId, ValueId))> {
    let hidden = b.width(x);
    let [mut query, key, value] = match &spec.projection {
        Projection::Separate { .. } => separate(b, spec, x, inputs)?,
        Projection::Latent { .. } => latent(b, spec, x, inputs)?,
    };
    if let Some(scale) = spec.position_scale {
        let scale =
            b.emit("PositionScale", Composite::PositionScale(scale), &[inputs.position_ids, inputs.attention_mask])?;
        query = b.emit("Query", Composite::Multiply, &[query, scale])?;
    }
    let op = AttentionOp {
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        key_size: spec.key_size,
        value_size: spec.value_size,
        scale: spec.scale,
        window: spec.window,
        chunk: spec.chunk,
        softcap: spec.softcap,
        sinks: spec.sinks,
        alibi: spec.alibi,
    };
    let mut operands = vec![query, key, value, past_key, past_value, inputs.attention_mask];
    if spec.sinks {
        operands.push(b.parameter("sinks", [spec.heads], Kind::Real));
    }
    let names = ["Attention", "PresentKey", "PresentValue"];
    let [mut mixed, present_key, present_value] = b.emit_named(names, Composite::Attention(op), &operands)?;
    if let Some(gate) = &spec.output_gate {
        mixed = gated(b, spec, gate, mixed, x)?;
    }
    if let Some(norm) = &spec.output_norm {
        mixed = b.norm(norm, mixed)?;
    }
    let output = b.linear("o_proj", mixed, hidden, spec.output_bias)?;
    Ok((output, (present_key, present_value)))
}

fn separate(b: &mut Builder, spec: &Attention, x: ValueId, inputs: &Inputs) -> Result<[ValueId; 3]> {
    let Projection::Separate { query_bias, key_bias, value_bias } = spec.projection else {
        return latent(b, spec, x, inputs);
    };
    let mut query = b.linear("q_proj", x, spec.heads * spec.key_size, query_bias)?;
    let mut key = b.linear("k_proj", x, spec.kv_heads * spec.key_size, key_bias)?;
    let mut value = b.linear("v_proj", x, spec.kv_heads * spec.value_size, value_bias)?;
    let before = spec.qk_norm.as_ref().filter(|norm| !norm.after_rope);
    if let Some(norm) = before {
        query = spanned(b, &norm.query, norm.span, query, spec.heads)?;
        key = spanned(b, &norm.key, norm.span, key, spec.kv_heads)?;
    }
    if let Some(bound) = spec.clip {
        query = b.emit("ClipQuery", Composite::Clip(bound), &[query])?;
        key = b.emit("ClipKey", Composite::Clip(bound), &[key])?;
        value = b.emit("ClipValue", Composite::Clip(bound), &[value])?;
    }
    query = rotate(b, "q_rotary", spec.rope.as_ref(), query, spec.heads, inputs.position_ids)?;
    key = rotate(b, "k_rotary", spec.rope.as_ref(), key, spec.kv_heads, inputs.position_ids)?;
    let after = spec.qk_norm.as_ref().filter(|norm| norm.after_rope);
    if let Some(norm) = after {
        query = spanned(b, &norm.query, norm.span, query, spec.heads)?;
        key = spanned(b, &norm.key, norm.span, key, spec.kv_heads)?;
    }
    if let Some(norm) = &spec.value_norm {
        value = spanned(b, norm, NormSpan::Head, value, spec.kv_heads)?;
    }
    if let Some(scale) = spec.value_scale {
        value = b.emit("ValueScale", Composite::Scale(scale), &[value])?;
    }
    Ok([query, key, value])
}

/// A norm on queries or keys `[B, S, N * D]`.
fn spanned(b: &mut Builder, norm: &Norm, span: NormSpan, x: ValueId, heads: usize) -> Result<ValueId> {
    let width = b.width(x);
    let size = width / heads.max(1);
    match span {
        NormSpan::Full => b.norm(norm, x),
        NormSpan::Head => {
            let x = b.within(&norm.name, |b| by_head(b, x, heads, size))?;
            let x = b.norm(norm, x)?;
            flat(b, &norm.name, x, width)
        }
        NormSpan::EachHead if norm.offset => Err(Error::new(Code::SpecInvalid, &norm.name)
            .found("a weight for each head that is stored as its difference from one")
            .expected("no model has both")),
        NormSpan::EachHead => b.within(&norm.name, |b| {
            let x = by_head(b, x, heads, size)?;
            let bare = NormOp { weight: false, bias: false, offset: false, ..NormOp::from(norm) };
            let mut x = b.emit("Norm", Composite::Norm(bare), &[x])?;
            if norm.weight {
                let weight = b.parameter("weight", [heads, size], Kind::Real);
                let weighed = b.emit("Weight", Composite::Multiply, &[x, weight])?;
                x = if norm.offset { b.emit("Offset", Composite::Add, &[weighed, x])? } else { weighed };
            }
            if norm.bias {
                let bias = b.parameter("bias", [heads, size], Kind::Real);
                x = b.emit("Bias", Composite::Add, &[x, bias])?;
            }
            flat(b, "", x, width)
        }),
    }
}

/// Multiplies the output by a sigmoid of a projection of the input.
fn gated(b: &mut Builder, spec: &Attention, gate: &OutputGate, mixed: ValueId, x: ValueId) -> Result<ValueId> {
    let width = spec.heads * spec.value_size;
    let gates = b.linear(&gate.name, x, if gate.per_head { spec.heads } else { width }, gate.bias)?;
    let gates = b.emit("Gate", Composite::Sigmoid, &[gates])?;
    if !gate.per_head {
        return b.emit("Gated", Composite::Multiply, &[mixed, gates]);
    }
    // [B, S, N * D] as [B, S, N, D], times [B, S, N, 1]
    let mixed = by_head(b, mixed, spec.heads, spec.value_size)?;
    let gates = by_head(b, gates, spec.heads, 1)?;
    let mixed = b.emit("Gated", Composite::Multiply, &[mixed, gates])?;
    flat(b, "", mixed, width)
}

fn rotate(
    b: &mut Builder,
    name: &str,
    rope: Option<&Rope>,
    x: ValueId,
    heads: usize,
    positions: ValueId,
) -> Result<ValueId> {
    let Some(rope) = rope else { return Ok(x) };
    let (cos, sin) = b.rope_table(rope, positions)?;
    let op = Composite::Rotate { heads, size: rope.size, layout: rope.layout };
    b.within(name, |b| b.emit("Rotate", op, &[x, cos, sin]))
}

/// Multi-head latent attention, after `DeepseekV3Attention`. The cache holds full keys and values.
///
/// ```text
/// x ─ q_a_proj ─ norm ─ q_b_proj ─┬ [B, S, N, nope] ─────────── concat ─ q [B, S, N * (nope + rope)]
///                                 └ [B, S, N, rope] ─ rotate ──┘
/// x ─ kv_a_proj ─┬ latent ─ norm ─ kv_b_proj ─┬ [B, S, N, nope] ─ concat ─ k
///                │                            └ [B, S, N, value] ────────── v
///                └ [B, S, rope] ─ rotate ─ expand to N heads ────┘
/// ```
fn latent(b: &mut Builder, spec: &Attention, x: ValueId, inputs: &Inputs) -> Result<[ValueId; 3]> {
    let Projection::Latent { query_rank, kv_rank, rope_size, bias, norm_eps, query_scale, kv_scale } = spec.projection
    else {
        return separate(b, spec, x, inputs);
    };
    let (heads, nope) = (spec.heads, spec.key_size.saturating_sub(rope_size));
    let norm = NormOp { kind: NormKind::Rms, eps: norm_eps, weight: true, bias: false, offset: false };
    let mut query = match query_rank {
        None => b.linear("q_proj", x, heads * spec.key_size, false)?,
        Some(rank) => {
            let low = b.linear("q_a_proj", x, rank, bias)?;
            let low = latent_norm(b, "q_a_layernorm", norm, low)?;
            b.linear("q_b_proj", low, heads * spec.key_size, false)?
        }
    };
    if let Some(scale) = query_scale {
        query = b.emit("QueryScale", Composite::Scale(scale), &[query])?;
    }
    let query = by_head(b, query, heads, spec.key_size)?;
    let (query_nope, query_rope) =
        b.emit_pair(["QueryNope", "QueryRope"], Composite::Split(vec![nope, rope_size]), &[query])?;
    let query_rope = rotate_heads(b, "q_rotary", spec, query_rope, heads, inputs)?;
    let query = b.emit("Query", Composite::Concat, &[query_nope, query_rope])?;
    let query = flat(b, "Query", query, heads * spec.key_size)?;

    let low = b.linear("kv_a_proj_with_mqa", x, kv_rank + rope_size, bias)?;
    let (low, key_rope) = b.emit_pair(["Latent", "KeyRope"], Composite::Split(vec![kv_rank, rope_size]), &[low])?;
    let mut low = latent_norm(b, "kv_a_layernorm", norm, low)?;
    if let Some(scale) = kv_scale {
        low = b.emit("LatentScale", Composite::Scale(scale), &[low])?;
    }
    let both = b.linear("kv_b_proj", low, heads * (nope + spec.value_size), false)?;
    let both = by_head(b, both, heads, nope + spec.value_size)?;
    let (key_nope, value) =
        b.emit_pair(["KeyNope", "Value"], Composite::Split(vec![nope, spec.value_size]), &[both])?;
    let key_rope = rotate(b, "k_rotary", spec.rope.as_ref(), key_rope, 1, inputs.position_ids)?;
    let key_rope = by_head(b, key_rope, 1, rope_size)?;
    // [B, S, 1, rope] -> [B, S, N, rope]: every head has the same rotated part
    let mut wide = b.shape(key_rope).to_vec();
    if let Some(axis) = wide.get_mut(2) {
        *axis = Dim::from(heads);
    }
    let key_rope = b.emit("KeyRope", Composite::Expand(wide), &[key_rope])?;
    let key = b.emit("Key", Composite::Concat, &[key_nope, key_rope])?;
    let key = flat(b, "Key", key, heads * spec.key_size)?;
    let value = flat(b, "Value", value, heads * spec.value_size)?;
    Ok([query, key, value])
}

fn latent_norm(b: &mut Builder, module: &str, norm: NormOp, x: ValueId) -> Result<ValueId> {
    b.within(module, |b| {
        let width = b.width(x);
        let weight = b.parameter("weight", [width], Kind::Real);
        b.emit("Norm", Composite::Norm(norm), &[x, weight])
    })
}

/// Rotates whole heads `[B, S, N, D]`.
fn rotate_heads(
    b: &mut Builder,
    name: &str,
    spec: &Attention,
    x: ValueId,
    heads: usize,
    inputs: &Inputs,
) -> Result<ValueId> {
    let size = spec.rope.as_ref().map_or(0, |rope| rope.size);
    let x = flat(b, name, x, heads * size)?;
    let x = rotate(b, name, spec.rope.as_ref(), x, heads, inputs.position_ids)?;
    by_head(b, x, heads, size)
}

/// `[B, S, N * D]` -> `[B, S, N, D]`
fn by_head(b: &mut Builder, x: ValueId, heads: usize, size: usize) -> Result<ValueId> {
    let mut shape = b.shape(x).to_vec();
    shape.pop();
    shape.extend([Dim::from(heads), Dim::from(size)]);
    b.emit("ByHead", Composite::Reshape(shape), &[x])
}

/// `[B, S, N, D]` -> `[B, S, N * D]`
fn flat(b: &mut Builder, name: &str, x: ValueId, width: usize) -> Result<ValueId> {
    let mut shape = b.shape(x).to_vec();
    shape.truncate(2);
    shape.push(Dim::from(width));
    b.within(name, |b| b.emit("Flat", Composite::Reshape(shape), &[x]))
}
