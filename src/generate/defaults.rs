//! What a directory says about generating: `generation_config.json`, and `config.json` where that is silent.

use std::path::Path;

use serde_json::Value as Json;

use crate::error::{Code, Error, Result};

/// Settings of a repository; `None` where it says nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Defaults {
    /// Tokens that end a text.
    pub stop: Vec<u32>,
    /// True if tokens are drawn at random.
    pub sample: bool,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Number of candidates.
    pub top_k: Option<usize>,
    /// Probability of the candidates together.
    pub top_p: Option<f32>,
    /// Lowers the logits of tokens that occurred.
    pub repetition_penalty: Option<f32>,
    /// Longest continuation.
    pub max_new_tokens: Option<usize>,
    /// Longest prompt and continuation together.
    pub context: Option<usize>,
}

impl Defaults {
    /// Reads a directory. Files that are absent say nothing.
    pub fn read(directory: &Path) -> Result<Self> {
        let generation = read_json(&directory.join("generation_config.json"))?;
        let config = read_json(&directory.join("config.json"))?;
        let genai = read_json(&directory.join("genai_config.json"))?;
        let text = config.get("text_config").unwrap_or(&Json::Null);
        let float = |key: &str| generation.get(key)?.to_string().parse::<f32>().ok();
        let count = |value: Option<&Json>| value?.as_u64().and_then(|n| usize::try_from(n).ok());
        let stop = [generation.get("eos_token_id"), config.get("eos_token_id"), text.get("eos_token_id")];
        Ok(Self {
            stop: stop.into_iter().flatten().map(ids).find(|ids| !ids.is_empty()).unwrap_or_default(),
            sample: generation.get("do_sample").and_then(Json::as_bool).unwrap_or(false),
            temperature: float("temperature"),
            top_k: count(generation.get("top_k")),
            top_p: float("top_p"),
            repetition_penalty: float("repetition_penalty"),
            max_new_tokens: count(generation.get("max_new_tokens")),
            context: count(genai.pointer("/model/context_length"))
                .or_else(|| count(config.get("max_position_embeddings")))
                .or_else(|| count(text.get("max_position_embeddings"))),
        })
    }
}

fn read_json(path: &Path) -> Result<Json> {
    match crate::regular::read(path, crate::regular::CONFIGURATION) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| Error::new(Code::ConfigInvalid, path.display()).found(e).expected("JSON")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Json::Null),
        Err(e) => Err(Error::io(path, &e)),
    }
}

/// One token or a list of them.
fn ids(value: &Json) -> Vec<u32> {
    let one = |v: &Json| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Json::Array(list) => list.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_tokens_are_one_or_many_and_config_fills_in() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Defaults::read(folder.path()).unwrap(), Defaults::default());
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("config.json", r#"{"eos_token_id": 7, "max_position_embeddings": 64}"#);
        assert_eq!(Defaults::read(folder.path()).unwrap().stop, [7]);
        write(
            "generation_config.json",
            r#"{"eos_token_id": [1, 2], "do_sample": true, "temperature": 1, "top_p": 0.8, "top_k": 20}"#,
        );
        let defaults = Defaults::read(folder.path()).unwrap();
        assert_eq!((defaults.stop.as_slice(), defaults.context), (&[1, 2][..], Some(64)));
        assert_eq!((defaults.temperature, defaults.top_p, defaults.top_k), (Some(1.0), Some(0.8), Some(20)));
        write("config.json", "{");
        assert_eq!(Defaults::read(folder.path()).unwrap_err().code, Code::ConfigInvalid);
    }
}
