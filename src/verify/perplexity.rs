//! Perplexity over a text, as the goldens' recorder computes it.

use std::path::Path;

use super::metrics::log_sum_exp;
use super::report::{Perplexity, Verdict};
use crate::error::{Code, Error, Result};
use crate::session::{Decoder, IntMatrix};
use crate::tokenizer::Tokenizer;

/// Tokens that are scored at a time; each window's last token is the next one's first.
const WINDOW: usize = 512;

/// Scores a text. With the reference's mean negative log-likelihood the result is judged.
pub(super) fn measure(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    text: &Path,
    reference: Option<f64>,
    tolerance: f64,
) -> Result<Perplexity> {
    let content = std::fs::read_to_string(text).map_err(|e| Error::io(text, &e))?;
    let ids: Vec<i64> = tokenizer.encode(&content, false)?.into_iter().map(i64::from).collect();
    if ids.len() < 2 {
        return Err(Error::new(Code::UsageInvalid, text.display())
            .found(format!("{} tokens", ids.len()))
            .expected("two tokens at least"));
    }
    let (mut sum, mut tokens, mut from) = (0.0, 0_u32, 0);
    while from + 1 < ids.len() {
        let window = ids.get(from..ids.len().min(from + WINDOW)).unwrap_or_default();
        let (nll, count) = score(decoder, window)?;
        sum += nll;
        tokens += count;
        from += WINDOW - 1;
    }
    let nll = sum / f64::from(tokens.max(1));
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

/// Sum of the negative log-likelihoods of a window's tokens after the first, and their number.
fn score(decoder: &mut Decoder, ids: &[i64]) -> Result<(f64, u32)> {
    let end = i64::try_from(ids.len()).unwrap_or(i64::MAX);
    let (mask, positions) = (IntMatrix::from_row(vec![1; ids.len()]), IntMatrix::from_row((0..end).collect()));
    let mut state = decoder.empty_state(1)?;
    let ids = IntMatrix::from_row(ids.to_vec());
    let step = decoder.run(&ids, &mask, &positions, &mut state)?;
    let vocabulary = step.logits.shape.last().copied().unwrap_or(0).max(1);
    let targets = ids.data.get(1..).unwrap_or_default();
    if step.logits.data.len() != ids.columns * vocabulary {
        return Err(Error::new(Code::RuntimeFailed, decoder.file().display())
            .found("logits of the last position only")
            .expected("logits of every position, to score a text")
            .help("build without `--logits last`"));
    }
    let (mut sum, mut count) = (0.0, 0);
    for (logits, target) in step.logits.data.chunks_exact(vocabulary).zip(targets) {
        let chosen = usize::try_from(*target).ok().and_then(|t| logits.get(t)).copied().unwrap_or(f32::NAN);
        sum += log_sum_exp(logits) - f64::from(chosen);
        count += 1;
    }
    Ok((sum, count))
}
