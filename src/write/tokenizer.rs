//! The tokenizer's files. They are copied as they are, but for what transformers 5 spells in a way
//! that other consumers refuse.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::consumers::write_json;
use crate::chat::{ChatTemplate, SpecialTokens};
use crate::error::{Code, Error, Result};
use crate::read::{contained, json_file, json_object, text_file};
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
const TOKENIZER: &str = "tokenizer.json";
/// Directories of further chat templates.
const TEMPLATES: &[&str] = &["additional_chat_templates", "chat_templates"];

/// Copies what there is. The answer names the files, sorted; none is not an error.
pub(crate) fn copy_tokenizer(from: &Path, to: &Path, tokens: &SpecialTokens) -> Result<Vec<String>> {
    let mut copied = Vec::new();
    for name in FILES {
        match *name {
            TOKENIZER if !tokens.lacking().is_empty() => {
                write_json(&to.join(name), &complete(from, tokens)?)?;
                copied.push(TOKENIZER.to_owned());
            }
            name => copy(from, to, name, &mut copied)?,
        }
    }
    if present(from, CONFIG) {
        // A broken one is copied as it is, with a note.
        let spelled = json_file(&contained(from, CONFIG)?).ok().and_then(|config| spelled_for_all(config, tokens));
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

/// tokenizer.json with the tokens that other files add to it: its other readers look at it alone.
fn complete(from: &Path, tokens: &SpecialTokens) -> Result<Value> {
    let path = contained(from, TOKENIZER)?;
    let mut file = json_object(&text_file(&path, regular::TOKENIZER)?, &path)?;
    let mut added = match file.get("added_tokens") {
        Some(Value::Array(added)) => added.clone(),
        _ => Vec::new(),
    };
    for token in tokens.lacking() {
        let written = json!({
            "id": token.id, "content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
            "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special,
        });
        match added.iter_mut().find(|known| known.get("content").is_some_and(|text| *text == *token.content)) {
            Some(known) => *known = written,
            None => added.push(written),
        }
    }
    added.sort_by_key(|token| token.get("id").and_then(Value::as_i64));
    file.insert("added_tokens".into(), added.into());
    Ok(file.into())
}

/// What a person should know of the tokenizer before using the directory.
pub(crate) fn tokenizer_notes(from: &Path, copied: &[String], tokens: &Result<SpecialTokens>) -> Vec<String> {
    const TEXT: &str = "`hf2onnx generate`, onnxruntime-genai and transformers.js can not turn text into tokens";
    let mut notes = Vec::new();
    if copied.is_empty() {
        notes.push(format!("the repository has no tokenizer: {TEXT} before its files are put beside the model"));
    } else if !copied.iter().any(|name| name == TOKENIZER) {
        notes.push(format!(
            "the repository has no tokenizer.json (it has {}): {TEXT}; write one with transformers, \
             AutoTokenizer.from_pretrained(REPOSITORY).save_pretrained(REPOSITORY), and build again",
            copied.join(", ")
        ));
    }
    match tokens {
        Err(error) => {
            let next = if error.help.is_empty() { "copy the repository's file again" } else { &error.help };
            notes.push(format!("{}: {}: {TEXT} with it; {next}", error.subject, error.found));
        }
        Ok(tokens) => {
            let names: Vec<&str> = tokens.lacking().iter().map(|token| token.content.as_str()).collect();
            if !names.is_empty() {
                notes.push(format!("tokenizer.json: written with what other files say of {}", shortened(&names)));
            }
            match ChatTemplate::open(from, tokens.named()) {
                Ok(template) => notes.extend(template.iter().flat_map(ChatTemplate::notes)),
                Err(error) => {
                    notes.push(format!("{}: {}: no chat with it; {}", error.subject, error.found, error.help));
                }
            }
        }
    }
    notes
}

/// The first names of a list that may be long.
fn shortened(names: &[&str]) -> String {
    const MOST: usize = 8;
    let shown: Vec<String> = names.iter().take(MOST).map(|name| format!("{name:?}")).collect();
    let more = names.len().saturating_sub(MOST);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

/// Transformers 5's spelling as transformers 4, transformers.js and genai also read it. None when
/// there is nothing to change.
fn spelled_for_all(mut config: Map<String, Value>, tokens: &SpecialTokens) -> Option<Map<String, Value>> {
    let mut changed = false;
    // Special tokens that other files name: most readers look here alone.
    for (key, value) in tokens.named() {
        let own = config.get(key).map(|own| own.get("content").unwrap_or(own));
        if own != Some(value) {
            config.insert(key.clone(), value.clone());
            changed = true;
        }
    }
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
