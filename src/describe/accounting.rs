//! Accounting: every key of a configuration is used, or known to be without effect, or an error.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value};

use super::expression::mentions;
use super::rope;
use super::template::Template;
use crate::encoding::Keys;
use crate::error::{Code, Error, Result};

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
pub(super) fn account(template: &Template, config: &Map<String, Value>, allowed: &[String]) -> Result<Accounting> {
    let mut mentioned: BTreeSet<String> = BTreeSet::new();
    for expression in template.expressions() {
        mentioned.extend(mentions(&expression));
    }
    if mentioned.contains("rope") || mentioned.iter().any(|name| name.starts_with("rope.")) {
        mentioned.extend(rope::KEYS.map(str::to_owned));
        mentioned.insert("original_max_position_embeddings".to_owned());
    }
    let mut accounting = Accounting::default();
    for (key, value) in flat_keys(config, &mentioned) {
        if mentioned.contains(&key) {
            accounting.used.push(key);
        } else if let Some(reason) = reason(template, &key).or_else(|| reason(template, bare(&key))) {
            accounting.without_effect.insert(key, reason);
        } else if allowed.contains(&key) {
            accounting.allowed.push(key);
        } else {
            return Err(unused(template, &key, value, &mentioned));
        }
    }
    Ok(accounting)
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

fn reason(template: &Template, key: &str) -> Option<String> {
    template.table("without_effect")?.get(key)?.as_str().map(str::to_owned)
}

fn unused(template: &Template, key: &str, value: &Value, mentioned: &BTreeSet<String>) -> Error {
    if key == "quantization_config" || key == "compression_config" {
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Error::new(Code::QuantizationUnsupported, format!("config.json: {key}"))
            .found(format!("weights quantised with {method}"))
            .expected("float32, bfloat16 or float16 weights")
            .help("use the checkpoint from which this one was quantised");
    }
    let near = mentioned.iter().filter(|name| !name.contains('.')).min_by_key(|name| distance(name, key));
    let near = near.filter(|name| distance(name, key) <= 2);
    let near = near.map_or(String::new(), |name| format!(", or did it mean {name}?"));
    Error::new(Code::ConfigUnusedKey, format!("config.json: {key}"))
        .found(value)
        .expected(format!("a key that template {} knows{near}", template.name))
        .help(format!(
            "if it does not change the computation, pass --allow-unused-key {key}; if it does, a template must say how"
        ))
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
