//! The tokenizer's files. They are copied as they are, but for what transformers 5 spells in a way
//! that other consumers refuse.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::consumers::write_json;
use crate::error::{Code, Error, Result};
use crate::read::{contained, json_file};
use crate::regular;

/// Every file that some tokenizer is read from.
const FILES: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
];
const CONFIG: &str = "tokenizer_config.json";
/// Directories of further chat templates.
const TEMPLATES: &[&str] = &["additional_chat_templates", "chat_templates"];

/// Copies what there is. The answer names the files, sorted; none is not an error.
pub(crate) fn copy_tokenizer(from: &Path, to: &Path) -> Result<Vec<String>> {
    let mut copied = Vec::new();
    for name in FILES {
        copy(from, to, name, &mut copied)?;
    }
    if present(from, CONFIG) {
        // A broken one is copied as it is: who reads it says what is wrong with it.
        let spelled = json_file(&contained(from, CONFIG)?).ok().and_then(spelled_for_all);
        if let Some(config) = spelled {
            write_json(&to.join(CONFIG), &Value::Object(config))?;
            copied.push(CONFIG.to_owned());
        } else {
            copy(from, to, CONFIG, &mut copied)?;
        }
    }
    for directory in TEMPLATES {
        if present(from, directory) {
            copy_templates(from, to, directory, &mut copied)?;
        }
    }
    copied.sort();
    Ok(copied)
}

fn present(dir: &Path, name: &str) -> bool {
    dir.join(name).symlink_metadata().is_ok()
}

fn copy(from: &Path, to: &Path, name: &str, copied: &mut Vec<String>) -> Result<()> {
    if !present(from, name) {
        return Ok(());
    }
    let source = contained(from, name)?;
    let (reader, metadata) = regular::open(&source).map_err(|error| Error::io(&source, &error))?;
    let most = if Path::new(name).extension().is_some_and(|end| end == "jinja") {
        regular::CONFIGURATION
    } else {
        regular::TOKENIZER
    };
    if metadata.len() > most {
        let error = Error::new(Code::TokenizerInvalid, source.display()).found(format!("{} bytes", metadata.len()));
        return Err(error.expected(format!("at most {most}")).help("remove the file, or download it again"));
    }
    let target = to.join(name);
    // Not `fs::copy`, which would copy a cache's read-only mode along.
    File::create(&target)
        .and_then(|mut writer| std::io::copy(&mut reader.take(most), &mut writer))
        .map_err(|error| Error::io(&target, &error))?;
    copied.push(name.to_owned());
    Ok(())
}

fn copy_templates(from: &Path, to: &Path, directory: &str, copied: &mut Vec<String>) -> Result<()> {
    let source = contained(from, directory)?;
    if !source.is_dir() {
        return Ok(());
    }
    let entries = fs::read_dir(&source).map_err(|error| Error::io(&source, &error))?;
    let mut names: Vec<_> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| Path::new(name).extension().is_some_and(|end| end == "jinja"));
    names.sort();
    if !names.is_empty() {
        let target = to.join(directory);
        fs::create_dir_all(&target).map_err(|error| Error::io(&target, &error))?;
    }
    for name in names {
        copy(from, to, &format!("{directory}/{name}"), copied)?;
    }
    Ok(())
}

/// Transformers 5's spelling as transformers 4, transformers.js and genai also read it. None when
/// there is nothing to change.
fn spelled_for_all(mut config: Map<String, Value>) -> Option<Map<String, Value>> {
    let mut changed = false;
    if config.get("tokenizer_class").is_some_and(|class| class == "TokenizersBackend") {
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.shift_remove("backend");
        changed = true;
    }
    // Transformers 4 expects a map under this name, and the list under the other one, which 5 reads too.
    let is_list = config.get("extra_special_tokens").is_some_and(Value::is_array);
    if is_list && !config.contains_key("additional_special_tokens") {
        if let Some(list) = config.shift_remove("extra_special_tokens") {
            config.insert("additional_special_tokens".into(), list);
        }
        changed = true;
    }
    changed.then_some(config)
}

/// The id of a special token (`bos_token`, `eos_token`, `pad_token`), where the tokenizer's files say.
pub(crate) fn special_token(dir: &Path, key: &str) -> Option<i64> {
    let config = json_file(&contained(dir, CONFIG).ok()?).ok()?;
    let content = match config.get(key)? {
        Value::String(text) => text.as_str(),
        other => other.get("content")?.as_str()?,
    };
    added_tokens(dir).into_iter().find(|token| token.content == content).map(|token| token.id).or_else(|| {
        let decoder = config.get("added_tokens_decoder")?.as_object()?;
        let holds = |token: &Value| token.get("content").is_some_and(|text| text == content);
        decoder.iter().find(|(_, token)| holds(token))?.0.parse().ok()
    })
}

#[derive(Deserialize)]
struct AddedToken {
    id: i64,
    content: String,
}

/// `added_tokens` of tokenizer.json. The vocabulary beside it, millions of bytes, is skipped.
fn added_tokens(dir: &Path) -> Vec<AddedToken> {
    #[derive(Deserialize)]
    struct Tokenizer {
        #[serde(default)]
        added_tokens: Vec<AddedToken>,
    }
    let bytes = contained(dir, "tokenizer.json").ok().and_then(|path| regular::read(&path, regular::TOKENIZER).ok());
    let tokenizer = bytes.and_then(|bytes| serde_json::from_slice::<Tokenizer>(&bytes).ok());
    tokenizer.map(|tokenizer| tokenizer.added_tokens).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_is_downloaded() {
        for name in FILES.iter().chain([&CONFIG]) {
            assert!(crate::hub::is_wanted(name), "{name}");
        }
        for directory in TEMPLATES {
            assert!(crate::hub::is_wanted(&format!("{directory}/a.jinja")), "{directory}");
        }
    }
}
