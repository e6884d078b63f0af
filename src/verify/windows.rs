//! Pieces of texts that a model runs by themselves, and what it has to predict in each.

use std::path::Path;

use crate::error::{Code, Error, Result};
use crate::session::{Decoder, IntMatrix, Step};
use crate::tokenizer::Tokenizer;

/// Tokens that are scored at a time where nothing else is said.
pub const WINDOW: usize = 512;

/// Tokens that are run at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// The tokens.
    pub ids: Vec<i64>,
    /// The token that follows each of them; none where nobody meant the tokens to be predicted.
    pub targets: Vec<i64>,
}

impl Window {
    /// Tokens that nobody meant to be predicted.
    pub fn without_targets(ids: Vec<i64>) -> Self {
        Self { ids, targets: Vec::new() }
    }

    /// Runs the window alone; the logits are `[1, tokens, vocabulary]`.
    ///
    /// # Errors
    /// The run fails, or returns the last position's logits only.
    pub(super) fn run(&self, decoder: &mut Decoder) -> Result<Step> {
        let positions = (0_i64..).take(self.ids.len()).collect();
        let (mask, positions) = (IntMatrix::from_row(vec![1; self.ids.len()]), IntMatrix::from_row(positions));
        let mut state = decoder.empty_state(1)?;
        let step = decoder.run(&IntMatrix::from_row(self.ids.clone()), &mask, &positions, &mut state)?;
        let vocabulary = step.logits.shape.last().copied().unwrap_or(0).max(1);
        if step.logits.data.len() != self.ids.len() * vocabulary {
            return Err(Error::new(Code::RuntimeFailed, decoder.file().display())
                .found("logits of the last position only")
                .expected("logits of every position, to score a text")
                .help("build without `--logits last`"));
        }
        Ok(step)
    }
}

/// Cuts a text into windows of at most `window` tokens: each predicts from its first token on, so that a window's last
/// target is the next one's first token.
///
/// # Errors
/// The text can not be read, or has fewer than two tokens.
pub fn text_windows(tokenizer: &Tokenizer, text: &Path, window: usize) -> Result<Vec<Window>> {
    let content = crate::regular::read_text(text, crate::regular::TEXT).map_err(|e| Error::io(text, &e))?;
    let ids: Vec<i64> = tokenizer.encode(&content, false)?.into_iter().map(i64::from).collect();
    let Some((_, targets)) = ids.split_first().filter(|(_, rest)| !rest.is_empty()) else {
        return Err(Error::new(Code::UsageInvalid, text.display())
            .found(format!("{} tokens", ids.len()))
            .expected("two tokens at least"));
    };
    let window = window.max(1);
    let pieces = ids.chunks(window).zip(targets.chunks(window)).map(|(ids, targets)| Window {
        // The text's last token is predicted, but predicts nothing.
        ids: ids.get(..targets.len()).unwrap_or(ids).to_vec(),
        targets: targets.to_vec(),
    });
    Ok(pieces.collect())
}
