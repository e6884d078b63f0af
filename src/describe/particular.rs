//! The tables of mechanisms that a few models have.

use serde::Deserialize;

use super::expression::Scope;
use super::resolve::{NormEntry, NormTable};
use super::tables::table;
use crate::error::{Error, Result};
use crate::spec::{Activation, AltUp, Indexer, Laurel, ModelSpec, Moe, MoeBranch, PerLayer, Projection};

/// `[per_layer]`; a size of zero means that there is none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PerLayerTable {
    rows: usize,
    size: usize,
    token_scale: f64,
    projection_scale: f64,
    scale: f64,
    norm: NormEntry,
    activation: Activation,
    output_norm: NormEntry,
}

/// `[altup]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AltUpTable {
    inputs: usize,
    active: usize,
    correct_scale: bool,
    norm: NormEntry,
}

/// `[layer.laurel]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LaurelTable {
    rank: usize,
    norm: NormEntry,
}

/// `[layer.branch]`: the norms of both branches; the experts are those of `[moe]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BranchTable {
    dense: NormEntry,
    input: NormEntry,
    output: NormEntry,
}

impl LaurelTable {
    pub(super) fn laurel(&self, norm: &NormTable) -> Laurel {
        Laurel { rank: self.rank, norm: norm.at(&self.norm) }
    }
}

impl BranchTable {
    pub(super) fn branch(&self, norm: &NormTable, moe: Moe) -> MoeBranch {
        MoeBranch {
            moe,
            dense_norm: norm.at(&self.dense),
            input_norm: norm.at(&self.input),
            output_norm: norm.at(&self.output),
        }
    }
}

pub(super) fn per_layer(scope: &Scope, norm: &NormTable) -> Result<Option<PerLayer>> {
    if scope.template().table("per_layer").is_none() {
        return Ok(None);
    }
    let t: PerLayerTable = table(scope, "per_layer")?;
    Ok((t.size > 0).then(|| PerLayer {
        rows: t.rows,
        size: t.size,
        token_scale: t.token_scale,
        projection_scale: t.projection_scale,
        scale: t.scale,
        norm: norm.at(&t.norm),
        activation: t.activation,
        output_norm: norm.at(&t.output_norm),
    }))
}

pub(super) fn altup(scope: &Scope, norm: &NormTable) -> Result<Option<AltUp>> {
    if scope.template().table("altup").is_none() {
        return Ok(None);
    }
    let t: AltUpTable = table(scope, "altup")?;
    let norm = norm.at(&t.norm);
    Ok(Some(AltUp { inputs: t.inputs, active: t.active, correct_scale: t.correct_scale, norm }))
}

/// What contradicts itself among these mechanisms.
pub(super) fn check(spec: &ModelSpec, odd: impl Fn(&str, String) -> Result<(), Error>) -> Result<()> {
    if let Some(altup) = spec.altup.as_ref().filter(|altup| altup.active >= altup.inputs) {
        return odd("altup", format!("stream {} of {}", altup.active, altup.inputs));
    }
    let mut chosen = false;
    for (index, layer) in spec.layers.iter().enumerate() {
        let a = &layer.attention;
        if let Some(from) = a.shares {
            let fits = spec.layers.get(from).filter(|_| from < index).is_some_and(|owner| {
                let b = &owner.attention;
                b.shares.is_none() && (a.kv_heads, a.key_size, a.value_size) == (b.kv_heads, b.key_size, b.value_size)
            });
            if !fits || matches!(a.projection, Projection::Latent { .. }) {
                return odd("attention", format!("layer {index} can not read the cache of layer {from}"));
            }
        }
        if a.differential.is_some() && (a.kv_heads % 2 != 0 || a.value_size != 2 * a.key_size) {
            return odd("attention", format!("{} heads in pairs of {} in layer {index}", a.kv_heads, a.value_size));
        }
        if let Some(mixture) = a.mixture {
            let heads = mixture.top_k > 0 && mixture.top_k <= mixture.experts && mixture.top_k * a.kv_heads == a.heads;
            if !heads || !matches!(a.projection, Projection::Separate { query_bias: false, .. }) {
                return odd("attention", format!("{mixture:?} for {} heads in layer {index}", a.heads));
            }
        }
        match &a.indexer {
            Some(Indexer::Own { heads, size, top_k, .. }) => {
                let rotated = a.rope.as_ref().map_or(0, |rope| rope.size);
                if *heads == 0 || *size < rotated || *top_k == 0 {
                    return odd("indexer", format!("{heads} heads of {size} choose {top_k} keys in layer {index}"));
                }
                chosen = true;
            }
            Some(Indexer::Previous) if !chosen => {
                return odd("indexer", format!("layer {index} has no indexer before it"));
            }
            _ => {}
        }
    }
    Ok(())
}
