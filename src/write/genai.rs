//! `genai_config.json`: what onnxruntime-genai has to know of a model. Keys as its version 0.18 reads them.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::consumers::Signature;
use crate::chat::SpecialTokens;
use crate::error::{Code, Error, Result};
use crate::read::Repository;

/// The whole file. `type` is "decoder", which stands for every architecture that genai has no name for.
pub(crate) fn genai_config(repository: &Repository, signature: &Signature, tokens: &SpecialTokens) -> Result<Value> {
    let mut model = token_ids(repository, tokens, signature.vocab_size);
    model.insert("context_length".into(), signature.context_length.into());
    model.insert("decoder".into(), decoder(signature));
    model.insert("type".into(), "decoder".into());
    model.insert("vocab_size".into(), signature.vocab_size.into());
    Ok(json!({ "model": model, "search": search(repository, signature)? }))
}

fn decoder(signature: &Signature) -> Value {
    let mut inputs = Map::new();
    let names = [
        ("input_ids", "input_ids", true),
        ("attention_mask", "attention_mask", true),
        ("position_ids", "position_ids", signature.position_ids),
        ("past_key_names", "past_key_values.%d.key", true),
        ("past_value_names", "past_key_values.%d.value", true),
    ];
    for (key, name, _) in names.into_iter().filter(|(_, _, written)| *written) {
        inputs.insert(key.into(), name.into());
    }
    // A provider's options are its name and what differs from its defaults.
    let providers: Vec<Value> = signature.provider.iter().map(|provider| json!({ provider: {} })).collect();
    json!({
        "session_options": { "log_id": "onnxruntime-genai", "provider_options": providers },
        "filename": signature.onnx_file,
        "head_size": signature.head_size,
        "hidden_size": signature.hidden_size,
        "inputs": inputs,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": signature.attention_heads,
        "num_hidden_layers": signature.layers,
        "num_key_value_heads": signature.kv_heads,
    })
}

/// The ids with the fallbacks of genai's own builder: beginning 1, padding the first end.
fn token_ids(repository: &Repository, tokens: &SpecialTokens, vocab_size: usize) -> Map<String, Value> {
    let mut model = Map::new();
    let beginning = ids(repository, tokens, "bos_token_id", vocab_size).first().copied().unwrap_or(1);
    let mut ends = ids(repository, tokens, "eos_token_id", vocab_size);
    let padding = ids(repository, tokens, "pad_token_id", vocab_size).first().or(ends.first()).copied();
    // A chat model's turn ends with the tokenizer's token, which the configurations may not name.
    if let Some(turn_end) = tokens.id("eos_token")
        && is_token(turn_end, vocab_size)
        && !ends.contains(&turn_end)
    {
        ends.insert(0, turn_end);
    }
    model.insert("bos_token_id".into(), beginning.into());
    match ends.as_slice() {
        [] => {}
        [one] => drop(model.insert("eos_token_id".into(), (*one).into())),
        _ => drop(model.insert("eos_token_id".into(), ends.into())),
    }
    if let Some(padding) = padding {
        model.insert("pad_token_id".into(), padding.into());
    }
    model
}

/// Genai refuses ids outside of the vocabulary. Some old repositories say -1 where there is none, or
/// name a padding token behind the last row of the embedding.
fn is_token(id: i64, vocab_size: usize) -> bool {
    usize::try_from(id).is_ok_and(|id| id < vocab_size)
}

/// Token ids under this key: of `generation_config.json`, else `config.json`, else the tokenizer.
fn ids(repository: &Repository, tokens: &SpecialTokens, key: &str, vocab_size: usize) -> Vec<i64> {
    let read = |config: &Map<String, Value>| -> Vec<i64> {
        let values = match config.get(key) {
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
            None => &[],
        };
        values.iter().filter_map(Value::as_i64).filter(|id| is_token(*id, vocab_size)).collect()
    };
    let of_generation = repository.generation_config.as_ref().map(read).unwrap_or_default();
    for found in [of_generation, read(&repository.config)] {
        if !found.is_empty() {
            return found;
        }
    }
    let special = tokens.id(key.trim_end_matches("_id"));
    special.into_iter().filter(|id| is_token(*id, vocab_size)).collect()
}

fn search(repository: &Repository, signature: &Signature) -> Result<Value> {
    let read = |key: &str, default: Value| setting(repository, key, default);
    Ok(json!({
        "diversity_penalty": read("diversity_penalty", json!(0.0))?,
        "do_sample": read("do_sample", json!(false))?,
        "early_stopping": true,
        "length_penalty": read("length_penalty", json!(1.0))?,
        "max_length": signature.context_length,
        "min_length": 0,
        "no_repeat_ngram_size": read("no_repeat_ngram_size", json!(0))?,
        "num_beams": read("num_beams", json!(1))?,
        "num_return_sequences": read("num_return_sequences", json!(1))?,
        "past_present_share_buffer": signature.share_buffer,
        "repetition_penalty": read("repetition_penalty", json!(1.0))?,
        "temperature": read("temperature", json!(1.0))?,
        "top_k": read("top_k", json!(50))?,
        "top_p": read("top_p", json!(1.0))?,
    }))
}

/// A setting of `generation_config.json`, else of `config.json` (where old repositories have them), else
/// the default. Null means unset; a value of another kind than the default is an error.
fn setting(repository: &Repository, key: &str, default: Value) -> Result<Value> {
    let configs =
        [("generation_config.json", repository.generation_config.as_ref()), ("config.json", Some(&repository.config))];
    for (file, config) in configs {
        let Some(value) = config.and_then(|config| config.get(key)).filter(|value| !value.is_null()) else {
            continue;
        };
        let fits = match &default {
            Value::Bool(_) => value.is_boolean(),
            Value::Number(number) if number.is_f64() => value.is_number(),
            _ => value.is_u64(),
        };
        if !fits {
            return Err(wrong_kind(&repository.dir.join(file), key, value, &default));
        }
        return Ok(value.clone());
    }
    Ok(default)
}

fn wrong_kind(file: &Path, key: &str, value: &Value, default: &Value) -> Error {
    Error::new(Code::ConfigInvalid, format!("{}: key `{key}`", file.display()))
        .found(value)
        .expected(format!("a value such as {default}"))
        .help("correct the file")
}
