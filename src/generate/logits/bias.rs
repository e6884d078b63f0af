//! Sequences that are more or less likely than the model has them.

use std::collections::BTreeMap;

use super::{LogitsProcessor, score};

/// Adds a number to the score of a sequence's last token where the tokens before it have come: transformers'
/// `SequenceBiasLogitsProcessor`, and with minus infinity `NoBadWordsLogitsProcessor`.
#[derive(Debug)]
pub(crate) struct SequenceBias {
    /// The tokens before the last, the last, and the number.
    sequences: Vec<(Vec<i64>, i64, f32)>,
}

impl SequenceBias {
    /// Of a sequence that is named twice the last number counts.
    pub(crate) fn new(biases: impl IntoIterator<Item = (Vec<u32>, f32)>) -> Self {
        let biases: BTreeMap<Vec<u32>, f32> = biases.into_iter().collect();
        let sequences = biases.into_iter().filter_map(|(sequence, bias)| {
            let (last, before) = sequence.split_last()?;
            Some((before.iter().copied().map(i64::from).collect(), i64::from(*last), bias))
        });
        Self { sequences: sequences.collect() }
    }
}

impl LogitsProcessor for SequenceBias {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        let mut sums: BTreeMap<i64, f32> = BTreeMap::new();
        for (before, last, bias) in &self.sequences {
            if ids.ends_with(before) {
                *sums.entry(*last).or_default() += bias;
            }
        }
        for (token, sum) in sums {
            if let Some(score) = score(scores, token) {
                *score += sum;
            }
        }
    }
}
