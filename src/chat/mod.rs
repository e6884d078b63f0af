//! Conversations as a model's tokenizer writes them: its special tokens, its chat templates, and what they render.
//!
//! One reading of the tokenizer's files, by transformers 5's rules, for all who need it: chat templates, stop tokens,
//! `genai_config.json` and the copied tokenizer.json.

mod classes;
mod conversation;
mod template;
mod tokens;
mod vocabulary;

use std::path::Path;

use serde_json::{Map, Value};

pub use conversation::Conversation;
pub use template::ChatTemplate;
pub use tokens::SpecialTokens;

pub use crate::jinja::Clock;

use crate::error::{Code, Error, Result};
use crate::read::{contained, json_object, text_file};
use crate::regular;

const HELP: &str = "repair the file, or copy the repository's again";

fn invalid(path: &Path) -> Error {
    Error::new(Code::TokenizerInvalid, path.display())
}

/// The text of a repository's file, or `None` where there is none.
fn text(dir: &Path, name: &str) -> Result<Option<String>> {
    if dir.join(name).symlink_metadata().is_err() {
        return Ok(None);
    }
    let path = contained(dir, name)?;
    // A vocabulary is larger than any settings.
    let most = if name == "tokenizer.json" { regular::TOKENIZER } else { regular::CONFIGURATION };
    text_file(&path, most).map(Some).map_err(|error| for_tokenizer(&dir.join(name), error))
}

/// The object in a repository's JSON file, or `None` where there is none.
fn object(dir: &Path, name: &str) -> Result<Option<Map<String, Value>>> {
    let Some(text) = text(dir, name)? else { return Ok(None) };
    let path = dir.join(name);
    json_object(&text, &path).map(Some).map_err(|error| for_tokenizer(&path, error))
}

/// An error about a file's contents, as one of the tokenizer.
fn for_tokenizer(path: &Path, error: Error) -> Error {
    match error.code {
        Code::ConfigInvalid => {
            let expected = if error.expected.is_empty() { "a text in UTF-8" } else { &error.expected };
            invalid(path).found(error.found).expected(expected).help(HELP)
        }
        _ => error,
    }
}
