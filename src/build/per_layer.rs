//! Per-layer embeddings: a second table of tokens, and what each layer adds of it.
//!
//! ```text
//! ids ─ table · token_scale ─────────────────────┐
//! embedded ─ projection · scale ─ norm per layer ─┴ sum · scale [B, S, L * P] ─ part of the layer [B, S, P]
//! x ─ gate ─ act ─ times the part ─ up ─ norm
//! ```

use super::feed_forward::activate;
use super::{Builder, Composite, Kind};
use crate::error::Result;
use crate::graph::{Dim, ValueId};
use crate::spec::{ModelSpec, PerLayer};

/// The parts of all layers, `[B, S, L * P]`.
pub(super) fn embed(b: &mut Builder, spec: &ModelSpec, ids: ValueId, embedded: ValueId) -> Result<Option<ValueId>> {
    let Some(own) = &spec.per_layer else { return Ok(None) };
    let (layers, width) = (spec.layers.len(), spec.layers.len() * own.size);
    let tokens = b.within("embed_tokens_per_layer", |b| {
        let ids = if own.rows < spec.vocab_size { b.emit("Ids", Composite::IdsBelow(own.rows), &[ids])? } else { ids };
        let table = b.parameter("weight", [own.rows, width], Kind::Real);
        let tokens = b.emit("Embed", Composite::Embed, &[ids, table])?;
        b.emit("Scale", Composite::Scale(own.token_scale), &[tokens])
    })?;
    let projected = b.linear("per_layer_model_projection", embedded, width, false)?;
    // [B, S, L * P] -> [B, S, L, P]
    let flat = b.shape(tokens).to_vec();
    let mut apart = flat.clone();
    apart.pop();
    apart.extend([Dim::from(layers), Dim::from(own.size)]);
    let projected = b.within("per_layer_model_projection", |b| {
        let projected = b.emit("Scale", Composite::Scale(own.projection_scale), &[projected])?;
        b.emit("ByLayer", Composite::Reshape(apart), &[projected])
    })?;
    let normed = b.norm(&own.norm, projected)?;
    // [B, S, L, P] -> [B, S, L * P]
    let normed = b.emit("PerLayerFlat", Composite::Reshape(flat), &[normed])?;
    let sum = b.emit("PerLayerSum", Composite::Add, &[normed, tokens])?;
    b.emit("PerLayer", Composite::Scale(own.scale), &[sum]).map(Some)
}

/// A layer's part, `[B, S, P]`.
pub(super) fn part<'s>(
    b: &mut Builder,
    spec: &'s ModelSpec,
    parts: Option<ValueId>,
    layer: usize,
) -> Result<Option<(&'s PerLayer, ValueId)>> {
    let Some((own, parts)) = spec.per_layer.as_ref().zip(parts) else { return Ok(None) };
    let part = Composite::Slice(layer * own.size, (layer + 1) * own.size);
    let part = b.within(&format!("layers.{layer}"), |b| b.emit("PerLayerInput", part, &[parts]))?;
    Ok(Some((own, part)))
}

/// What a layer adds: `norm(up(act(gate(x)) · part))`.
pub(super) fn delta(b: &mut Builder, own: &PerLayer, x: ValueId, part: ValueId) -> Result<ValueId> {
    let hidden = b.width(x);
    let gate = b.linear("per_layer_input_gate", x, own.size, false)?;
    let gate = b.within("per_layer_input_gate", |b| activate(b, own.activation, gate))?;
    let gated = b.emit("PerLayerGated", Composite::Multiply, &[gate, part])?;
    let up = b.linear("per_layer_projection", gated, hidden, false)?;
    b.norm(&own.output_norm, up)
}
