//! How much of a reference's predictions a model keeps: what is asked of a model that can not be equal, such as a
//! quantised one.

use rayon::prelude::*;
use serde::Serialize;

use super::layers::{LayerError, LayerTally};
use super::metrics::{Energy, argmax, both_exclude, divergence, information};
use super::perplexity::surprise;
use super::windows::Window;
use crate::error::{Code, Error, Result};
use crate::session::{Decoder, Floats};

/// How a model's distributions differ from a reference's, over some positions.
///
/// What is not a number counts as infinite, which JSON writes as null.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quality {
    /// Positions that were compared.
    pub positions: usize,
    /// Mean over the positions of the Kullback-Leibler divergence KL(reference || model), in nats.
    pub kl_mean: f64,
    /// Its 99th percentile: the smallest that 99 % of the positions do not exceed.
    pub kl_p99: f64,
    /// The largest one.
    pub kl_max: f64,
    /// Share of positions where both put the same token first.
    pub top1: f64,
    /// Norm of the difference of all logits by the norm of the reference's, each position's mean taken off.
    pub error: f64,
    /// By how many nats the reference's mean entropy lies below that of a uniform choice: what there is to lose.
    pub information: f64,
    /// Mean absolute difference of a logit.
    pub logit_mean: f64,
    /// The largest one.
    pub logit_max: f64,
    /// Perplexity, where tokens were to be predicted.
    pub perplexity: Option<PerplexityChange>,
}

/// Perplexities over the same tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PerplexityChange {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// The reference's perplexity.
    pub reference: f64,
    /// The model's.
    pub model: f64,
    /// What the model's is higher, by the reference's.
    pub change: f64,
}

/// What a model lost against a reference build.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Loss {
    /// Of its predictions.
    #[serde(flatten)]
    pub quality: Quality,
    /// Of its hidden states, largest increase first; none where they were not compared.
    pub layers: Vec<LayerError>,
}

/// One position.
#[derive(Debug, Clone, Copy)]
struct Position {
    kl: f64,
    same: bool,
    energy: Energy,
    information: f64,
    /// Sum and largest of the absolute differences.
    differences: (f64, f64),
    /// Negative log-likelihoods of the target: the reference's and the model's.
    surprise: Option<(f64, f64)>,
}

/// Adds up positions, as they come.
#[derive(Debug, Default)]
pub struct Tally {
    positions: Vec<Position>,
    values: f64,
    layers: LayerTally,
}

/// What is not a number is as bad as can be.
fn worst_if_nan(value: f64) -> f64 {
    if value.is_nan() { f64::INFINITY } else { value }
}

impl Position {
    /// Entries of a padded vocabulary, which the reference lacks, are not compared.
    fn of(reference: &[f32], model: &[f32], target: Option<i64>) -> Self {
        let cut = model.get(..reference.len());
        let model = cut.unwrap_or(model);
        let mut differences = (0.0_f64, 0.0_f64);
        for (r, m) in reference.iter().zip(model).filter(|(r, m)| !both_exclude(**r, **m)) {
            let difference = worst_if_nan(f64::from(*m) - f64::from(*r)).abs();
            differences = (differences.0 + difference, differences.1.max(difference));
        }
        // A vocabulary that lacks tokens of the reference gives them no probability at all.
        let kl = if cut.is_some() { worst_if_nan(divergence(reference, model)) } else { f64::INFINITY };
        Self {
            kl,
            same: argmax(model) == argmax(reference),
            energy: Energy::of(reference, model),
            information: information(reference),
            differences,
            surprise: target.map(|token| (surprise(reference, token), surprise(model, token))),
        }
    }
}

impl Tally {
    /// Adds the logits `[1, tokens, vocabulary]` of one window; `targets` follow its first tokens.
    pub fn add(&mut self, reference: &Floats, model: &Floats, targets: &[i64]) {
        let width = |tensor: &Floats| tensor.shape.last().copied().unwrap_or(0).max(1);
        let rows = (reference.data.par_chunks_exact(width(reference)), model.data.par_chunks_exact(width(model)));
        let found: Vec<Position> = rows
            .0
            .zip(rows.1)
            .enumerate()
            .map(|(at, (reference, model))| Position::of(reference, model, targets.get(at).copied()))
            .collect();
        self.extend(found, width(reference));
    }

    /// Adds one position.
    pub(super) fn add_position(&mut self, reference: &[f32], model: &[f32]) {
        self.extend(vec![Position::of(reference, model, None)], reference.len());
    }

    fn extend(&mut self, found: Vec<Position>, vocabulary: usize) {
        let width = f64::from(u32::try_from(vocabulary).unwrap_or(u32::MAX));
        for position in found {
            self.layers.add_logits(position.energy.error());
            self.values += width;
            self.positions.push(position);
        }
    }

    /// Adds hidden states, each `[1, tokens, hidden]`, with their numbers.
    pub fn add_hidden(&mut self, reference: &[(usize, Floats)], model: &[(usize, Floats)]) {
        for (number, want) in reference {
            let Some((_, got)) = model.iter().find(|(other, _)| other == number) else { continue };
            let width = want.shape.last().copied().unwrap_or(0).max(1);
            for (want, got) in want.data.chunks_exact(width).zip(got.data.chunks_exact(width)) {
                self.layers.add(*number, want, got);
            }
        }
    }

    /// Adds one position of one hidden state.
    pub(super) fn add_hidden_position(&mut self, number: usize, reference: &[f32], model: &[f32]) {
        self.layers.add(number, reference, model);
    }

    /// What all of it comes to; nothing without a position.
    pub fn finish(self) -> Option<Loss> {
        let count = u32::try_from(self.positions.len()).ok().filter(|count| *count > 0)?;
        let of = f64::from(count);
        let mut kl: Vec<f64> = self.positions.iter().map(|p| p.kl).collect();
        let kl_mean = kl.iter().sum::<f64>() / of;
        kl.sort_by(f64::total_cmp);
        let mut energy = Energy::default();
        self.positions.iter().for_each(|p| energy += p.energy);
        let same = self.positions.iter().map(|p| u32::from(p.same)).sum::<u32>();
        let quality = Quality {
            positions: self.positions.len(),
            kl_mean,
            kl_p99: percentile(&kl, 99),
            kl_max: kl.last().copied().unwrap_or(0.0),
            top1: f64::from(same) / of,
            error: worst_if_nan(energy.error()),
            information: self.positions.iter().map(|p| p.information).sum::<f64>() / of,
            logit_mean: self.positions.iter().map(|p| p.differences.0).sum::<f64>() / self.values.max(1.0),
            logit_max: self.positions.iter().map(|p| p.differences.1).fold(0.0, f64::max),
            perplexity: perplexity(&self.positions),
        };
        Some(Loss { quality, layers: self.layers.finish() })
    }
}

/// The nearest-rank percentile of sorted numbers.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(rank).copied().unwrap_or(0.0)
}

fn perplexity(positions: &[Position]) -> Option<PerplexityChange> {
    let scored: Vec<(f64, f64)> = positions.iter().filter_map(|p| p.surprise).collect();
    let tokens = u32::try_from(scored.len()).ok().filter(|count| *count > 0)?;
    let mean = |pick: fn(&(f64, f64)) -> f64| scored.iter().map(pick).sum::<f64>() / f64::from(tokens);
    let (reference, model) = (mean(|s| s.0), mean(|s| s.1));
    Some(PerplexityChange {
        tokens: tokens as usize,
        reference: worst_if_nan(reference.exp()),
        model: worst_if_nan(model.exp()),
        change: worst_if_nan((model - reference).exp_m1()),
    })
}

/// Runs a reference and other builds of the same model over windows, and says what each of them lost.
///
/// Only one window's logits of the reference and of one model are held at a time. Decoders that were opened with their
/// hidden states are compared by those too.
///
/// # Errors
/// A run fails, a build returns the last position's logits only, or there is nothing to compare.
pub fn compare_builds(reference: &mut Decoder, models: &mut [Decoder], windows: &[Window]) -> Result<Vec<Loss>> {
    let mut tallies: Vec<Tally> = models.iter().map(|_| Tally::default()).collect();
    for window in windows {
        let want = window.run(reference)?;
        for (model, tally) in models.iter_mut().zip(&mut tallies) {
            let got = window.run(model)?;
            tally.add(&want.logits, &got.logits, &window.targets);
            tally.add_hidden(&want.hidden_states, &got.hidden_states);
        }
    }
    let nothing = || Error::new(Code::UsageInvalid, "the tokens to compare on").found("none").expected("one at least");
    tallies.into_iter().map(|tally| tally.finish().ok_or_else(nothing)).collect()
}
