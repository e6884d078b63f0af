//! Which tokens are drawn among: transformers' warpers, which count only where tokens are drawn at random. Each keeps one
//! token at least.

use std::cmp::Ordering;

use super::{LogitsProcessor, NEVER, entropy, log_softmax, rounded, softmax};

/// Divides the scores: transformers' `TemperatureLogitsWarper`.
#[derive(Debug)]
pub(crate) struct Temperature(pub(crate) f32);

impl LogitsProcessor for Temperature {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        for score in scores {
            *score /= self.0;
        }
    }
}

/// Keeps so many of the likeliest, and those that are as likely as the last of them: transformers' `TopKLogitsWarper`.
#[derive(Debug)]
pub(crate) struct TopK(pub(crate) usize);

impl LogitsProcessor for TopK {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        let last = self.0.min(scores.len()).saturating_sub(1);
        let mut sorted = scores.to_vec();
        if sorted.is_empty() {
            return;
        }
        let (_, least, _) = sorted.select_nth_unstable_by(last, |a, b| b.total_cmp(a));
        let least = *least;
        keep(scores, |_, score| score >= least);
    }
}

/// Keeps the likeliest whose probabilities add up to this: transformers' `TopPLogitsWarper`.
#[derive(Debug)]
pub(crate) struct TopP(pub(crate) f64);

impl LogitsProcessor for TopP {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        let probabilities = softmax(scores);
        let mut order = sorted(scores, f32::total_cmp);
        order.pop();
        let (mut sum, most) = (0.0, rounded(1.0 - self.0));
        for token in order {
            sum += f64::from(probabilities.get(token).copied().unwrap_or_default());
            if rounded(sum) > most {
                break;
            }
            remove(scores, token);
        }
    }
}

/// Keeps those that are at least so likely as this share of the likeliest: transformers' `MinPLogitsWarper`.
#[derive(Debug)]
pub(crate) struct MinP(pub(crate) f32);

impl LogitsProcessor for MinP {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        let probabilities = softmax(scores);
        let largest = probabilities.iter().copied().fold(0.0, f32::max);
        keep(scores, |token, _| probabilities.get(token).is_some_and(|p| *p >= largest * self.0 || *p >= largest));
    }
}

/// Keeps the likeliest that hold this share of the entropy of the hundred likeliest: transformers' `TopHLogitsWarper`.
#[derive(Debug)]
pub(crate) struct TopH(pub(crate) f64);

impl TopH {
    /// The number in transformers.
    const LOOKED_AT: usize = 100;
}

impl LogitsProcessor for TopH {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        let mut order = sorted(scores, |a, b| b.total_cmp(a));
        let rest = order.split_off(order.len().min(Self::LOOKED_AT));
        let likeliest: Vec<f32> = order.iter().filter_map(|token| scores.get(*token).copied()).collect();
        let logs = log_softmax(&likeliest);
        let most = entropy(&logs) * self.0;
        let mut sum = 0.0;
        let cut = logs.iter().position(|log| {
            sum -= log * log.exp();
            // What has no probability has no logarithm, and is never kept.
            sum.is_nan() || rounded(sum) > rounded(most)
        });
        let cut = cut.unwrap_or(order.len()).max(1);
        order.into_iter().skip(cut).chain(rest).for_each(|token| remove(scores, token));
    }
}

/// Keeps those whose information is nearest to the entropy and whose probabilities add up to this: transformers'
/// `TypicalLogitsWarper`.
#[derive(Debug)]
pub(crate) struct Typical(pub(crate) f64);

impl LogitsProcessor for Typical {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        let logs = log_softmax(scores);
        let expected = entropy(&logs);
        let distances: Vec<f32> = logs.iter().map(|log| rounded((-log - expected).abs())).collect();
        let order = sorted(&distances, f32::total_cmp);
        let mut sum = 0.0;
        let enough = order.iter().position(|token| {
            sum += logs.get(*token).map_or(0.0, |log| log.exp());
            rounded(sum) >= rounded(self.0)
        });
        let last = order.get(enough.unwrap_or(order.len().saturating_sub(1)));
        let farthest = last.and_then(|token| distances.get(*token).copied()).unwrap_or(f32::INFINITY);
        let first = order.first().copied();
        keep(scores, |token, _| Some(token) == first || distances.get(token).is_some_and(|d| *d <= farthest));
    }
}

/// Keeps those that are at least this likely: transformers' `EpsilonLogitsWarper`.
#[derive(Debug)]
pub(crate) struct Epsilon(pub(crate) f64);

impl LogitsProcessor for Epsilon {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        at_least(scores, rounded(self.0));
    }
}

/// Keeps those that are at least this likely, or less where the model is unsure: transformers' `EtaLogitsWarper`.
#[derive(Debug)]
pub(crate) struct Eta(pub(crate) f64);

impl LogitsProcessor for Eta {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        let entropy = entropy(&log_softmax(scores));
        at_least(scores, rounded(self.0.min(self.0.sqrt() * (-entropy).exp())));
    }
}

/// Keeps the tokens of this probability at least, and the likeliest.
fn at_least(scores: &mut [f32], least: f32) {
    let probabilities = softmax(scores);
    let largest = scores.iter().copied().fold(NEVER, f32::max);
    keep(scores, |token, score| score >= largest || probabilities.get(token).is_some_and(|p| *p >= least));
}

fn keep(scores: &mut [f32], kept: impl Fn(usize, f32) -> bool) {
    for (token, score) in scores.iter_mut().enumerate() {
        if !kept(token, *score) {
            *score = NEVER;
        }
    }
}

fn remove(scores: &mut [f32], token: usize) {
    if let Some(score) = scores.get_mut(token) {
        *score = NEVER;
    }
}

/// The tokens in the order of these numbers, of equals the first one first, without those that are out already: top-k
/// leaves few of a large vocabulary.
fn sorted(values: &[f32], order: impl Fn(&f32, &f32) -> Ordering) -> Vec<usize> {
    let mut numbered: Vec<(usize, f32)> =
        values.iter().copied().enumerate().filter(|(_, value)| value.is_finite()).collect();
    numbered.sort_by(|a, b| order(&a.1, &b.1));
    numbered.into_iter().map(|(token, _)| token).collect()
}
