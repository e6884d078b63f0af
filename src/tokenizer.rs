//! Text to tokens and back, and back again while the tokens still come.

use std::path::Path;

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
        guarded(|| self.inner.decode(ids, true)).map_err(|found| unusable("the tokens", found))
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

/// Turns tokens into text as they come. A piece is held back until its characters are whole.
#[derive(Debug)]
pub struct Stream<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
    /// Tokens before this one are printed and no longer needed as context.
    context: usize,
    /// Tokens before this one are printed.
    printed: usize,
}

impl<'t> Stream<'t> {
    /// A stream that continues a prompt: the prompt is context, and is not printed.
    pub fn new(tokenizer: &'t Tokenizer, prompt: &[u32]) -> Self {
        // A few tokens suffice: what a decoder does to a token depends on its neighbours only.
        let ids: Vec<u32> = prompt.iter().rev().take(8).rev().copied().collect();
        let printed = ids.len();
        Self { tokenizer, ids, context: 0, printed }
    }

    /// Adds a token; returns the text that is complete now, perhaps none.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let (before, now) = self.texts()?;
        // A replacement character at the end is the first half of a character, or of a text that has one.
        if now.len() <= before.len() || now.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.context = self.printed;
        self.printed = self.ids.len();
        Ok(addition(&before, &now))
    }

    /// What was held back, at the end of the text.
    pub fn finish(self) -> Result<String> {
        let (before, now) = self.texts()?;
        Ok(addition(&before, &now))
    }

    /// The text of the context with and without the tokens that are not printed.
    fn texts(&self) -> Result<(String, String)> {
        let printed = self.ids.get(self.context..self.printed).unwrap_or_default();
        let all = self.ids.get(self.context..).unwrap_or_default();
        Ok((self.tokenizer.decode(printed)?, self.tokenizer.decode(all)?))
    }
}

/// What `now` has beyond `before`.
fn addition(before: &str, now: &str) -> String {
    now.get(before.len()..).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-level tokenizer whose tokens are the 256 bytes, in the alphabet of GPT-2.
    fn bytes() -> Tokenizer {
        let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
        let mut next = 256;
        let mut vocabulary = serde_json::Map::new();
        for byte in 0..256_u32 {
            let letter = if printable(byte) { byte } else { next };
            next += u32::from(!printable(byte));
            vocabulary.insert(char::from_u32(letter).unwrap().to_string(), byte.into());
        }
        let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [{"id": 256, "content": "<end>", "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false}],
            "pre_tokenizer": level, "decoder": level, "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        });
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_character_is_printed_only_when_it_is_whole() {
        let tokenizer = bytes();
        let text = "naïve 🦀 漢字";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids.len(), text.len(), "one token a byte, and the file's truncation is ignored");
        let mut stream = Stream::new(&tokenizer, &tokenizer.encode("before ", false).unwrap());
        let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|p| !p.contains('\u{fffd}')));
        assert_eq!(pieces.iter().filter(|p| !p.is_empty()).count(), text.chars().count());
        assert_eq!(stream.finish().unwrap(), "");
    }

    #[test]
    fn what_never_becomes_whole_comes_at_the_end_and_special_tokens_not_at_all() {
        let tokenizer = bytes();
        let crab = tokenizer.encode("🦀", false).unwrap();
        let mut stream = Stream::new(&tokenizer, &[]);
        assert_eq!(stream.push(u32::from(b'a')).unwrap(), "a");
        assert_eq!(stream.push(256).unwrap(), "");
        assert_eq!(stream.push(crab[0]).unwrap(), "");
        assert_eq!(stream.push(crab[1]).unwrap(), "");
        assert!(stream.finish().unwrap().starts_with('\u{fffd}'));
        assert_eq!(tokenizer.id("<end>"), Some(256));
    }
}
