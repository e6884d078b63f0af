//! Tokens to text while the tokens still come.

use super::decoding::Decoding;
use super::{Tokenizer, guarded, unusable};
use crate::error::Result;

/// Turns tokens into text as they come. A piece is held back until no later token can change it, so the pieces together
/// are the text of all tokens.
#[derive(Debug)]
pub struct Stream<'t> {
    tokenizer: &'t Tokenizer,
    decoding: Decoding,
    /// What the prompt's text has beyond the pieces that came before its end: it is shown already.
    shown: String,
}

impl<'t> Stream<'t> {
    /// A stream that continues a prompt: the prompt is context. The pieces are what the text of all tokens has beyond
    /// the prompt's own.
    pub fn new(tokenizer: &'t Tokenizer, prompt: &[u32]) -> Result<Self> {
        let decoding = Decoding::new(tokenizer.inner.get_decoder());
        let mut stream = Self { tokenizer, decoding, shown: String::new() };
        for id in prompt {
            stream.certain(*id)?;
        }
        stream.shown = rest(stream.decoding.clone())?;
        Ok(stream)
    }

    /// Adds a token; returns the text that is certain now, perhaps none.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let piece = self.certain(id)?;
        Ok(self.beyond(&piece))
    }

    /// What was held back, at the end of the text.
    pub fn finish(mut self) -> Result<String> {
        let piece = rest(self.decoding.clone())?;
        Ok(self.beyond(&piece))
    }

    fn certain(&mut self, id: u32) -> Result<String> {
        let Some(token) = self.tokenizer.token(id) else { return Ok(String::new()) };
        guarded(|| self.decoding.push(token)).map_err(|found| unusable("the tokens", found))
    }

    /// A piece without what is shown already.
    fn beyond(&mut self, piece: &str) -> String {
        let same = piece.chars().zip(self.shown.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        match piece.get(same..) {
            // The prompt reads otherwise now: what it has become is no part of what was shown.
            Some(new) if !new.is_empty() => {
                self.shown.clear();
                new.to_owned()
            }
            _ => {
                self.shown.drain(..same);
                String::new()
            }
        }
    }
}

fn rest(decoding: Decoding) -> Result<String> {
    guarded(|| decoding.finish()).map_err(|found| unusable("the tokens", found))
}
