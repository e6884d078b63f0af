//! What a checkpoint holds beside its weights: buffers that the model computes, compared with what the specification
//! computes.

use super::values::all;
use crate::describe::Check;
use crate::element::StoredType;
use crate::error::Result;
use crate::lower::frequency_sets;
use crate::read::{Checkpoint, TensorInfo};
use crate::spec::{FeedForward, Layer, ModelSpec, Positions, Rope};

/// Nothing if the tensor is what the check says; otherwise what it is instead.
pub(super) fn contradiction(
    check: Check,
    tensor: &TensorInfo,
    spec: &ModelSpec,
    checkpoint: &Checkpoint,
) -> Result<Option<String>> {
    let holds = match check {
        Check::InvFreq => return inv_freq(tensor, spec, checkpoint),
        Check::CausalMask => is_mask(tensor, spec, checkpoint)?,
        Check::MaskedBias => {
            tensor.shape.iter().all(|size| *size == 1)
                && all(tensor, checkpoint, |_, value| value <= -1e3)? == Some(true)
        }
        Check::PositionIds => {
            let length = tensor.shape.last().copied().unwrap_or(1).max(1);
            all(tensor, checkpoint, |i, value| same(value, float(i % length), 0.0))? == Some(true)
        }
        Check::Sinusoids => is_sinusoid(tensor, spec, checkpoint)?,
        Check::Speculation => speculates(&tensor.name, checkpoint),
        Check::SharedCache => layers_of(&tensor.name, spec).iter().any(|layer| layer.attention.shares.is_some()),
        Check::IdentityExpert => is_identity_expert(&tensor.name, spec),
        Check::Scale => {
            checkpoint.catalogue().is_some() || all(tensor, checkpoint, |_, value| same(value, 1.0, 0.0))? == Some(true)
        }
    };
    Ok((!holds).then(|| instead(check).to_owned()))
}

fn instead(check: Check) -> &'static str {
    match check {
        Check::InvFreq => "other frequencies than the configuration computes",
        Check::CausalMask => "not the mask that the configuration computes",
        Check::MaskedBias => "not a number below -1000",
        Check::PositionIds => "not 0, 1, 2, ...",
        Check::Sinusoids => "not the sines and cosines that the configuration computes",
        Check::Speculation => {
            "a layer behind num_hidden_layers without eh_proj, which is no layer for speculation: num_hidden_layers may be too small"
        }
        Check::SharedCache => "of a layer that has keys and values of its own",
        Check::IdentityExpert => "no expert that hands its input on",
        Check::Scale => "not 1, in a checkpoint that is not quantised",
    }
}

/// The layers that a name speaks of, by the first number in it; none for a name without one. A checkpoint may hold
/// more than one layer below an index.
fn layers_of<'s>(name: &str, spec: &'s ModelSpec) -> Vec<&'s Layer> {
    let Some(named) = name.split('.').find_map(|part| part.parse::<usize>().ok()) else { return Vec::new() };
    let layers = spec.layers.iter().enumerate();
    let below = |index: usize, layer: &Layer| layer.modules.as_ref().map_or(index, |modules| modules.layer);
    layers.filter(|(index, layer)| below(*index, layer) == named).map(|(_, layer)| layer).collect()
}

/// The frequencies of a buffer against those of its layer; one that is of no layer may be of any.
fn inv_freq(tensor: &TensorInfo, spec: &ModelSpec, checkpoint: &Checkpoint) -> Result<Option<String>> {
    let mut stored = Vec::new();
    if all(tensor, checkpoint, |_, value| {
        stored.push(value);
        true
    })? != Some(true)
    {
        return Ok(Some(format!("{} elements, which are no frequencies", tensor.dtype)));
    }
    let own = layers_of(&tensor.name, spec);
    let layers = if own.is_empty() { spec.layers.iter().collect() } else { own };
    let ropes: Vec<&Rope> = layers.iter().filter_map(|layer| layer.attention.rope.as_ref()).collect();
    let share = precision(tensor.dtype);
    let fits = |computed: &Vec<f32>| {
        computed.len() == stored.len() && computed.iter().zip(&stored).all(|(a, b)| same(*b, f64::from(*a), share))
    };
    if ropes.iter().any(|rope| frequency_sets(rope).iter().any(fits)) {
        return Ok(None);
    }
    let Some(rope) = ropes.first() else { return Ok(Some("frequencies of a model that rotates nothing".to_owned())) };
    let computed = frequency_sets(rope).pop().unwrap_or_default();
    let differs = computed.iter().zip(&stored).position(|(a, b)| !same(*b, f64::from(*a), share));
    let at = differs.and_then(|at| Some((at, stored.get(at)?, computed.get(at)?)));
    Ok(Some(match at {
        Some((at, stored, computed)) => format!(
            "frequency {at} is {stored:e}, the configuration computes {computed:e}: rope_theta or its scaling is not what the model was trained with"
        ),
        None => format!("{} frequencies, the configuration computes {}", stored.len(), computed.len()),
    }))
}

/// Queries by rows, keys by columns: ones from the diagonal down, or the last few of them.
fn is_mask(tensor: &TensorInfo, spec: &ModelSpec, checkpoint: &Checkpoint) -> Result<bool> {
    let [lead @ .., rows, columns] = tensor.shape.as_slice() else { return Ok(false) };
    if rows != columns || *rows == 0 || lead.iter().any(|size| *size != 1) {
        return Ok(false);
    }
    let window = layers_of(&tensor.name, spec).first().and_then(|layer| layer.attention.window).unwrap_or(usize::MAX);
    let seen = |at: usize| {
        let (query, key) = (at / columns, at % columns);
        query.checked_sub(key).is_some_and(|distance| distance < window)
    };
    let found = all(tensor, checkpoint, |at, value| same(value, if seen(at) { 1.0 } else { 0.0 }, 0.0))?;
    Ok(found == Some(true))
}

/// Sines, then cosines, of each position; the rows before the first position are not read, and may be anything.
fn is_sinusoid(tensor: &TensorInfo, spec: &ModelSpec, checkpoint: &Checkpoint) -> Result<bool> {
    let (Some(Positions::Sinusoidal { offset }), [_, width]) = (&spec.embedding.positions, tensor.shape.as_slice())
    else {
        return Ok(false);
    };
    let half = width / 2;
    if half < 2 || *width != spec.hidden_size {
        return Ok(false);
    }
    let step = 10_000_f64.ln() / float(half - 1);
    // Angles are computed in float32: a late position is off by that much.
    let share = precision(tensor.dtype);
    let found = all(tensor, checkpoint, |at, value| {
        let (row, column) = (at / width, at % width);
        let angle = float(row) * (-float(column % half) * step).exp();
        let computed = if column < half { angle.sin() } else { angle.cos() };
        row < *offset || (value - computed).abs() <= share.max(1e-6 * float(row + 1))
    })?;
    Ok(found == Some(true))
}

/// Layers for speculation join two states by a projection of this name.
fn speculates(name: &str, checkpoint: &Checkpoint) -> bool {
    let Some(index) = name.split('.').position(|part| part.parse::<usize>().is_ok()) else { return false };
    let layer: String = name.split_inclusive('.').take(index + 1).collect();
    checkpoint.tensors().any(|tensor| tensor.name.strip_prefix(&layer).is_some_and(|rest| rest.contains("eh_proj")))
}

fn is_identity_expert(name: &str, spec: &ModelSpec) -> bool {
    let expert = name.split_once(".experts.").and_then(|(_, rest)| rest.split('.').next()?.parse::<usize>().ok());
    let Some(expert) = expert else { return false };
    let mixtures = layers_of(name, spec).into_iter().flat_map(|layer| {
        let own = match &layer.feed_forward {
            FeedForward::Moe(moe) => Some(moe),
            FeedForward::Dense(_) => None,
        };
        own.into_iter().chain(layer.shortcut.as_ref())
    });
    mixtures.into_iter().any(|moe| (moe.experts..moe.experts + moe.routing.identity_experts).contains(&expert))
}

/// How far a rounded number is off, as a share of it. Powers in float32 are off by more than rounding.
fn precision(dtype: StoredType) -> f64 {
    match dtype {
        StoredType::BF16 => 2_f64.powi(-8),
        StoredType::F16 => FLOAT16,
        _ => 1e-5,
    }
}

const FLOAT16: f64 = 1.0 / 2048.0;

/// Equal to a share. Small numbers of float16 have a step of their own.
fn same(value: f64, computed: f64, share: f64) -> bool {
    let least = if share.to_bits() == FLOAT16.to_bits() { 2_f64.powi(-25) } else { 0.0 };
    (value - computed).abs() <= (computed.abs() * share).max(least)
}

#[expect(clippy::cast_precision_loss, reason = "positions and sizes are small")]
fn float(value: usize) -> f64 {
    value as f64
}
