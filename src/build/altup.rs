//! Alternating updates: several residual streams, `[B, S, N * H]`, of which a layer computes one.
//!
//! ```text
//! streams ─ predict ─┬ active ─ layer ─ computed ┐
//!                    └───────────────────────────┴ correct ─ streams
//! ```

use super::layer::{self, Stream};
use super::{Builder, Built, Composite, Context, Kind, per_layer};
use crate::error::Result;
use crate::graph::{Dim, ValueId};
use crate::spec::{AltUp, Layer};

/// Streams from the embedding: itself, and projections of it with its magnitude.
pub(super) fn spread(b: &mut Builder, spec: &AltUp, embedded: ValueId) -> Result<ValueId> {
    let hidden = b.width(embedded);
    let mut streams = vec![embedded];
    for i in 1..spec.inputs {
        let projected = b.linear(&format!("altup_projections.{}", i - 1), embedded, hidden, false)?;
        streams.push(b.emit("Magnitude", Composite::MatchMagnitude, &[projected, embedded])?);
    }
    b.emit("Streams", Composite::Concat, &streams)
}

/// The mean of the streams, each projected and with the magnitude of the first.
pub(super) fn merge(b: &mut Builder, spec: &AltUp, streams: ValueId) -> Result<ValueId> {
    let hidden = b.width(streams) / spec.inputs.max(1);
    let first = stream(b, streams, 0, hidden)?;
    let mut sum = first;
    for i in 1..spec.inputs {
        let own = stream(b, streams, i, hidden)?;
        let projected = b.linear(&format!("altup_unembed_projections.{}", i - 1), own, hidden, false)?;
        let matched = b.emit("Magnitude", Composite::MatchMagnitude, &[projected, first])?;
        sum = b.emit("StreamSum", Composite::Add, &[sum, matched])?;
    }
    b.emit("StreamMean", Composite::Scale(1.0 / f64::from(u32::try_from(spec.inputs).unwrap_or(1))), &[sum])
}

/// A layer between prediction and correction.
pub(super) fn layer(
    b: &mut Builder,
    spec: &AltUp,
    layer: &Layer,
    streams: &mut Stream,
    context: &Context,
) -> Result<Built> {
    let before = streams.value(b)?;
    let hidden = b.width(before) / spec.inputs.max(1);
    let predicted = b.within("altup", |b| predict(b, spec, before, hidden))?;
    let active = b.within("altup", |b| stream(b, predicted, spec.active, hidden))?;
    let mut inner = Stream::new(active);
    // The per-layer embedding goes to the streams that the layer does not compute.
    let built = layer::build(b, layer, &mut inner, &Context { per_layer: None, ..*context })?;
    let computed = inner.value(b)?;
    let mut corrected = b.within("altup", |b| correct(b, spec, predicted, active, computed))?;
    if let Some((own, part)) = context.per_layer {
        let mut read = b.within("altup", |b| stream(b, corrected, spec.active, hidden))?;
        if spec.correct_scale {
            let scale = b.within("altup", |b| b.parameter("correct_output_scale", [hidden], Kind::Real));
            read = b.emit("CorrectScale", Composite::Multiply, &[read, scale])?;
        }
        let delta = per_layer::delta(b, own, read, part)?;
        corrected = b.within("altup", |b| add_to_rest(b, spec, corrected, delta))?;
    }
    streams.replace(corrected);
    Ok(built)
}

/// `C · streams + streams`, `C` chosen by the active stream.
fn predict(b: &mut Builder, spec: &AltUp, streams: ValueId, hidden: usize) -> Result<ValueId> {
    let active = stream(b, streams, spec.active, hidden)?;
    let modalities = modalities(b, spec, active)?;
    let coefficients = b.linear("prediction_coefs", modalities, spec.inputs * spec.inputs, false)?;
    let coefficients = apart(b, coefficients, spec.inputs)?;
    let flat = b.shape(streams).to_vec();
    let streams_apart = apart(b, streams, spec.inputs)?;
    let mixed = b.emit("Predicted", Composite::MatMul, &[coefficients, streams_apart])?;
    // [B, S, N, H] -> [B, S, N * H]
    let mixed = b.emit("PredictedFlat", Composite::Reshape(flat), &[mixed])?;
    b.emit("Prediction", Composite::Add, &[mixed, streams])
}

/// `predicted + (computed − active) · (1 + c)`, `c` chosen by the computed stream.
fn correct(b: &mut Builder, spec: &AltUp, predicted: ValueId, active: ValueId, computed: ValueId) -> Result<ValueId> {
    let modalities = modalities(b, spec, computed)?;
    let coefficients = b.linear("correction_coefs", modalities, spec.inputs, false)?;
    // [B, S, N] -> [B, S, N, 1]
    let coefficients = apart(b, coefficients, spec.inputs)?;
    let innovation = b.emit("Innovation", Composite::Subtract, &[computed, active])?;
    // [B, S, H] -> [B, S, 1, H]
    let innovation = apart(b, innovation, 1)?;
    let share = b.emit("Correction", Composite::Multiply, &[coefficients, innovation])?;
    let share = b.emit("Correction", Composite::Add, &[share, innovation])?;
    let flat = b.shape(predicted).to_vec();
    // [B, S, N, H] -> [B, S, N * H]
    let share = b.emit("CorrectionFlat", Composite::Reshape(flat), &[share])?;
    b.emit("Corrected", Composite::Add, &[predicted, share])
}

/// `tanh(router(norm(x) / H))`
fn modalities(b: &mut Builder, spec: &AltUp, x: ValueId) -> Result<ValueId> {
    let width = f64::from(u32::try_from(b.width(x)).unwrap_or(u32::MAX));
    let normed = b.norm(&spec.norm, x)?;
    let scaled = b.emit("RouterScale", Composite::Scale(1.0 / width), &[normed])?;
    let routed = b.linear("modality_router", scaled, spec.inputs, false)?;
    b.emit("Modalities", Composite::Tanh, &[routed])
}

/// Adds to every stream but the first.
fn add_to_rest(b: &mut Builder, spec: &AltUp, streams: ValueId, delta: ValueId) -> Result<ValueId> {
    let (hidden, width) = (b.width(delta), b.width(streams));
    if spec.inputs < 2 {
        return Ok(streams);
    }
    let first = b.emit("First", Composite::Slice(0, hidden), &[streams])?;
    let rest = b.emit("Rest", Composite::Slice(hidden, width), &[streams])?;
    let flat = b.shape(rest).to_vec();
    let rest = apart(b, rest, spec.inputs - 1)?;
    let delta = apart(b, delta, 1)?;
    let rest = b.emit("Rest", Composite::Add, &[rest, delta])?;
    // [B, S, N - 1, H] -> [B, S, (N - 1) * H]
    let rest = b.emit("Rest", Composite::Reshape(flat), &[rest])?;
    b.emit("Streams", Composite::Concat, &[first, rest])
}

fn stream(b: &mut Builder, streams: ValueId, index: usize, hidden: usize) -> Result<ValueId> {
    b.emit("Stream", Composite::Slice(index * hidden, (index + 1) * hidden), &[streams])
}

/// `[B, S, N * W]` -> `[B, S, N, W]`
fn apart(b: &mut Builder, x: ValueId, count: usize) -> Result<ValueId> {
    let width = b.width(x) / count.max(1);
    let mut shape = b.shape(x).to_vec();
    shape.pop();
    shape.extend([Dim::from(count), Dim::from(width)]);
    b.emit("Apart", Composite::Reshape(shape), &[x])
}
