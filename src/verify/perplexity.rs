//! Perplexity over a text, as the goldens' recorder computes it.

use std::path::Path;

use super::metrics::log_sum_exp;
use super::report::{Perplexity, Verdict};
use crate::error::{Code, Error, Result};
use crate::session::{Decoder, IntMatrix};
use crate::tokenizer::Tokenizer;

/// Tokens that are scored at a time where a golden does not say otherwise.
pub(super) const WINDOW: usize = 512;

/// Scores a text in windows: each predicts `window` tokens from the token before them on, so that a window's last token
/// is the next one's first. With the reference's mean negative log-likelihood the result is judged.
pub(super) fn measure(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    text: &Path,
    window: usize,
    reference: Option<f64>,
    tolerance: f64,
) -> Result<Perplexity> {
    let content = std::fs::read_to_string(text).map_err(|e| Error::io(text, &e))?;
    let ids: Vec<i64> = tokenizer.encode(&content, false)?.into_iter().map(i64::from).collect();
    let Some((_, targets)) = ids.split_first().filter(|(_, rest)| !rest.is_empty()) else {
        return Err(Error::new(Code::UsageInvalid, text.display())
            .found(format!("{} tokens", ids.len()))
            .expected("two tokens at least"));
    };
    let (mut sum, mut tokens) = (0.0, 0_u32);
    for (inputs, targets) in ids.chunks(window.max(1)).zip(targets.chunks(window.max(1))) {
        // The text's last token is predicted, but predicts nothing.
        sum += score(decoder, inputs.get(..targets.len()).unwrap_or(inputs), targets)?;
        tokens += u32::try_from(targets.len()).unwrap_or(0);
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

/// Sum of the negative log-likelihoods of the targets, each after the input that it follows.
fn score(decoder: &mut Decoder, inputs: &[i64], targets: &[i64]) -> Result<f64> {
    let positions = (0_i64..).take(inputs.len()).collect();
    let (mask, positions) = (IntMatrix::from_row(vec![1; inputs.len()]), IntMatrix::from_row(positions));
    let mut state = decoder.empty_state(1)?;
    let step = decoder.run(&IntMatrix::from_row(inputs.to_vec()), &mask, &positions, &mut state)?;
    let vocabulary = step.logits.shape.last().copied().unwrap_or(0).max(1);
    if step.logits.data.len() != inputs.len() * vocabulary {
        return Err(Error::new(Code::RuntimeFailed, decoder.file().display())
            .found("logits of the last position only")
            .expected("logits of every position, to score a text")
            .help("build without `--logits last`"));
    }
    let losses = step.logits.data.chunks_exact(vocabulary).zip(targets).map(|(logits, target)| {
        let chosen = usize::try_from(*target).ok().and_then(|t| logits.get(t)).copied().unwrap_or(f32::NAN);
        log_sum_exp(logits) - f64::from(chosen)
    });
    Ok(losses.sum())
}
