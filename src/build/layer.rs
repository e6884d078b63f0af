//! The arrangement of a layer: where it normalises, what it adds to what.

use super::{Builder, Built, Composite, Context, Kind, attention, feed_forward, per_layer};
use crate::error::Result;
use crate::graph::ValueId;
use crate::spec::{Laurel, Layer, MoeBranch, Norm};

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
    pub(super) fn add(&mut self, b: &mut Builder, delta: ValueId) -> Result<()> {
        self.value(b)?;
        self.delta = Some(delta);
        Ok(())
    }

    /// Goes on with another value in its place.
    pub(super) fn replace(&mut self, value: ValueId) {
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

/// Builds a layer onto the stream.
pub(super) fn build(b: &mut Builder, spec: &Layer, stream: &mut Stream, context: &Context) -> Result<Built> {
    let norms = &spec.norms;
    let (attention, feed_forward) = match &spec.modules {
        Some(modules) => (modules.attention.as_str(), modules.feed_forward.as_str()),
        None => ("self_attn", "mlp"),
    };
    let attended = stream.normed(b, norms.attention_input.as_ref())?;
    if spec.normed_residual {
        stream.replace(attended);
    }
    let mixed = b.within(attention, |b| attention::build(b, &spec.attention, attended, context))?;
    let (presents, index) = (mixed.presents, mixed.index);
    let mixed = part(b, spec, norms.attention_output.as_ref(), mixed.output)?;
    let fed = if spec.parallel {
        match &norms.feed_forward_input {
            Some(norm) => stream.normed(b, Some(norm))?,
            None => attended,
        }
    } else {
        stream.add(b, mixed)?;
        if let Some(laurel) = &spec.laurel {
            augment(b, laurel, stream, attended)?;
        }
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
    let shortcut = spec.shortcut.as_ref().map(|moe| b.within("mlp", |b| feed_forward::moe(b, moe, fed, fed)));
    let shortcut = shortcut.transpose()?;
    let mut delta = b.within(feed_forward, |b| feed_forward::build(b, &spec.feed_forward, fed))?;
    if let Some(spec) = &spec.branch {
        let residual = stream.value(b)?;
        delta = branch(b, spec, delta, residual)?;
    }
    let mut delta = part(b, spec, norms.feed_forward_output.as_ref(), delta)?;
    if spec.parallel {
        delta = b.emit("Parallel", Composite::Add, &[mixed, delta])?;
    }
    stream.add(b, delta)?;
    if let Some(shortcut) = context.shortcut {
        stream.add(b, shortcut)?;
    }
    finish(b, spec, stream, context)?;
    Ok(Built { presents, index, shortcut })
}

/// What follows the feed-forward part.
fn finish(b: &mut Builder, spec: &Layer, stream: &mut Stream, context: &Context) -> Result<()> {
    if let Some(norm) = &spec.norms.feed_forward_sum {
        let normed = stream.normed(b, Some(norm))?;
        stream.replace(normed);
    }
    if let Some((per_layer, part)) = context.per_layer {
        let value = stream.value(b)?;
        let delta = per_layer::delta(b, per_layer, value, part)?;
        stream.add(b, delta)?;
    }
    if spec.scalar {
        let value = stream.value(b)?;
        let scalar = b.parameter("layer_scalar", [1], Kind::Real);
        let scaled = b.emit("LayerScalar", Composite::Multiply, &[value, scalar])?;
        stream.replace(scaled);
    }
    Ok(())
}

/// `(stream + y + norm(right(left(y)))) / √2`
fn augment(b: &mut Builder, spec: &Laurel, stream: &mut Stream, y: ValueId) -> Result<()> {
    let width = b.width(y);
    let path = b.within("laurel", |b| {
        let low = b.linear("linear_left", y, spec.rank, false)?;
        let high = b.linear("linear_right", low, width, false)?;
        let normed = b.norm(&spec.norm, high)?;
        b.emit("Add", Composite::Add, &[y, normed])
    })?;
    stream.add(b, path)?;
    let sum = stream.value(b)?;
    let scaled = b.emit("Laurel", Composite::Scale(std::f64::consts::FRAC_1_SQRT_2), &[sum])?;
    stream.replace(scaled);
    Ok(())
}

/// The dense part and the experts, each through its norms, together.
fn branch(b: &mut Builder, spec: &MoeBranch, dense: ValueId, residual: ValueId) -> Result<ValueId> {
    let dense = b.norm(&spec.dense_norm, dense)?;
    let fed = b.norm(&spec.input_norm, residual)?;
    let experts = b.within("moe", |b| feed_forward::moe(b, &spec.moe, fed, residual))?;
    let experts = b.norm(&spec.output_norm, experts)?;
    b.emit("Branches", Composite::Add, &[dense, experts])
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
