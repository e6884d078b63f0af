//! Text to tokens and back, and back again while the tokens still come.

mod alphabet;
mod decoding;
mod stream;

use std::path::Path;

use tokenizers::Decoder as _;

use decoding::ByteTokens;
pub use stream::Stream;

use crate::error::{Code, Error, Result};
use crate::regular;

/// The tokenizer of a directory.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a directory.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("tokenizer.json");
        let failed = |found: String| {
            Error::new(Code::TokenizerInvalid, path.display())
                .found(found)
                .expected("a tokenizer.json as the tokenizers library writes it")
                .help("put the repository's tokenizer.json into the directory")
        };
        let bytes = regular::read(&path, regular::TOKENIZER).map_err(|e| failed(e.to_string()))?;
        Self::from_json(&bytes).map_err(failed)
    }

    /// Reads the text of a `tokenizer.json`.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        guarded(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
            // Settings of whoever saved the file, no property of the model.
            inner.with_padding(None);
            inner.with_truncation(None)?;
            Ok(Self { inner })
        })
    }

    /// The tokens of a text; `special` adds those that the tokenizer puts around a prompt.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, special));
        Ok(encoding.map_err(|found| unusable("the text", found))?.get_ids().to_vec())
    }

    /// The text of tokens, without special ones.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        // tokenizers 0.23 panics where there is nothing to decode, with the decoder of the first GPT.
        if !ids.iter().any(|id| self.token(*id).is_some()) {
            return Ok(String::new());
        }
        guarded(|| self.inner.decode(ids, true)).map_err(|found| unusable("the tokens", found))
    }

    /// What the decoder gets for a token: nothing for special tokens, and for those that there are not.
    fn token(&self, id: u32) -> Option<String> {
        let token = self.inner.id_to_token(id)?;
        (!self.inner.get_added_vocabulary().is_special_token(&token)).then_some(token)
    }

    /// The bytes that a token stands for inside of a text, special tokens included: what transformers compares with
    /// stop strings.
    pub fn bytes(&self, id: u32) -> Result<Vec<u8>> {
        let Some(token) = self.inner.id_to_token(id) else { return Ok(Vec::new()) };
        let spelled = match self.inner.get_decoder().and_then(decoding::bytes_of) {
            Some(ByteTokens::Numbers) => decoding::byte_token(&token).map(|byte| vec![byte]),
            Some(ByteTokens::Letters) => alphabet::bytes(&token),
            None => None,
        };
        match spelled {
            Some(bytes) => Ok(bytes),
            None => guarded(|| self.inside(token)).map_err(|found| unusable("the tokens", found)),
        }
    }

    /// A token's text behind other tokens, where it keeps its space.
    fn inside(&self, token: String) -> tokenizers::Result<Vec<u8>> {
        const BEFORE: &str = "abcdef";
        let Some(decoder) = self.inner.get_decoder() else { return Ok(format!(" {token}").into_bytes()) };
        let before = self.inner.encode_fast(BEFORE, false)?;
        let mut tokens: Vec<String> = before.get_ids().iter().filter_map(|id| self.inner.id_to_token(*id)).collect();
        tokens.push(token.clone());
        let text = decoder.decode(tokens)?;
        match text.split_once(BEFORE) {
            Some((_, text)) => Ok(text.into()),
            // The tokenizer does not know these letters.
            None => decoder.decode(vec![token]).map(String::into_bytes),
        }
    }

    /// The token with a given text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}

/// What the library makes of a file. tokenizers 0.23 panics on some: on a merge that is longer than every token, and
/// on a `precompiled_charsmap` whose trie points beyond its end.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    let outcome = crate::guard::guarded(work);
    let outcome = outcome.unwrap_or_else(|| Err("contents that the tokenizers library fails on".into()));
    outcome.map_err(|e| e.to_string())
}

fn unusable(what: &str, found: String) -> Error {
    Error::new(Code::TokenizerInvalid, format!("{what}, by tokenizer.json"))
        .found(found)
        .expected("a tokenizer.json that fits its own parts")
        .help("put the repository's tokenizer.json into the directory")
}

#[cfg(test)]
mod tests;
