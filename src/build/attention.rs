//! Self-attention: projections, rotation, the attention itself, and the output projection.
//!
//! ```text
//! x ── q_proj ── rotate ──┐
//!   ├─ k_proj ── rotate ──┼── Attention(past, mask) ── o_proj
//!   └─ v_proj ────────────┘
//! ```

use super::mixture::{self, Chosen};
use super::op::{AttentionOp, Composite, Kind};
use super::{Builder, Context, Inputs, NormOp, indexer};
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, ValueId};
use crate::spec::{Attention, Differential, Norm, NormKind, NormSpan, OutputGate, Projection, Rope};

/// What an attention leaves.
pub(super) struct Attended {
    pub(super) output: ValueId,
    /// Its present states.
    pub(super) presents: Vec<ValueId>,
    /// The keys that its indexer chose.
    pub(super) index: Option<ValueId>,
}

/// What the hidden states are projected to.
struct Projected {
    query: ValueId,
    /// Key and value; none where another layer's are read.
    cached: Option<(ValueId, ValueId)>,
    /// The query's low-rank form, which an indexer reads.
    latent: Option<ValueId>,
    /// The experts that made the query.
    chosen: Option<Chosen>,
}

/// Builds the attention of a layer on its normalised input.
pub(super) fn build(b: &mut Builder, spec: &Attention, x: ValueId, context: &Context) -> Result<Attended> {
    let (inputs, hidden) = (context.inputs, b.width(x));
    let mut projected = match &spec.projection {
        Projection::Separate { .. } => separate(b, spec, x, inputs)?,
        Projection::Latent { .. } => latent(b, spec, x, inputs)?,
    };
    if let Some(scale) = spec.position_scale {
        let scale =
            b.emit("PositionScale", Composite::PositionScale(scale), &[inputs.position_ids, inputs.attention_mask])?;
        projected.query = b.emit("Query", Composite::Multiply, &[projected.query, scale])?;
    }
    let index = match &spec.indexer {
        Some(own) => {
            let latent = projected.latent.unwrap_or(x);
            Some(b.within("indexer", |b| indexer::build(b, spec, own, (x, latent), context))?)
        }
        None => None,
    };
    let (mut mixed, mut presents) = attend(b, spec, &projected, index.map(|(index, _)| index), context)?;
    presents.extend(index.and_then(|(_, present)| present));
    if let Some(differential) = spec.differential {
        mixed = difference(b, spec, differential, mixed)?;
    }
    if let Some(gate) = &spec.output_gate {
        mixed = gated(b, spec, gate, mixed, x)?;
    }
    if let Some(norm) = &spec.output_norm {
        mixed = b.norm(norm, mixed)?;
    }
    let output = match (spec.mixture, projected.chosen) {
        (Some(own), Some(chosen)) => mixture::output(b, spec, own, (mixed, hidden), chosen)?,
        _ => b.linear("o_proj", mixed, hidden, spec.output_bias)?,
    };
    Ok(Attended { output, presents, index: index.map(|(index, _)| index) })
}

/// The attention itself, on the layer's own cache or on another's; returns present key and value if they are its own.
fn attend(
    b: &mut Builder,
    spec: &Attention,
    projected: &Projected,
    index: Option<ValueId>,
    context: &Context,
) -> Result<(ValueId, Vec<ValueId>)> {
    let missing = || Error::new(Code::SpecInvalid, "attention").found("no keys and values to read");
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
        shared: projected.cached.is_none(),
        bias: index.is_some(),
    };
    let mut operands = vec![projected.query];
    if let Some((key, value)) = projected.cached {
        operands.extend([key, value]);
        operands.extend(context.pasts.get(..2).ok_or_else(missing)?);
    } else {
        let present = spec.shares.and_then(|layer| context.presents.get(layer)).and_then(|p| p.get(..2));
        operands.extend(present.ok_or_else(missing)?);
    }
    operands.push(context.inputs.attention_mask);
    if spec.sinks {
        operands.push(b.parameter("sinks", [spec.heads], Kind::Real));
    }
    operands.extend(index);
    if op.shared {
        return Ok((b.emit("Attention", Composite::Attention(op), &operands)?, Vec::new()));
    }
    let names = ["Attention", "PresentKey", "PresentValue"];
    let [mixed, key, value] = b.emit_named(names, Composite::Attention(op), &operands)?;
    Ok((mixed, vec![key, value]))
}

fn separate(b: &mut Builder, spec: &Attention, x: ValueId, inputs: &Inputs) -> Result<Projected> {
    let Projection::Separate { query_bias, .. } = spec.projection else {
        return latent(b, spec, x, inputs);
    };
    let (query, chosen) = match spec.mixture {
        Some(_) if query_bias => {
            return Err(contradiction("query_bias", "experts that project queries have no biases"));
        }
        Some(own) => mixture::queries(b, spec, own, x).map(|(query, chosen)| (query, Some(chosen)))?,
        None => (b.linear("q_proj", x, spec.heads * spec.key_size, query_bias)?, None),
    };
    let norm = spec.qk_norm.as_ref().map(|norm| (&norm.query, norm.span, norm.after_rope));
    let query = positioned(b, spec, norm, ["ClipQuery", "q_rotary"], (query, spec.heads), inputs)?;
    let cached = match spec.shares {
        Some(_) => None,
        None => Some(keys_and_values(b, spec, x, inputs)?),
    };
    Ok(Projected { query, cached, latent: None, chosen })
}

fn keys_and_values(b: &mut Builder, spec: &Attention, x: ValueId, inputs: &Inputs) -> Result<(ValueId, ValueId)> {
    let Projection::Separate { key_bias, value_bias, .. } = spec.projection else {
        return Err(Error::new(Code::SpecInvalid, "attention").found("latent keys without a latent"));
    };
    // A value of differential attention is a pair of heads, each of which is projected once.
    let value_size = if spec.differential.is_some() { spec.value_size / 2 } else { spec.value_size };
    let key = b.linear("k_proj", x, spec.kv_heads * spec.key_size, key_bias)?;
    let mut value =
        if spec.keys_as_values { key } else { b.linear("v_proj", x, spec.kv_heads * value_size, value_bias)? };
    let norm = spec.qk_norm.as_ref().map(|norm| (&norm.key, norm.span, norm.after_rope));
    let key = positioned(b, spec, norm, ["ClipKey", "k_rotary"], (key, spec.kv_heads), inputs)?;
    if let Some(bound) = spec.clip {
        value = b.emit("ClipValue", Composite::Clip(bound), &[value])?;
    }
    if let Some(norm) = &spec.value_norm {
        value = spanned(b, norm, NormSpan::Head, value, spec.kv_heads)?;
    }
    if let Some(scale) = spec.value_scale {
        value = b.emit("ValueScale", Composite::Scale(scale), &[value])?;
    }
    if spec.differential.is_some() {
        value = b.within("v_proj", |b| pairs(b, spec, value, value_size))?;
    }
    Ok((key, value))
}

/// Queries or keys, normalised, clamped and rotated.
fn positioned(
    b: &mut Builder,
    spec: &Attention,
    norm: Option<(&Norm, NormSpan, bool)>,
    [clip, rotary]: [&str; 2],
    (mut x, heads): (ValueId, usize),
    inputs: &Inputs,
) -> Result<ValueId> {
    if let Some((norm, span, false)) = norm {
        x = spanned(b, norm, span, x, heads)?;
    }
    if let Some(bound) = spec.clip {
        x = b.emit(clip, Composite::Clip(bound), &[x])?;
    }
    x = rotate(b, rotary, spec.rope.as_ref(), x, heads, inputs.position_ids)?;
    match norm {
        Some((norm, span, true)) => spanned(b, norm, span, x, heads),
        _ => Ok(x),
    }
}

/// Value heads of differential attention: head `j` is head `j mod K/2` and the one `K/2` behind it.
fn pairs(b: &mut Builder, spec: &Attention, value: ValueId, size: usize) -> Result<ValueId> {
    let half = spec.kv_heads / 2;
    let first = b.emit("First", Composite::Slice(0, half * size), &[value])?;
    let second = b.emit("Second", Composite::Slice(half * size, 2 * half * size), &[value])?;
    // [B, S, K/2 * D] twice -> [B, S, K/2, 2 * D] -> [B, S, K * D], and that twice
    let (first, second) = (by_head(b, first, half, size)?, by_head(b, second, half, size)?);
    let both = b.emit("Pairs", Composite::Concat, &[first, second])?;
    let both = flat(b, "", both, 2 * half * size)?;
    b.emit("Values", Composite::Concat, &[both, both])
}

/// `norm(A₁ − λ A₂) · (1 − lambda_init)`, `A₁` of the first half of the heads and `A₂` of the second.
fn difference(b: &mut Builder, spec: &Attention, own: Differential, mixed: ValueId) -> Result<ValueId> {
    let width = spec.heads / 2 * spec.value_size;
    let first = b.emit("First", Composite::Slice(0, width), &[mixed])?;
    let second = b.emit("Second", Composite::Slice(width, 2 * width), &[mixed])?;
    let exponential = |b: &mut Builder, query: &str, key: &str| {
        let factors = [query, key].map(|name| b.parameter(name, [spec.key_size], Kind::Real));
        let product = b.emit("Lambda", Composite::Multiply, &factors)?;
        let sum = b.emit("Lambda", Composite::Sum, &[product])?;
        b.emit("Lambda", Composite::Exp, &[sum])
    };
    let (plus, minus) = (exponential(b, "lambda_q1", "lambda_k1")?, exponential(b, "lambda_q2", "lambda_k2")?);
    let learned = b.emit("Lambda", Composite::Subtract, &[plus, minus])?;
    let learned = b.emit("LearnedShare", Composite::Multiply, &[second, learned])?;
    let initial = b.emit("InitialShare", Composite::Scale(own.lambda_init), &[second])?;
    let rest = b.emit("Difference", Composite::Subtract, &[first, learned])?;
    let rest = b.emit("Difference", Composite::Subtract, &[rest, initial])?;
    let norm = NormOp { kind: NormKind::Rms, eps: own.eps, weight: false, bias: false, offset: false };
    // [B, S, N/2 * 2D] -> [B, S, N/2, 2D] -> [B, S, N * D]
    let rest = by_head(b, rest, spec.heads / 2, spec.value_size)?;
    let rest = b.emit("Norm", Composite::Norm(norm), &[rest])?;
    let rest = flat(b, "", rest, width)?;
    b.emit("Scale", Composite::Scale(1.0 - own.lambda_init), &[rest])
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
fn latent(b: &mut Builder, spec: &Attention, x: ValueId, inputs: &Inputs) -> Result<Projected> {
    let Projection::Latent { query_rank, kv_rank, rope_size, bias, norm_eps, query_scale, kv_scale } = spec.projection
    else {
        return separate(b, spec, x, inputs);
    };
    if spec.keys_as_values {
        return Err(contradiction("keys_as_values", "keys and values of a latent come from one projection anyway"));
    }
    let (heads, nope) = (spec.heads, spec.key_size.saturating_sub(rope_size));
    let norm = NormOp { kind: NormKind::Rms, eps: norm_eps, weight: true, bias: false, offset: false };
    let (mut query, latent) = match query_rank {
        None => (b.linear("q_proj", x, heads * spec.key_size, false)?, None),
        Some(rank) => {
            let low = b.linear("q_a_proj", x, rank, bias)?;
            let low = latent_norm(b, "q_a_layernorm", norm, low)?;
            (b.linear("q_b_proj", low, heads * spec.key_size, false)?, Some(low))
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
    Ok(Projected { query, cached: Some((key, value)), latent, chosen: None })
}

/// Two mechanisms that exclude each other.
fn contradiction(field: &str, reason: &str) -> Error {
    Error::new(Code::SpecInvalid, format!("attention.{field}")).found(true).expected(format!("false: {reason}"))
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
