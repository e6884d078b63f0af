//! How long the text becomes: tokens that end it, forbidden, favored or forced.

use super::{LogitsProcessor, NEVER, rounded, score, set};

/// No end before so many tokens, the prompt's included: transformers' `MinLengthLogitsProcessor`, and counted from the
/// prompt's end `MinNewTokensLengthLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct MinLength {
    pub(crate) length: usize,
    pub(crate) end: Vec<u32>,
}

impl LogitsProcessor for MinLength {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        if ids.len() < self.length {
            set(scores, &self.end, NEVER);
        }
    }
}

/// The last token that there is room for is one of these: transformers' `ForcedEOSTokenLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct ForcedEnd {
    pub(crate) length: usize,
    pub(crate) tokens: Vec<u32>,
}

impl LogitsProcessor for ForcedEnd {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        if ids.len().saturating_add(1) == self.length {
            scores.fill(NEVER);
            set(scores, &self.tokens, 0.0);
        }
    }
}

/// The end becomes likelier with each token behind `start`: transformers' `ExponentialDecayLengthPenalty`.
#[derive(Debug)]
pub(crate) struct ExponentialDecay {
    /// Tokens, the prompt's included; below 0 if it started before the prompt.
    pub(crate) start: i64,
    pub(crate) factor: f64,
    /// Each token once.
    pub(crate) end: Vec<u32>,
}

impl LogitsProcessor for ExponentialDecay {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        let beyond = i64::try_from(ids.len()).unwrap_or(i64::MAX).saturating_sub(self.start);
        if beyond <= 0 {
            return;
        }
        let growth = rounded(self.factor.powi(i32::try_from(beyond).unwrap_or(i32::MAX)) - 1.0);
        for token in &self.end {
            if let Some(score) = score(scores, i64::from(*token)).filter(|score| score.is_finite()) {
                *score += score.abs() * growth;
            }
        }
    }
}
