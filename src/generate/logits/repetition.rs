//! Tokens and sequences that have come already.

use std::collections::{BTreeSet, HashMap};

use super::{LogitsProcessor, NEVER, score};

/// Divides the positive scores of tokens that occurred and multiplies the negative ones: transformers'
/// `RepetitionPenaltyLogitsProcessor`, and with the prompt's tokens alone and the inverse of its number
/// `EncoderRepetitionPenaltyLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct RepetitionPenalty {
    pub(crate) penalty: f32,
    /// Tokens of which it counts that they occurred; all so far without a number.
    pub(crate) first: Option<usize>,
}

impl LogitsProcessor for RepetitionPenalty {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        let counted = self.first.unwrap_or(ids.len()).min(ids.len());
        let occurred: BTreeSet<i64> = ids.iter().take(counted).copied().collect();
        for id in occurred {
            if let Some(score) = score(scores, id) {
                *score = if *score < 0.0 { *score * self.penalty } else { *score / self.penalty };
            }
        }
    }
}

/// No sequence of so many tokens comes twice: transformers' `NoRepeatNGramLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct NoRepeatNgram {
    /// At least one.
    pub(crate) size: usize,
}

impl LogitsProcessor for NoRepeatNgram {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        let Some(before) = ids.len().checked_sub(self.size.saturating_sub(1)).and_then(|from| ids.get(from..)) else {
            return;
        };
        for window in ids.windows(self.size.max(1)) {
            if let Some((last, _)) = window.split_last().filter(|(_, start)| *start == before)
                && let Some(score) = score(scores, *last)
            {
                *score = NEVER;
            }
        }
    }
}

/// No sequence of so many tokens of the prompt comes again: transformers' `EncoderNoRepeatNGramLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct EncoderNoRepeatNgram {
    before: usize,
    /// What follows the tokens before.
    next: HashMap<Vec<i64>, Vec<i64>>,
}

impl EncoderNoRepeatNgram {
    pub(crate) fn new(size: usize, prompt: &[u32]) -> Self {
        let mut next: HashMap<Vec<i64>, Vec<i64>> = HashMap::new();
        let prompt: Vec<i64> = prompt.iter().copied().map(i64::from).collect();
        for (last, before) in prompt.windows(size.max(1)).filter_map(<[i64]>::split_last) {
            next.entry(before.to_vec()).or_default().push(*last);
        }
        Self { before: size.saturating_sub(1), next }
    }
}

impl LogitsProcessor for EncoderNoRepeatNgram {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        let before = ids.len().checked_sub(self.before).and_then(|from| ids.get(from..));
        for token in before.and_then(|before| self.next.get(before)).into_iter().flatten() {
            if let Some(score) = score(scores, *token) {
                *score = NEVER;
            }
        }
    }
}
