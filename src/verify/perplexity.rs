//! Perplexity over a text, as the goldens' recorder computes it.

use std::path::Path;

use super::metrics::log_sum_exp;
use super::report::{Perplexity, Verdict};
use super::windows::{Window, text_windows};
use crate::error::Result;
use crate::session::Decoder;
use crate::tokenizer::Tokenizer;

/// Scores a text in windows. With the reference's mean negative log-likelihood the result is judged.
pub(super) fn measure(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    text: &Path,
    window: usize,
    reference: Option<f64>,
    tolerance: f64,
) -> Result<Perplexity> {
    let (mut sum, mut tokens) = (0.0, 0_u32);
    for window in text_windows(tokenizer, text, window)? {
        sum += score(decoder, &window)?;
        tokens += u32::try_from(window.targets.len()).unwrap_or(0);
    }
    let nll = sum / f64::from(tokens);
    let difference = reference.map(|r| ((nll - r).exp() - 1.0).abs());
    Ok(Perplexity {
        text: text.to_path_buf(),
        tokens: tokens as usize,
        nll_per_token: nll,
        perplexity: nll.exp(),
        reference: reference.map(f64::exp),
        difference,
        verdict: difference.map_or(Verdict::NotCompared, |d| Verdict::of(d, tolerance)),
    })
}

/// Sum of the negative log-likelihoods of a window's targets.
fn score(decoder: &mut Decoder, window: &Window) -> Result<f64> {
    let step = window.run(decoder)?;
    let vocabulary = step.logits.shape.last().copied().unwrap_or(0).max(1);
    let positions = step.logits.data.chunks_exact(vocabulary).zip(&window.targets);
    Ok(positions.map(|(logits, target)| surprise(logits, *target)).sum())
}

/// Negative log-likelihood of a token, in nats; NaN where the vocabulary lacks it.
pub(super) fn surprise(logits: &[f32], token: i64) -> f64 {
    let chosen = usize::try_from(token).ok().and_then(|t| logits.get(t)).copied().unwrap_or(f32::NAN);
    log_sum_exp(logits) - f64::from(chosen)
}
