//! The files beside the model that consumers expect: onnxruntime-genai, transformers.js and optimum
//! load the directory as it is.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::genai::genai_config;
use super::tokenizer::{copy_tokenizer, tokenizer_notes};
use crate::chat::SpecialTokens;
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::read::{Repository, contained, from_model_config};
use crate::regular;

/// What consumers have to know of the written model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// The model inside the directory, with `/`: `onnx/model.onnx`.
    pub onnx_file: String,
    /// What the weights are stored in; it names the files.
    pub dtype: ElementType,
    /// What transformers.js calls the quantised model: `q4`, `int8`.
    pub quantized: Option<&'static str>,
    /// What the cache is made of.
    pub cache: ElementType,
    /// How many external data files the model has.
    pub data_files: usize,
    /// Width of the logits.
    pub vocab_size: usize,
    /// Longest sequence, prompt and answer together.
    pub context_length: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Layers that have a cache.
    pub layers: usize,
    /// Query heads.
    pub attention_heads: usize,
    /// Heads of the cache.
    pub kv_heads: usize,
    /// Last dimension of the cache.
    pub head_size: usize,
    /// The graph updates its cache in place, so past and present may be one buffer.
    pub share_buffer: bool,
    /// The graph has the input `position_ids`.
    pub position_ids: bool,
    /// The execution provider that the graph is for; the CPU if there is none.
    pub provider: Option<String>,
}

/// Which files were written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConsumerFiles {
    /// All of them, sorted, relative to the directory.
    pub written: Vec<String>,
    /// Those of the tokenizer among them. None: the repository has no tokenizer, and consumers need one.
    pub tokenizer: Vec<String>,
    /// What a person should know before using the directory, a sentence each.
    pub notes: Vec<String>,
}

/// Writes `config.json`, `generation_config.json`, `genai_config.json` and the tokenizer's files.
pub fn write_consumer_files(repository: &Repository, signature: &Signature, directory: &Path) -> Result<ConsumerFiles> {
    let write = |name: &str, value: &Value| write_json(&directory.join(name), value);
    write("config.json", &Value::Object(config(&repository.config, signature)))?;
    if repository.generation_config.is_some() {
        copy_generation_config(repository, directory)?;
    } else {
        write("generation_config.json", &generation_config(&repository.config))?;
    }
    let read = SpecialTokens::read(&repository.dir);
    let none = SpecialTokens::default();
    let tokens = read.as_ref().unwrap_or(&none);
    if let Some(contradiction) = tokens.contradiction() {
        return Err(contradiction.clone());
    }
    let (genai, mut notes) = genai_config(repository, signature, tokens);
    write("genai_config.json", &genai)?;
    let tokenizer = copy_tokenizer(&repository.dir, directory, tokens)?;
    let mut written: Vec<String> =
        ["config.json", "generation_config.json", "genai_config.json"].map(str::to_owned).into();
    written.extend(tokenizer.iter().cloned());
    written.sort();
    notes.extend(tokenizer_notes(&repository.dir, &tokenizer, &read));
    if genai.pointer("/model/eos_token_id").is_none() {
        notes.push("no eos_token_id is known: onnxruntime-genai will stop at token 0".into());
    }
    Ok(ConsumerFiles { written, tokenizer, notes })
}

/// The source's configuration with what transformers.js has to know. What it says of the files of
/// this directory is ours to say; every other key is the source's.
fn config(source: &Map<String, Value>, signature: &Signature) -> Map<String, Value> {
    let mut config = source.clone();
    let mut options = match config.get("transformers.js_config") {
        Some(Value::Object(options)) => options.clone(),
        _ => Map::new(),
    };
    let dtype = match (signature.quantized, signature.dtype) {
        (Some(name), _) => Some(name),
        (None, ElementType::F32) => Some("fp32"),
        (None, ElementType::F16) => Some("fp16"),
        // transformers.js has no name for it and can not run it.
        _ => None,
    };
    if let Some(dtype) = dtype {
        options.insert("dtype".into(), dtype.into());
    }
    if signature.cache == ElementType::F16 && !options.contains_key("kv_cache_dtype") {
        // Version 3 asks here; version 4 asks the graph.
        options.insert("kv_cache_dtype".into(), json!({ "fp16": "float16" }));
    }
    let mut data = match options.get("use_external_data_format") {
        Some(Value::Object(data)) => data.clone(),
        _ => Map::new(),
    };
    let file = signature.onnx_file.rsplit('/').next().unwrap_or_default();
    if signature.data_files > 0 {
        data.insert(file.into(), signature.data_files.into());
    }
    if !data.is_empty() {
        options.insert("use_external_data_format".into(), data.into());
    }
    config.insert("transformers.js_config".into(), options.into());
    config
}

/// What transformers derives from a configuration when there is no `generation_config.json`.
fn generation_config(config: &Map<String, Value>) -> Value {
    let mut generation = Map::new();
    generation.insert("_from_model_config".into(), true.into());
    generation.extend(from_model_config(config));
    generation.into()
}

fn copy_generation_config(repository: &Repository, directory: &Path) -> Result<()> {
    let name = "generation_config.json";
    let source = contained(&repository.dir, name)?;
    let bytes = regular::read(&source, regular::CONFIGURATION).map_err(|error| Error::io(&source, &error))?;
    if serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_ok() {
        return write_file(&directory.join(name), &bytes);
    }
    // Python's Infinity and the like, which only Python reads.
    write_json(&directory.join(name), &json!(repository.generation_config))
}

/// Writes JSON as Python's `indent=2` does, with a line end.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|error| Error::io(path, &error))
}

#[cfg(test)]
#[path = "consumers_tests.rs"]
mod tests;
