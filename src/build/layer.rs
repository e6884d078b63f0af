//! The arrangement of a layer: where it normalises, what it adds to what.

use super::{Builder, Composite, Inputs, Kind, attention, feed_forward};
use crate::error::Result;
use crate::graph::ValueId;
use crate::spec::{Layer, Norm};

/// The residual stream: its value is `residual`, plus `delta` where a part's output waits to be added. The
/// addition is put off until it is known whether a norm follows, so that both can be one operation.
pub(super) struct Stream {
    residual: ValueId,
    delta: Option<ValueId>,
    /// What the sum is to be called.
    pending_name: Option<String>,
}

impl Stream {
    pub(super) fn new(residual: ValueId) -> Self {
        Self { residual, delta: None, pending_name: None }
    }

    /// The value, normalised if there is a norm.
    pub(super) fn normed(&mut self, b: &mut Builder, norm: Option<&Norm>) -> Result<ValueId> {
        let Some(norm) = norm else { return self.value(b) };
        let Some(delta) = self.delta.take() else { return b.norm(norm, self.residual) };
        let (sum, normed) = b.add_norm(norm, self.residual, delta)?;
        self.settle(b, sum);
        Ok(normed)
    }

    /// The value.
    pub(super) fn value(&mut self, b: &mut Builder) -> Result<ValueId> {
        if let Some(delta) = self.delta.take() {
            let sum = b.emit("Add", Composite::Add, &[self.residual, delta])?;
            self.settle(b, sum);
        }
        Ok(self.residual)
    }

    fn settle(&mut self, b: &mut Builder, sum: ValueId) {
        self.residual = sum;
        if let Some(name) = self.pending_name.take() {
            b.name(sum, &name);
        }
    }

    /// Adds a part's output.
    fn add(&mut self, b: &mut Builder, delta: ValueId) -> Result<()> {
        self.value(b)?;
        self.delta = Some(delta);
        Ok(())
    }

    /// Goes on with another value in its place.
    fn replace(&mut self, value: ValueId) {
        *self = Self::new(value);
    }

    /// Names the value, at once or when it comes to be.
    pub(super) fn name(&mut self, b: &mut Builder, name: String) {
        match self.delta {
            Some(_) => self.pending_name = Some(name),
            None => b.name(self.residual, &name),
        }
    }
}

/// Builds a layer onto the stream; returns its present key and value.
pub(super) fn build(
    b: &mut Builder,
    spec: &Layer,
    stream: &mut Stream,
    inputs: &Inputs,
    cache: (ValueId, ValueId),
) -> Result<(ValueId, ValueId)> {
    let norms = &spec.norms;
    let attended = stream.normed(b, norms.attention_input.as_ref())?;
    if spec.normed_residual {
        stream.replace(attended);
    }
    let (mixed, present) = b.within("self_attn", |b| attention::build(b, &spec.attention, attended, inputs, cache))?;
    let mixed = part(b, spec, norms.attention_output.as_ref(), mixed)?;
    let fed = if spec.parallel {
        match &norms.feed_forward_input {
            Some(norm) => stream.normed(b, Some(norm))?,
            None => attended,
        }
    } else {
        stream.add(b, mixed)?;
        if let Some(norm) = &norms.attention_sum {
            let normed = stream.normed(b, Some(norm))?;
            stream.replace(normed);
        }
        let normed = stream.normed(b, norms.feed_forward_input.as_ref())?;
        if spec.normed_residual {
            stream.replace(normed);
        }
        normed
    };
    let delta = b.within("mlp", |b| feed_forward::build(b, &spec.feed_forward, fed))?;
    let mut delta = part(b, spec, norms.feed_forward_output.as_ref(), delta)?;
    if spec.parallel {
        delta = b.emit("Parallel", Composite::Add, &[mixed, delta])?;
    }
    stream.add(b, delta)?;
    if let Some(norm) = &norms.feed_forward_sum {
        let normed = stream.normed(b, Some(norm))?;
        stream.replace(normed);
    }
    if spec.scalar {
        let value = stream.value(b)?;
        let scalar = b.parameter("layer_scalar", [1], Kind::Real);
        let scaled = b.emit("LayerScalar", Composite::Multiply, &[value, scalar])?;
        stream.replace(scaled);
    }
    Ok(present)
}

/// A part's output as it is added to the residual.
fn part(b: &mut Builder, spec: &Layer, norm: Option<&Norm>, x: ValueId) -> Result<ValueId> {
    let x = match norm {
        Some(norm) => b.norm(norm, x)?,
        None => x,
    };
    match spec.residual_scale {
        Some(scale) => b.emit("ResidualScale", Composite::Scale(scale), &[x]),
        None => Ok(x),
    }
}
