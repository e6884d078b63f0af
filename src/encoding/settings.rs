//! Quantisation settings: which method it is, and what became of each key.

use std::collections::BTreeMap;

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};

/// The JSON files that can say how a checkpoint is quantised, parsed.
#[derive(Debug, Clone, Copy)]
pub struct Configs<'a> {
    /// config.json.
    pub config: &'a Map<String, Value>,
    /// `quantize_config.json` of `AutoGPTQ`, where there is one.
    pub quantize_config: Option<&'a Map<String, Value>>,
    /// `hf_quant_config.json` of `ModelOpt`, where there is one.
    pub hf_quant_config: Option<&'a Map<String, Value>>,
    /// `quanto_qmap.json` of optimum-quanto, where there is one.
    pub quanto_qmap: Option<&'a Map<String, Value>>,
}

/// What became of the keys of a quantisation configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keys {
    /// Where they stand: `config.json: quantization_config`, or a sidecar.
    pub source: String,
    /// Keys that say how weights are stored.
    pub used: Vec<String>,
    /// Keys that change no weight, and why.
    pub without_effect: BTreeMap<String, String>,
}

/// Keys that any method may carry along.
const ABOUT: &str = "says how the file was made, not what it holds";
const ACTIVATIONS: &str = "weights only: activations stay float";

/// One quantisation configuration.
#[derive(Debug)]
pub(super) struct Settings<'a> {
    pub(super) source: String,
    pub(super) method: String,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Settings<'a> {
    /// The configuration that applies, if the checkpoint is quantised at all.
    pub(super) fn find(configs: &Configs<'a>) -> Result<Option<Self>> {
        let nested = configs.config.get("text_config").and_then(Value::as_object);
        for (prefix, config) in [("", Some(configs.config)), ("text_config.", nested)] {
            for key in ["quantization_config", "compression_config"] {
                let source = format!("config.json: {prefix}{key}");
                match config.and_then(|config| config.get(key)) {
                    None | Some(Value::Null) => {}
                    Some(Value::Object(map)) => {
                        let method = method(map).ok_or_else(|| unknown(&source, "no quant_method"))?;
                        return Ok(Some(Self { source, method, map }));
                    }
                    Some(other) => return Err(unknown(&source, &other.to_string())),
                }
            }
        }
        let sidecar =
            |source: &str, method: &str, map| Some(Self { source: source.to_owned(), method: method.to_owned(), map });
        if let Some(map) = configs.hf_quant_config {
            let inner = map.get("quantization").and_then(Value::as_object).unwrap_or(map);
            return Ok(sidecar("hf_quant_config.json", "modelopt", inner));
        }
        if let Some(map) = configs.quanto_qmap {
            return Ok(sidecar("quanto_qmap.json", "quanto", map));
        }
        Ok(configs
            .quantize_config
            .and_then(|map| sidecar("quantize_config.json", &method(map).unwrap_or_else(|| "gptq".to_owned()), map)))
    }

    /// Accounts for every key: `used` ones are read, `about` ones change nothing, unset ones say nothing, any other is an error.
    pub(super) fn account(&self, used: &[&str], about: &[&str]) -> Result<Keys> {
        let mut keys = Keys { source: self.source.clone(), ..Keys::default() };
        for (key, value) in self.map {
            let name = key.as_str();
            let reason = if used.contains(&name) || name == "quant_method" {
                keys.used.push(key.clone());
                continue;
            } else if about.contains(&name) || COMMON.contains(&name) {
                ABOUT
            } else if name.contains("activation") || name.contains("kv_cache") {
                ACTIVATIONS
            } else if unset(value) || dense(value) {
                "not set"
            } else {
                return Err(Error::new(Code::ConfigUnusedKey, format!("{}: {key}", self.source))
                    .found(value)
                    .expected(format!("a key that is known for {}", self.method))
                    .help("nobody has said whether it changes the weights; report it with the checkpoint's name"));
            };
            keys.without_effect.insert(key.clone(), reason.to_owned());
        }
        Ok(keys)
    }

    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        self.map.get(key).and_then(Value::as_str)
    }

    pub(super) fn flag(&self, key: &str) -> bool {
        self.map.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    pub(super) fn list(&self, key: &str) -> Vec<&'a str> {
        texts(self.map.get(key))
    }

    /// An error about a value.
    pub(super) fn bad(&self, key: &str, expected: &str) -> Error {
        bad(&self.source, key, self.map.get(key), expected)
    }
}

const COMMON: [&str; 8] = [
    "producer",
    "meta",
    "tokenizer",
    "dataset",
    "model_seqlen",
    "model_name_or_path",
    "model_file_base_name",
    "_load_in_4bit",
];

pub(super) fn bad(source: &str, key: &str, found: Option<&Value>, expected: &str) -> Error {
    Error::new(Code::QuantizationUnsupported, format!("{source}.{key}"))
        .found(found.map_or_else(|| "nothing".to_owned(), ToString::to_string))
        .expected(expected)
        .help("use the checkpoint from which this one was quantised")
}

fn unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// compressed-tensors writes a `sparsity_config` that says that there is none.
fn dense(value: &Value) -> bool {
    value.get("format").and_then(Value::as_str) == Some("dense")
}

fn method(map: &Map<String, Value>) -> Option<String> {
    if let Some(method) = map.get("quant_method").and_then(Value::as_str) {
        return Some(method.to_lowercase());
    }
    let loads = ["load_in_4bit", "load_in_8bit"].iter().any(|key| map.get(*key) == Some(&Value::Bool(true)));
    if loads {
        return Some("bitsandbytes".to_owned());
    }
    map.contains_key("config_groups").then(|| "compressed-tensors".to_owned())
}

fn unknown(source: &str, found: &str) -> Error {
    Error::new(Code::QuantizationUnsupported, source)
        .found(found)
        .expected("a quantisation configuration with its quant_method")
        .help("use the checkpoint from which this one was quantised")
}

pub(super) fn texts(value: Option<&Value>) -> Vec<&str> {
    value.and_then(Value::as_array).map_or_else(Vec::new, |list| list.iter().filter_map(Value::as_str).collect())
}

/// A whole number of a configuration, which may also be -1 for "a whole row".
pub(super) fn size(value: Option<&Value>) -> Option<i64> {
    value.and_then(Value::as_i64)
}

/// A pattern that has to match from the start of a name, as Python's `re.match` does.
pub(super) fn pattern(source: &str, text: &str) -> Result<Regex> {
    Regex::new(&format!("^(?:{text})")).map_err(|error| {
        Error::new(Code::ConfigInvalid, source)
            .found(format!("the pattern {text}: {error}"))
            .expected("a regular expression")
    })
}

/// Whether a pattern matches; one that takes too many steps is an error.
pub(super) fn matches(source: &str, pattern: &Regex, name: &str) -> Result<bool> {
    pattern.is_match(name).map_err(|error| {
        Error::new(Code::ConfigInvalid, source)
            .found(format!("{}: {error}", pattern.as_str()))
            .expected("a pattern that ends")
    })
}

/// transformers' `should_convert_module` turned around: which modules are to be left as they are?
pub(super) struct Excluded<'s> {
    source: &'s str,
    /// A name's end, and the same as a pattern: compiled once, since each of the modules is held against each entry.
    entries: Vec<(&'s str, Regex)>,
}

impl<'s> Excluded<'s> {
    /// What `modules_to_not_convert` names.
    pub(super) fn read(settings: &'s Settings<'_>) -> Result<Self> {
        let source = settings.source.as_str();
        let entry = |entry: &'s str| Ok((entry, pattern(source, &entry.replace('*', ".*").replace("..*", ".*"))?));
        let entries = settings.list("modules_to_not_convert").into_iter().map(entry).collect::<Result<_>>()?;
        Ok(Self { source, entries })
    }

    pub(super) fn names(&self, module: &str) -> Result<bool> {
        for (entry, pattern) in &self.entries {
            if module.ends_with(entry) || matches(self.source, pattern, module)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
