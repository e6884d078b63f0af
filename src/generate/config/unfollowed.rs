//! What a configuration asks for and `generate` does not do: said, never passed over.

use serde_json::Value;

use super::GenerationConfig;
use crate::read::GENERATION_KEYS;

/// Keys that change the text and are not followed, the value at which they do not, and what happens instead.
const OTHERS: [(&str, &str, &str); 13] = [
    ("num_beams", "1", "one text is followed, no beams"),
    ("num_beam_groups", "1", "one text is followed, no groups of beams"),
    ("constraints", "", "the text is not constrained"),
    ("force_words_ids", "", "the words are not forced"),
    ("dola_layers", "", "the last layer alone decides"),
    ("guidance_scale", "1", "the prompt guides as far as the model lets it"),
    ("watermarking_config", "", "the text has no watermark"),
    ("token_healing", "false", "the prompt's last token stays"),
    ("num_return_sequences", "1", "one text is written"),
    ("prompt_lookup_num_tokens", "", "no tokens are guessed ahead, which changes the speed alone"),
    ("assistant_early_exit", "", "no tokens are guessed ahead, which changes the speed alone"),
    ("use_mtp", "false", "no tokens are guessed ahead, which changes the speed alone"),
    ("cache_implementation", "", "the cache is as the model was built"),
];

/// Caches that hold the same numbers.
const EXACT_CACHES: [&str; 9] = [
    "dynamic",
    "static",
    "offloaded",
    "offloaded_static",
    "sliding_window",
    "hybrid",
    "hybrid_chunked",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
];

/// Keys that count only where tokens are drawn at random, and the value at which they change nothing.
const SAMPLING: [(&str, &str); 8] = [
    ("temperature", "1"),
    ("top_k", "50"),
    ("top_p", "1"),
    ("min_p", ""),
    ("top_h", ""),
    ("typical_p", "1"),
    ("epsilon_cutoff", "0"),
    ("eta_cutoff", "0"),
];

/// What the file says of itself.
const OF_THE_FILE: [&str; 3] = ["_from_model_config", "_commit_hash", "transformers_version"];

impl GenerationConfig {
    /// What is not followed, a sentence each. `sampled`: tokens are drawn at random; `chosen`: the user said whether.
    pub(super) fn unfollowed(&self, sampled: bool, chosen: bool) -> Vec<String> {
        let file = self.file.file_name().map_or_else(|| "generation_config.json".into(), |name| name.to_string_lossy());
        let value = |key: &str, neutral: &str| self.values.get(key).filter(|value| !is(value, neutral));
        let mut said = Vec::new();
        for (key, neutral, instead) in OTHERS {
            let exact =
                |value: &&Value| key == "cache_implementation" && EXACT_CACHES.iter().any(|name| *value == *name);
            if let Some(value) = value(key, neutral).filter(|value| !exact(value)) {
                said.push(format!("{file}: `{key}` ({value}) is not followed: {instead}"));
            }
        }
        if let Some(alpha) = value("penalty_alpha", "0").filter(|_| !sampled && self.has_candidates()) {
            said.push(format!(
                "{file}: `penalty_alpha` ({alpha}) is not followed: no contrastive search, the likeliest token"
            ));
        }
        let idle: Vec<String> = SAMPLING
            .into_iter()
            .filter(|(key, neutral)| value(key, neutral).is_some())
            .map(|(key, _)| format!("`{key}`"))
            .collect();
        if !sampled && !chosen && !idle.is_empty() {
            let keys = idle.join(", ");
            said.push(format!(
                "{file}: {keys}: without `do_sample` the likeliest token is taken; --temperature samples"
            ));
        }
        let known = |key: &str| GENERATION_KEYS.contains(&key) || OF_THE_FILE.contains(&key);
        for (key, value) in self.values.iter().filter(|(key, value)| !known(key) && !value.is_null()) {
            said.push(format!(
                "{file}: `{key}` ({value}) is not followed: no setting of transformers 5.23 has this name"
            ));
        }
        said
    }

    /// Contrastive search is between several.
    fn has_candidates(&self) -> bool {
        self.values.get("top_k").is_none_or(|top_k| top_k.as_f64().is_some_and(|top_k| top_k > 1.0))
    }
}

/// True for null, and for the value that changes nothing.
fn is(value: &Value, neutral: &str) -> bool {
    match value {
        Value::Null => true,
        Value::Number(number) => number.as_f64() == neutral.parse().ok(),
        Value::Bool(flag) => !flag && neutral == "false",
        _ => false,
    }
}
