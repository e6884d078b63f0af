//! What is done to the scores of the next token before one is chosen. Each type here is one of transformers 5.23's
//! logits processors (`generation/logits_process.py`), and does what that one does to one row.

mod bias;
mod length;
mod repetition;
mod tokens;
mod warp;

use std::fmt;
use std::sync::Arc;

pub(super) use bias::SequenceBias;
pub(super) use length::{ExponentialDecay, ForcedEnd, MinLength};
pub(super) use repetition::{EncoderNoRepeatNgram, NoRepeatNgram, RepetitionPenalty};
pub(super) use tokens::{FiniteScores, ForcedStart, Normalized, Suppressed, SuppressedAtStart};
pub(super) use warp::{Epsilon, Eta, MinP, Temperature, TopH, TopK, TopP, Typical};

/// Changes the scores of the next token.
pub trait LogitsProcessor: fmt::Debug + Send + Sync {
    /// `ids` are the prompt's tokens and all that came behind them, `scores` one number for each token of the vocabulary.
    fn process(&self, ids: &[i64], scores: &mut [f32]);
}

/// Processors, one after the other.
#[derive(Debug, Clone, Default)]
pub struct LogitsProcessors(Vec<Arc<dyn LogitsProcessor>>);

impl LogitsProcessors {
    /// Adds one at the end.
    pub fn push(&mut self, processor: impl LogitsProcessor + 'static) {
        self.0.push(Arc::new(processor));
    }
}

impl LogitsProcessor for LogitsProcessors {
    fn process(&self, ids: &[i64], scores: &mut [f32]) {
        for processor in &self.0 {
            processor.process(ids, scores);
        }
    }
}

/// A score that no token is chosen with.
const NEVER: f32 = f32::NEG_INFINITY;

/// Sets the scores of tokens. Numbers that no token has are passed over, as transformers does.
fn set(scores: &mut [f32], tokens: &[u32], value: f32) {
    for token in tokens {
        if let Some(score) = score(scores, i64::from(*token)) {
            *score = value;
        }
    }
}

fn score(scores: &mut [f32], id: i64) -> Option<&mut f32> {
    scores.get_mut(usize::try_from(id).ok()?)
}

/// Logarithms of the probabilities.
fn log_softmax(scores: &[f32]) -> Vec<f64> {
    let largest = f64::from(scores.iter().copied().fold(NEVER, f32::max));
    let sum: f64 = scores.iter().map(|score| (f64::from(*score) - largest).exp()).sum();
    scores.iter().map(|score| f64::from(*score) - largest - sum.ln()).collect()
}

/// Probabilities.
pub(super) fn softmax(scores: &[f32]) -> Vec<f32> {
    log_softmax(scores).into_iter().map(|log| rounded(log.exp())).collect()
}

/// The entropy of probabilities whose logarithms these are.
fn entropy(logs: &[f64]) -> f64 {
    logs.iter().filter(|log| log.is_finite()).map(|log| -log * log.exp()).sum()
}

/// As transformers, which computes in float32, has it.
#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
fn rounded(value: f64) -> f32 {
    value as f32
}
