//! Self-attention: projections, rotation, the attention itself, and the output projection.
//!
//! ```text
//! x ── q_proj ── rotate ──┐
//!   ├─ k_proj ── rotate ──┼── Attention(past, mask) ── o_proj
//!   └─ v_proj ────────────┘
//! ```

use super::op::{AttentionOp, Composite};
use super::{Builder, Inputs, NormOp};
use crate::error::Result;
use crate::graph::{Dim, ValueId};
use crate::spec::{Attention, NormKind, Projection, Rope};

/// Builds the attention of a layer on its normalised input; returns the output and the present cache.
pub(super) fn build(
    b: &mut Builder,
    spec: &Attention,
    x: ValueId,
    inputs: &Inputs,
    (past_key, past_value): (ValueId, ValueId),
) -> Result<(ValueId, (ValueId, ValueId))> {
    let hidden = b.shape(x).last().and_then(Dim::value).and_then(|w| usize::try_from(w).ok()).unwrap_or(0);
    let [query, key, value] = match &spec.projection {
        Projection::Separate { bias } => separate(b, spec, *bias, x, inputs)?,
        Projection::Latent { .. } => latent(b, spec, x, inputs)?,
    };
    let op = AttentionOp {
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        key_size: spec.key_size,
        value_size: spec.value_size,
        scale: spec.scale,
        window: spec.window,
    };
    let operands = [query, key, value, past_key, past_value, inputs.attention_mask];
    let names = ["Attention", "PresentKey", "PresentValue"];
    let [mixed, present_key, present_value] = b.emit_named(names, Composite::Attention(op), &operands)?;
    let output = b.linear("o_proj", mixed, hidden, spec.output_bias)?;
    Ok((output, (present_key, present_value)))
}

fn separate(b: &mut Builder, spec: &Attention, bias: bool, x: ValueId, inputs: &Inputs) -> Result<[ValueId; 3]> {
    let query = b.linear("q_proj", x, spec.heads * spec.key_size, bias)?;
    let key = b.linear("k_proj", x, spec.kv_heads * spec.key_size, bias)?;
    let value = b.linear("v_proj", x, spec.kv_heads * spec.value_size, bias)?;
    let query = rotate(b, "q_rotary", spec.rope.as_ref(), query, spec.heads, inputs.position_ids)?;
    let key = rotate(b, "k_rotary", spec.rope.as_ref(), key, spec.kv_heads, inputs.position_ids)?;
    Ok([query, key, value])
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
    let Projection::Latent { query_rank, kv_rank, rope_size, bias, norm_eps } = spec.projection else {
        return separate(b, spec, false, x, inputs);
    };
    let (heads, nope) = (spec.heads, spec.key_size.saturating_sub(rope_size));
    let norm = NormOp { kind: NormKind::Rms, eps: norm_eps, offset: false };
    let query = match query_rank {
        None => b.linear("q_proj", x, heads * spec.key_size, false)?,
        Some(rank) => {
            let low = b.linear("q_a_proj", x, rank, bias)?;
            let low = latent_norm(b, "q_a_layernorm", norm, low)?;
            b.linear("q_b_proj", low, heads * spec.key_size, false)?
        }
    };
    let query = by_head(b, query, heads, spec.key_size)?;
    let (query_nope, query_rope) =
        b.emit_pair(["QueryNope", "QueryRope"], Composite::Split(vec![nope, rope_size]), &[query])?;
    let query_rope = rotate_heads(b, "q_rotary", spec, query_rope, heads, inputs)?;
    let query = b.emit("Query", Composite::Concat, &[query_nope, query_rope])?;
    let query = flat(b, "Query", query, heads * spec.key_size)?;

    let low = b.linear("kv_a_proj_with_mqa", x, kv_rank + rope_size, bias)?;
    let (low, key_rope) = b.emit_pair(["Latent", "KeyRope"], Composite::Split(vec![kv_rank, rope_size]), &[low])?;
    let low = latent_norm(b, "kv_a_layernorm", norm, low)?;
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
        let weight = b.norm_weight(x);
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
