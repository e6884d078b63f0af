//! What a repository says about generating text, as transformers 5.23 finds it.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};

/// The attributes of transformers 5.23's `GenerationConfig`, but for what it says of the file itself.
pub(crate) const GENERATION_KEYS: [&str; 71] = [
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "constraints",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "diversity_penalty",
    "do_sample",
    "dola_layers",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_length",
    "max_matching_ngram_size",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "penalty_alpha",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "return_dict_in_generate",
    "sequence_bias",
    "speculation_type",
    "stop_strings",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "token_healing",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
    "use_mtp",
    "watermarking_config",
];

/// The settings that transformers takes from a `config.json` where there is no `generation_config.json`
/// (`GenerationConfig.from_model_config`): its keys of these names, and those of the text model's configuration where
/// it has none.
pub(crate) fn from_model_config(config: &Map<String, Value>) -> Map<String, Value> {
    let filled = |value: &&Value| value.as_object().is_some_and(|inner| !inner.is_empty());
    let inner = ["decoder", "generator", "text_config"].iter().filter_map(|name| config.get(*name)).find(filled);
    let mut found = Map::new();
    for key in GENERATION_KEYS {
        let values = [Some(config), inner.and_then(Value::as_object)].into_iter().flatten();
        if let Some(value) = values.filter_map(|config| config.get(key)).find(|value| !value.is_null()) {
            found.insert(key.into(), value.clone());
        }
    }
    // A spelling of BART's first days.
    let forced = config.get("force_bos_token_to_be_generated").is_some_and(|value| value == true);
    if let Some(start) = config.get("bos_token_id").filter(|start| forced && !start.is_null()) {
        found.insert("forced_bos_token_id".into(), start.clone());
    }
    found
}

/// Refuses a `config.json` whose special tokens are no numbers, as transformers does when it loads the model.
///
/// # Errors
/// Such a key, by name.
pub(crate) fn check_token_ids(config: &Map<String, Value>, file: &Path) -> Result<()> {
    let text = config.get("text_config").and_then(Value::as_object);
    for config in [Some(config), text].into_iter().flatten() {
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            let numbers = |value: &Value| match value {
                Value::Array(list) => list.iter().all(Value::is_i64),
                other => other.is_null() || other.is_i64(),
            };
            if let Some(value) = config.get(key).filter(|value| !numbers(value)) {
                return Err(Error::new(Code::ConfigInvalid, format!("{}: key `{key}`", file.display()))
                    .found(value)
                    .expected("a token's number, a list of them, or null")
                    .help("correct the file: transformers refuses it as well"));
            }
        }
    }
    Ok(())
}

/// The numbers of one token or of a list of them; nothing if one is no whole number.
pub(crate) fn token_numbers(value: &Value) -> Option<Vec<i64>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(list) => list.iter().map(whole).collect(),
        one => whole(one).map(|number| vec![number]),
    }
}

/// A whole number, written as one or as `5.0`.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    #[expect(clippy::cast_possible_truncation, reason = "the range is checked")]
    let whole = |float: f64| (float.fract() == 0.0 && float.abs() < 1e15).then_some(float as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn settings_of_old_configurations() {
        let config = json!({"model_type": "bart", "max_length": 9, "top_k": null, "do_sample": true, "hidden_size": 4,
            "bos_token_id": 3, "force_bos_token_to_be_generated": true, "text_config": {"top_k": 7, "max_length": 5, "x": 1}});
        let expected =
            json!({"max_length": 9, "top_k": 7, "do_sample": true, "bos_token_id": 3, "forced_bos_token_id": 3});
        assert_eq!(from_model_config(&object(config)), object(expected));
    }

    #[test]
    fn special_tokens_are_numbers() {
        let check = |config: Value| check_token_ids(&object(config), Path::new("config.json"));
        for right in [json!(2), json!([2, 3]), json!([]), json!(null), json!(-1)] {
            check(json!({"eos_token_id": right, "text_config": {"eos_token_id": right}})).unwrap();
        }
        // As transformers 5.23 refuses them for a Llama.
        for wrong in [
            json!("2"),
            json!("</s>"),
            json!(2.0),
            json!(2.7),
            json!(true),
            json!([2, "3"]),
            json!([2, 3.0]),
            json!([[2]]),
            json!({"a": 1}),
        ] {
            for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
                for config in [json!({key: wrong}), json!({"text_config": {key: wrong}})] {
                    let error = check(config).unwrap_err();
                    assert_eq!((error.code, error.subject), (Code::ConfigInvalid, format!("config.json: key `{key}`")));
                }
            }
        }
    }
}
