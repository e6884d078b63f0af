//! `genai_config.json`: what onnxruntime-genai has to know of a model. Keys as its version 0.18 reads them.

use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use super::consumers::Signature;
use crate::chat::SpecialTokens;
use crate::read::{Repository, token_numbers, whole};

/// The whole file, and what of the repository's settings it does not have. `type` is "decoder", which stands for every
/// architecture that genai has no name for.
pub(crate) fn genai_config(
    repository: &Repository,
    signature: &Signature,
    tokens: &SpecialTokens,
) -> (Value, Vec<String>) {
    let mut notes = Vec::new();
    let mut model = token_ids(repository, tokens, signature.vocab_size, &mut notes);
    model.insert("context_length".into(), signature.context_length.into());
    model.insert("decoder".into(), decoder(signature));
    model.insert("type".into(), "decoder".into());
    model.insert("vocab_size".into(), signature.vocab_size.into());
    let search = Hints { repository, notes: &mut notes }.search(signature);
    (json!({ "model": model, "search": search }), notes)
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
fn token_ids(
    repository: &Repository,
    tokens: &SpecialTokens,
    vocab_size: usize,
    notes: &mut Vec<String>,
) -> Map<String, Value> {
    let mut model = Map::new();
    let mut ids = |key| ids(repository, tokens, (key, vocab_size), notes);
    let beginning = ids("bos_token_id").first().copied().unwrap_or(1);
    let mut ends = ids("eos_token_id");
    let padding = ids("pad_token_id").first().or(ends.first()).copied();
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

/// Token ids under this key: of `generation_config.json`, else `config.json`, else the tokenizer. A wrong form is said
/// and passed over; in `config.json` it was refused before.
fn ids(
    repository: &Repository,
    tokens: &SpecialTokens,
    (key, vocab_size): (&str, usize),
    notes: &mut Vec<String>,
) -> Vec<i64> {
    let kept = |ids: Vec<i64>| -> Vec<i64> { ids.into_iter().filter(|id| is_token(*id, vocab_size)).collect() };
    if let Some(value) = repository.generation_config.as_ref().and_then(|config| config.get(key)) {
        match token_numbers(value).map(kept) {
            Some(found) if !found.is_empty() => return found,
            Some(_) => {}
            None => notes.push(format!(
                "generation_config.json: key `{key}` is {value}, not a token's number or a list of them: genai_config.json \
                 does without it, and `generate` refuses it"
            )),
        }
    }
    let found = repository.config.get(key).and_then(token_numbers).map(kept).unwrap_or_default();
    if !found.is_empty() {
        return found;
    }
    let special = tokens.id(key.trim_end_matches("_id"));
    special.into_iter().filter(|id| is_token(*id, vocab_size)).collect()
}

/// What the repository asks of a search. These are hints: the model does not depend on them, so one of a wrong form is
/// said, and genai gets what it can read.
struct Hints<'r> {
    repository: &'r Repository,
    notes: &'r mut Vec<String>,
}

impl<'r> Hints<'r> {
    fn search(&mut self, signature: &Signature) -> Value {
        let vocabulary = u64::try_from(signature.vocab_size).unwrap_or(u64::MAX);
        // Others spell "all" so, which genai and transformers spell 0.
        let all = self.value("top_k").is_some_and(|(_, value)| value.as_i64().is_some_and(|k| k < 0));
        let beams = self.count("num_beams", 1, 1..=32);
        let sequences = self.count("num_return_sequences", 1, 1..=beams);
        json!({
            "diversity_penalty": self.number("diversity_penalty", 0.0, "a number", |_| true),
            "do_sample": self.hint("do_sample", json!(false), "true or false", |value| value.is_boolean().then(|| value.clone())),
            "early_stopping": true,
            "length_penalty": self.number("length_penalty", 1.0, "a number", |_| true),
            "max_length": signature.context_length,
            "min_length": 0,
            "no_repeat_ngram_size": self.count("no_repeat_ngram_size", 0, 0..=i32::MAX.unsigned_abs().into()),
            "num_beams": beams,
            "num_return_sequences": sequences,
            "past_present_share_buffer": signature.share_buffer,
            "repetition_penalty": self.number("repetition_penalty", 1.0, "a number above 0", |n| n > 0.0),
            "temperature": self.number("temperature", 1.0, "a number from 0 up", |n| n >= 0.0),
            "top_k": self.count("top_k", if all { 0 } else { vocabulary.min(50) }, 0..=vocabulary),
            "top_p": self.number("top_p", 1.0, "a number from 0 to 1", |n| (0.0..=1.0).contains(&n)),
        })
    }

    fn number(&mut self, key: &str, default: f64, expected: &str, fits: impl Fn(f64) -> bool) -> Value {
        let taken = |value: &Value| value.as_f64().is_some_and(&fits).then(|| value.clone());
        self.hint(key, json!(default), expected, taken)
    }

    fn count(&mut self, key: &str, default: u64, range: RangeInclusive<u64>) -> u64 {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        let taken = |value: &Value| whole(value).and_then(|n| u64::try_from(n).ok()).filter(|n| range.contains(n));
        self.hint(key, json!(default), &expected, |value| taken(value).map(Value::from)).as_u64().unwrap_or(default)
    }

    /// A setting, or the default where there is none and where genai can not take what there is.
    fn hint(&mut self, key: &str, default: Value, expected: &str, taken: impl Fn(&Value) -> Option<Value>) -> Value {
        let Some((file, value)) = self.value(key) else { return default };
        taken(value).unwrap_or_else(|| {
            let note = format!("{file}: key `{key}` is {value}, not {expected}: genai_config.json has {default}");
            self.notes.push(note);
            default
        })
    }

    /// A setting of `generation_config.json`, else of `config.json`, where old repositories have them. Null means unset.
    fn value(&self, key: &str) -> Option<(&'static str, &'r Value)> {
        let generation = self.repository.generation_config.as_ref().map(|config| ("generation_config.json", config));
        let configs = generation.into_iter().chain([("config.json", &self.repository.config)]);
        configs.filter_map(|(file, config)| Some((file, config.get(key)?))).find(|(_, value)| !value.is_null())
    }
}
