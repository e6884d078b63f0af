//! The parts of a tokenizer.json that special tokens are looked up in.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{HELP, invalid, text};
use crate::error::Result;

/// A token beside the vocabulary, as tokenizer.json writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "the file's own settings")]
pub(crate) struct AddedToken {
    pub(crate) id: i64,
    pub(crate) content: String,
    pub(crate) single_word: bool,
    pub(crate) lstrip: bool,
    pub(crate) rstrip: bool,
    pub(crate) normalized: bool,
    pub(crate) special: bool,
}

impl AddedToken {
    /// A token with Python's defaults.
    pub(super) fn plain(id: i64, content: &str, special: bool) -> Self {
        let content = content.to_owned();
        Self { id, content, single_word: false, lstrip: false, rstrip: false, normalized: !special, special }
    }

    /// From an object with `content`.
    pub(super) fn read(id: i64, value: &Value) -> Option<Self> {
        let flag = |key: &str| value.get(key).and_then(Value::as_bool);
        let special = flag("special").unwrap_or(false);
        Some(Self {
            single_word: flag("single_word").unwrap_or(false),
            lstrip: flag("lstrip").unwrap_or(false),
            rstrip: flag("rstrip").unwrap_or(false),
            normalized: flag("normalized").unwrap_or(!special),
            ..Self::plain(id, value.get("content")?.as_str()?, special)
        })
    }
}

/// What a tokenizer.json holds.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    pub(super) added: Vec<AddedToken>,
    /// Of the model alone.
    pub(super) ids: HashMap<String, i64>,
    /// The padding token of its padding, if it pads.
    pub(super) padding: Option<String>,
    pub(super) byte_level: bool,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Value>,
    padding: Option<Value>,
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Model {
    vocab: Option<Entries>,
}

/// Texts with ids, or pairs of a text and its score.
#[derive(Deserialize)]
#[serde(untagged)]
enum Entries {
    Map(HashMap<String, i64>),
    List(Vec<(String, serde::de::IgnoredAny)>),
}

impl Vocabulary {
    /// Reads a directory's tokenizer.json; `None` where there is none.
    pub(super) fn read(dir: &Path) -> Result<Option<Self>> {
        let Some(text) = text(dir, "tokenizer.json")? else { return Ok(None) };
        let path = dir.join("tokenizer.json");
        let wrong = |found: String| {
            let expected = "a tokenizer.json as the tokenizers library writes it";
            invalid(&path).found(found).expected(expected).help(HELP)
        };
        let file: File = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        let Some(entries) = file.model.and_then(|model| model.vocab) else {
            return Err(wrong("no `vocab` in a `model`".into()));
        };
        let ids = match entries {
            Entries::Map(ids) => ids,
            Entries::List(list) => list.into_iter().map(|(text, _)| text).zip(0..).collect(),
        };
        let mut added = Vec::new();
        for token in &file.added_tokens {
            let id = token.get("id").and_then(Value::as_i64);
            let read = id.and_then(|id| AddedToken::read(id, token));
            added.push(read.ok_or_else(|| wrong(format!("an added token without id or content: {token}")))?);
        }
        let padding = file.padding.as_ref().and_then(|padding| padding.get("pad_token")?.as_str());
        Ok(Some(Self { added, ids, padding: padding.map(str::to_owned), byte_level: text.contains("\"ByteLevel\"") }))
    }

    pub(super) fn added(&self, content: &str) -> Option<&AddedToken> {
        self.added.iter().find(|token| token.content == content)
    }

    pub(super) fn id(&self, content: &str) -> Option<i64> {
        self.added(content).map(|token| token.id).or_else(|| self.ids.get(content).copied())
    }

    /// The id that the tokenizers library gives to a new token.
    pub(super) fn next_id(&self) -> i64 {
        let size = i64::try_from(self.ids.len()).unwrap_or(i64::MAX);
        let last = self.added.iter().map(|token| token.id).max();
        last.map_or(size, |last| if last >= size || size == 0 { last.saturating_add(1) } else { size })
    }

    /// Adds a token, or gives one that is there its settings.
    pub(super) fn add(&mut self, token: AddedToken) {
        match self.added.iter_mut().find(|known| known.content == token.content) {
            Some(known) => *known = token,
            None => self.added.push(token),
        }
    }
}
