//! What a directory says about generating: `generation_config.json`, read as transformers 5.23 reads it, or `config.json`
//! where that file is absent; and what the user says instead.

mod processors;
mod setting;
#[cfg(test)]
mod tests;
mod unfollowed;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use super::stop::Stop;
use super::{Choice, Settings};
use crate::chat::SpecialTokens;
use crate::error::{Code, Error, Result};
use crate::read::{contained, from_model_config, json_file};
use processors::{Task, Warpers};
use setting::Setting;
#[cfg(test)]
pub(super) use tests::recorded;

/// New tokens when neither the user nor the model says how many.
const NEW_TOKENS: usize = 256;

/// The settings of a directory.
#[derive(Debug, Clone, Default)]
pub struct GenerationConfig {
    /// The file that they are from.
    file: PathBuf,
    values: Map<String, Value>,
    /// Files whose `eos_token_id` counts where the settings have none, with what they say.
    fallback: Vec<(PathBuf, Value)>,
    /// The token that ends a text for the tokenizer.
    tokenizer_end: Option<u32>,
    /// Tokens that the model has.
    vocabulary: Option<usize>,
    /// Longest prompt and continuation together.
    pub context: Option<usize>,
}

/// What the user chooses in place of the configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Overrides {
    /// Longest continuation in tokens.
    pub max_new_tokens: Option<usize>,
    /// Divides the scores; 0 takes the likeliest token.
    pub temperature: Option<f32>,
    /// Number of candidates; 0 is all.
    pub top_k: Option<usize>,
    /// Probability of the candidates together.
    pub top_p: Option<f32>,
    /// Where the random numbers start.
    pub seed: u64,
    /// The prompt is a chat's: the tokenizer's end, which the configurations may not name, ends the answer as well.
    pub chat: bool,
}

impl Overrides {
    /// Whether tokens are drawn at random, if the user says it.
    fn sampled(&self) -> Option<bool> {
        let drawn = self.top_p.is_some() || self.top_k.is_some();
        self.temperature.map(|temperature| temperature > 0.0).or(drawn.then_some(true))
    }
}

impl GenerationConfig {
    /// Reads a directory. Files that are absent say nothing.
    pub fn read(directory: &Path) -> Result<Self> {
        let read = |name: &str| match directory.join(name).symlink_metadata() {
            Ok(_) => json_file(&contained(directory, name)?).map(Some),
            Err(_) => Ok(None),
        };
        let (generation, genai) = (read("generation_config.json")?, read("genai_config.json")?.unwrap_or_default());
        let config = read("config.json")?.unwrap_or_default();
        let text = config.get("text_config").and_then(Value::as_object);
        let size = |key: &str, of_genai: &str| {
            let count = |value: Option<&Value>| value?.as_u64().and_then(|n| usize::try_from(n).ok());
            let model = genai.get("model").and_then(|model| model.get(of_genai));
            count(model).or_else(|| count(config.get(key))).or_else(|| count(text?.get(key)))
        };
        let ends = [Some(&config), text].into_iter().flatten().filter_map(|config| config.get("eos_token_id"));
        let file = if generation.is_some() { "generation_config.json" } else { "config.json" };
        Ok(Self {
            file: directory.join(file),
            fallback: ends.map(|value| (directory.join("config.json"), value.clone())).collect(),
            tokenizer_end: SpecialTokens::read(directory)
                .ok()
                .and_then(|tokens| tokens.id("eos_token"))
                .and_then(|id| u32::try_from(id).ok()),
            vocabulary: size("vocab_size", "vocab_size"),
            context: size("max_position_embeddings", "context_length"),
            values: generation.unwrap_or_else(|| from_model_config(&config)),
        })
    }

    /// How a prompt is continued.
    ///
    /// # Errors
    /// Values that transformers refuses, and a prompt that is too long.
    pub fn settings(&self, prompt: &[u32], overrides: &Overrides) -> Result<Settings> {
        let max_new_tokens = self.max_new_tokens(prompt.len(), overrides)?;
        let sampled = self.sampled(overrides)?;
        let Overrides { temperature, top_k, top_p, seed, .. } = *overrides;
        let task = Task {
            prompt,
            length: prompt.len().saturating_add(max_new_tokens),
            end: self.end(overrides.chat)?,
            warpers: sampled.then_some(Warpers { temperature, top_k, top_p }),
        };
        Ok(Settings {
            max_new_tokens,
            processors: self.processors(&task)?,
            choice: if sampled { Choice::Drawn { seed } } else { Choice::Likeliest },
            stop: self.stop(&task)?,
        })
    }

    /// What is asked for and not done, a sentence each.
    ///
    /// # Errors
    /// A `do_sample` that is neither true nor false.
    pub fn notes(&self, overrides: &Overrides) -> Result<Vec<String>> {
        Ok(self.unfollowed(self.sampled(overrides)?, overrides.sampled().is_some()))
    }

    fn sampled(&self, overrides: &Overrides) -> Result<bool> {
        overrides.sampled().map_or_else(|| self.is_set("do_sample"), Ok)
    }

    /// The user's number, the configuration's, what `max_length` leaves, or ours; no more than the model has room for.
    fn max_new_tokens(&self, prompt: usize, overrides: &Overrides) -> Result<usize> {
        let wanted = match (overrides.max_new_tokens, self.get("max_new_tokens"), self.get("max_length")) {
            (Some(wanted), ..) => wanted,
            (_, Some(setting), _) => setting.count()?.ok_or_else(|| setting.wrong("a whole number above 0"))?,
            (.., Some(setting)) => {
                let left = setting.count()?.and_then(|length| length.checked_sub(prompt)).filter(|left| *left > 0);
                left.ok_or_else(|| setting.wrong(format!("more than the {prompt} tokens of the prompt")))?
            }
            _ => NEW_TOKENS,
        };
        match self.context.map(|context| (context, context.saturating_sub(prompt))) {
            Some((context, 0)) => Err(Error::new(Code::UsageInvalid, "the prompt")
                .found(format!("{prompt} tokens"))
                .expected(format!("fewer than the model's {context}"))
                .help("shorten it")),
            Some((_, left)) => Ok(wanted.min(left)),
            None => Ok(wanted),
        }
    }

    fn stop(&self, task: &Task<'_>) -> Result<Stop> {
        Ok(Stop {
            tokens: task.end.clone(),
            strings: self.get("stop_strings").map_or(Ok(Vec::new()), |setting| setting.texts())?,
            time: match self.get("max_time") {
                // What is longer than a duration can be does not end it.
                Some(setting) => Duration::try_from_secs_f64(setting.number()?.max(0.0)).ok(),
                None => None,
            },
        })
    }

    /// Tokens that end a text, each once. transformers' `generate` does not ask the tokenizer. A chat's answer ends with
    /// the tokenizer's end too, as `genai_config.json` has it; so does a text whose end nothing else names.
    fn end(&self, chat: bool) -> Result<Vec<u32>> {
        let mut end = self.configured_end()?;
        let asked = chat || end.is_empty();
        end.extend(self.tokenizer_end.filter(|token| asked && !end.contains(token)));
        Ok(end)
    }

    fn configured_end(&self) -> Result<Vec<u32>> {
        let key = "eos_token_id";
        let own = self.values.get(key).map(|value| (&self.file, value));
        for (file, value) in own.into_iter().chain(self.fallback.iter().map(|(file, value)| (file, value))) {
            let setting = Setting { file, key, value };
            let mut end = if value.is_null() { Vec::new() } else { setting.tokens()? };
            end.sort_unstable();
            end.dedup();
            if !end.is_empty() {
                return Ok(end);
            }
        }
        Ok(Vec::new())
    }

    /// A setting that is not null.
    fn get(&self, key: &'static str) -> Option<Setting<'_>> {
        let value = self.values.get(key).filter(|value| !value.is_null())?;
        Some(Setting { file: &self.file, key, value })
    }

    fn count(&self, key: &'static str) -> Result<Option<usize>> {
        self.get(key).map_or(Ok(None), |setting| setting.count())
    }

    /// True if a setting is true; absent is false.
    fn is_set(&self, key: &'static str) -> Result<bool> {
        self.get(key).map_or(Ok(false), |setting| setting.flag())
    }
}
