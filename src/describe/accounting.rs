//! Accounting: every key of a configuration is used, or known to be without effect, or an error.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::expression::mentions;
use super::rope;
use super::template::Template;
use crate::encoding::Keys;
use crate::error::{Code, Error, Result};
use crate::patterns::Patterns;

/// What became of a configuration's keys.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Accounting {
    /// Keys that an expression of the template mentions.
    pub used: Vec<String>,
    /// Keys that change nothing, and why.
    pub without_effect: BTreeMap<String, String>,
    /// Keys that the user allowed to be left unread.
    pub allowed: Vec<String>,
}

impl Accounting {
    /// Adds the keys that say how weights are stored, which the template is not shown: `stored` are those of config.json
    /// with what stands there, `keys` what became of the configuration that was followed.
    pub fn with_storage<'v>(&mut self, stored: impl Iterator<Item = (String, &'v Value)>, keys: Option<&Keys>) {
        for (key, value) in stored {
            let place = format!("config.json: {key}");
            match keys {
                _ if value.is_null() => drop(self.without_effect.insert(key, "not set".to_owned())),
                Some(keys) if keys.source == place => self.used.push(key),
                Some(keys) => drop(self.without_effect.insert(key, format!("{} says it", keys.source))),
                None => {}
            }
        }
        let Some(keys) = keys else { return };
        let of = |key: &String| match keys.source.strip_prefix("config.json: ") {
            Some(object) => format!("{object}.{key}"),
            None => format!("{}: {key}", keys.source),
        };
        self.used.extend(keys.used.iter().map(of));
        self.without_effect.extend(keys.without_effect.iter().map(|(key, reason)| (of(key), reason.clone())));
    }
}

/// Accounts for every key; a key counts as used when an expression of the template mentions it.
pub(super) fn account(template: &Template, config: &Map<String, Value>, allowed: &Patterns) -> Result<Accounting> {
    let mut mentioned: BTreeSet<String> = BTreeSet::new();
    for expression in template.expressions() {
        mentioned.extend(mentions(&expression));
    }
    if mentioned.contains("rope") || mentioned.iter().any(|name| name.starts_with("rope.")) {
        mentioned.extend(rope::KEYS.map(str::to_owned));
        mentioned.insert("original_max_position_embeddings".to_owned());
    }
    let mut accounting = Accounting::default();
    let mut unknown = Vec::new();
    for (key, value) in flat_keys(config, &mentioned) {
        if mentioned.contains(&key) {
            accounting.used.push(key);
        } else if let Some(harmless) = Harmless::of(template, &key)?.filter(|own| own.covers(value)) {
            accounting.without_effect.insert(key, harmless.reason);
        } else if value.is_null() {
            accounting.without_effect.insert(key, "not set".to_owned());
        } else if allowed.admits(&key) {
            accounting.allowed.push(key);
        } else {
            unknown.push((key, value));
        }
    }
    if let Some(quantized) = quantization(&unknown) {
        return Err(quantized);
    }
    if !unknown.is_empty() {
        return Err(unused(template, &unknown, &mentioned)?);
    }
    if let Some(passed_over) = rope::passed_over(config) {
        accounting.used.retain(|key| key != "rope_parameters");
        accounting.without_effect.insert("rope_parameters".to_owned(), passed_over);
    }
    Ok(accounting)
}

/// A key that changes no computation, at some values or at all.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Entry {
    Reason(String),
    AtValues {
        reason: String,
        /// The values at which it changes nothing; null is one of them always.
        at: Vec<Value>,
    },
}

#[derive(Debug)]
struct Harmless {
    reason: String,
    at: Option<Vec<Value>>,
}

impl Harmless {
    /// What a template says of a key, or of the last part of its name.
    fn of(template: &Template, key: &str) -> Result<Option<Self>> {
        let table = template.table("without_effect");
        let Some(entry) = table.and_then(|table| table.get(key).or_else(|| table.get(bare(key)))) else {
            return Ok(None);
        };
        let entry = entry.clone().try_into().map_err(|_| {
            template
                .error(Code::TemplateInvalid, &format!("without_effect.{}", bare(key)))
                .found(entry)
                .expected("a reason, or { reason = \"...\", at = [values] }")
                .help("mend the template")
        })?;
        Ok(Some(match entry {
            Entry::Reason(reason) => Self { reason, at: None },
            Entry::AtValues { reason, at } => Self { reason, at: Some(at) },
        }))
    }

    /// True if the key changes nothing at a value.
    fn covers(&self, value: &Value) -> bool {
        let same = |own: &Value| own == value || own.as_f64().is_some_and(|own| Some(own) == value.as_f64());
        value.is_null() || self.at.as_ref().is_none_or(|at| at.iter().any(same))
    }
}

/// The keys, with an object's own keys (`attn_config.clip_qkv`) where the template takes them one by one.
fn flat_keys<'c>(config: &'c Map<String, Value>, mentioned: &BTreeSet<String>) -> Vec<(String, &'c Value)> {
    let mut keys = Vec::new();
    for (key, value) in config {
        let prefix = format!("{key}.");
        let parts = mentioned.iter().any(|name| name.starts_with(&prefix));
        match value {
            Value::Object(inner) if parts => {
                keys.extend(inner.iter().map(|(part, value)| (format!("{prefix}{part}"), value)));
            }
            _ => keys.push((key.clone(), value)),
        }
    }
    keys
}

/// `dtype` of `attn_config.dtype`: an inner table says the same of itself.
fn bare(key: &str) -> &str {
    key.rsplit_once('.').map_or(key, |(_, bare)| bare)
}

/// The error of quantization settings that nothing read.
fn quantization(unknown: &[(String, &Value)]) -> Option<Error> {
    let (key, value) = unknown.iter().find(|(key, _)| key == "quantization_config" || key == "compression_config")?;
    let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
    let error = Error::new(Code::QuantizationUnsupported, format!("config.json: {key}"))
        .found(format!("weights quantised with {method}"))
        .expected("float32, bfloat16 or float16 weights")
        .help("use the checkpoint from which this one was quantised");
    Some(error)
}

/// All keys that nothing accounts for, each with its value and what it may have been meant for.
fn unused(template: &Template, unknown: &[(String, &Value)], mentioned: &BTreeSet<String>) -> Result<Error> {
    let names: Vec<&str> = unknown.iter().map(|(key, _)| key.as_str()).collect();
    let mut found = Vec::new();
    let mut expected = vec![format!("keys that template {} knows", template.name)];
    for (key, value) in unknown {
        found.push(if unknown.len() == 1 { value.to_string() } else { format!("{key}: {value}") });
        let near = mentioned.iter().filter(|name| !name.contains('.')).min_by_key(|name| distance(name, key));
        if let Some(near) = near.filter(|name| distance(name, key) <= 2) {
            expected.push(format!("or did {key} mean {near}?"));
        }
        if let Some(at) = Harmless::of(template, key)?.and_then(|own| own.at) {
            let at: Vec<String> = at.iter().map(Value::to_string).collect();
            expected.push(format!("{key} at {}, where it changes nothing", at.join(" or ")));
        }
    }
    let flags: Vec<String> = names.iter().map(|name| format!("--allow-unused-key {name}")).collect();
    let them = if unknown.len() == 1 { "it does" } else { "they do" };
    Ok(Error::new(Code::ConfigUnusedKey, format!("config.json: {}", names.join(", ")))
        .found(found.join(", "))
        .expected(expected.join(", "))
        .help(format!(
            "if {them} not change the computation, pass {}; if {them}, a template must say how",
            flags.join(" ")
        )))
}

/// Longest name that is compared letter by letter.
const LONGEST_NAME: usize = 100;

/// Levenshtein distance of the first hundred letters.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(LONGEST_NAME).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(LONGEST_NAME).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (slot, y) in row.iter_mut().zip(std::iter::once(None).chain(b.iter().map(Some))) {
            let above = *slot;
            *slot = match y {
                None => i + 1,
                Some(y) => (diagonal + usize::from(x != *y)).min(above + 1).min(left + 1),
            };
            diagonal = above;
            left = *slot;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn distances() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("rms_norm_eps", "rms_norm_eps"), 0);
        assert_eq!(distance(&"x".repeat(1_000_000), &"y".repeat(1_000_000)), 100, "and not a day later");
    }
}
