//! Tokens that never come, or have to; and scores that are mended.

use super::{LogitsProcessor, NEVER, log_softmax, rounded, set};

/// Tokens that never come: transformers' `SuppressTokensLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct Suppressed(pub(crate) Vec<u32>);

impl LogitsProcessor for Suppressed {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        set(scores, &self.0, NEVER);
    }
}

/// Tokens that do not come first: transformers' `SuppressTokensAtBeginLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct SuppressedAtStart {
    pub(crate) tokens: Vec<u32>,
    /// Tokens before the first that counts.
    pub(crate) at: usize,
}

impl LogitsProcessor for SuppressedAtStart {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        if ids.len() == self.at {
            set(scores, &self.tokens, NEVER);
        }
    }
}

/// The second token of all: transformers' `ForcedBOSTokenLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct ForcedStart(pub(crate) u32);

impl LogitsProcessor for ForcedStart {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        if ids.len() == 1 {
            scores.fill(NEVER);
            set(scores, &[self.0], 0.0);
        }
    }
}

/// Numbers in place of infinities and what is no number: transformers' `InfNanRemoveLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct FiniteScores;

impl LogitsProcessor for FiniteScores {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        for score in scores {
            *score = if score.is_nan() { 0.0 } else { score.clamp(f32::MIN, f32::MAX) };
        }
    }
}

/// Logarithms of probabilities: transformers' `LogitNormalization`.
#[derive(Debug)]
pub(crate) struct Normalized;

impl LogitsProcessor for Normalized {
    fn process(&self, _: &[i64], scores: &mut [f32]) {
        let logs = log_softmax(scores);
        scores.iter_mut().zip(logs).for_each(|(score, log)| *score = rounded(log));
    }
}
