//! The chain of processors that a configuration asks for, in transformers' order (`_get_logits_processor`).

use super::GenerationConfig;
use crate::error::Result;
use crate::generate::logits::{
    EncoderNoRepeatNgram, Epsilon, Eta, ExponentialDecay, FiniteScores, ForcedEnd, ForcedStart, LogitsProcessors,
    MinLength, MinP, NoRepeatNgram, Normalized, RepetitionPenalty, SequenceBias, Suppressed, SuppressedAtStart,
    Temperature, TopH, TopK, TopP, Typical,
};

/// What the processors have to know beside the configuration.
#[derive(Debug)]
pub(super) struct Task<'t> {
    pub(super) prompt: &'t [u32],
    /// Most tokens, the prompt's included.
    pub(super) length: usize,
    /// Tokens that end the text.
    pub(super) end: Vec<u32>,
    /// Warpers, in place of those that the configuration asks for; none where the likeliest token is taken.
    pub(super) warpers: Option<Warpers>,
}

/// Settings that the user may choose in place of the configuration.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Warpers {
    pub(super) temperature: Option<f32>,
    pub(super) top_k: Option<usize>,
    pub(super) top_p: Option<f32>,
}

/// transformers' number of candidates where nothing says another.
const TOP_K: usize = 50;

impl GenerationConfig {
    pub(super) fn processors(&self, task: &Task<'_>) -> Result<LogitsProcessors> {
        let mut chain = LogitsProcessors::default();
        self.add_repetition(task, &mut chain)?;
        self.add_length(task, &mut chain)?;
        self.add_tokens(task, &mut chain)?;
        if let Some(warpers) = &task.warpers {
            self.add_first_warpers(warpers, &mut chain)?;
            self.add_further_warpers(&mut chain)?;
        }
        if self.is_set("renormalize_logits")? {
            chain.push(Normalized);
        }
        Ok(chain)
    }

    /// Biases, repetition, forbidden words.
    fn add_repetition(&self, task: &Task<'_>, chain: &mut LogitsProcessors) -> Result<()> {
        if let Some(setting) = self.get("sequence_bias") {
            let biases = setting.biases(self.vocabulary)?;
            chain.push(SequenceBias::new(biases.into_iter().map(|(sequence, bias)| (sequence, float32(bias)))));
        }
        let penalty = |key| match self.get(key) {
            Some(setting) => {
                setting.number_of("a number above 0", |n| n > 0.0).map(|n| Some(n).filter(|n| differs(*n)))
            }
            None => Ok(None),
        };
        if let Some(penalty) = penalty("encoder_repetition_penalty")? {
            chain.push(RepetitionPenalty { penalty: float32(1.0 / penalty), first: Some(task.prompt.len()) });
        }
        if let Some(penalty) = penalty("repetition_penalty")? {
            chain.push(RepetitionPenalty { penalty: float32(penalty), first: None });
        }
        if let Some(size) = self.count("no_repeat_ngram_size")? {
            chain.push(NoRepeatNgram { size });
        }
        if let Some(size) = self.count("encoder_no_repeat_ngram_size")? {
            chain.push(EncoderNoRepeatNgram::new(size, task.prompt));
        }
        if let Some(setting) = self.get("bad_words_ids") {
            let end = &task.end;
            let words = setting.sequences(self.vocabulary)?.into_iter();
            let words = words.filter(|word| !matches!(word.as_slice(), [token] if end.contains(token)));
            chain.push(SequenceBias::new(words.map(|word| (word, f32::NEG_INFINITY))));
        }
        Ok(())
    }

    /// What keeps the text from ending, and what ends it.
    fn add_length(&self, task: &Task<'_>, chain: &mut LogitsProcessors) -> Result<()> {
        // `min_new_tokens` is stronger than `min_length`, even where it is 0.
        let least = match self.get("min_new_tokens") {
            Some(setting) => setting.count()?.map(|new| task.prompt.len().saturating_add(new)),
            None => self.count("min_length")?,
        };
        if let Some(length) = least {
            chain.push(MinLength { length, end: task.end.clone() });
        }
        if let Some(setting) = self.get("forced_bos_token_id") {
            match setting.tokens_below(self.vocabulary)?.as_slice() {
                [token] if !setting.value.is_array() => chain.push(ForcedStart(*token)),
                _ => return Err(setting.wrong("a token's number")),
            }
        }
        if let Some(setting) = self.get("forced_eos_token_id") {
            chain.push(ForcedEnd { length: task.length, tokens: setting.tokens_below(self.vocabulary)? });
        }
        Ok(())
    }

    /// What is mended, what decays, what never comes.
    fn add_tokens(&self, task: &Task<'_>, chain: &mut LogitsProcessors) -> Result<()> {
        if self.is_set("remove_invalid_values")? {
            chain.push(FiniteScores);
        }
        if let Some(setting) = self.get("exponential_decay_length_penalty") {
            let expected = "a number of tokens and a factor, such as [20, 1.05]";
            let pair: Option<(i64, f64)> = serde_json::from_value(setting.value.clone()).ok();
            let (start, factor) = pair.ok_or_else(|| setting.wrong(expected))?;
            let start = i64::try_from(task.prompt.len()).unwrap_or(i64::MAX).saturating_add(start);
            let end = task.end.clone();
            if end.is_empty() {
                return Err(setting.wrong("a model whose configuration names the token that ends a text, eos_token_id"));
            }
            chain.push(ExponentialDecay { start, factor, end });
        }
        let suppressed = match self.get("suppress_tokens") {
            Some(setting) => {
                setting.list("a list of tokens")?;
                let tokens = setting.tokens()?;
                chain.push(Suppressed(tokens.clone()));
                tokens
            }
            None => Vec::new(),
        };
        for setting in ["forced_bos_token_id", "forced_eos_token_id"].into_iter().filter_map(|key| self.get(key)) {
            let forced = setting.tokens()?;
            if !forced.is_empty() && forced.iter().all(|token| suppressed.contains(token)) {
                return Err(setting.wrong("a token that `suppress_tokens` does not forbid"));
            }
        }
        if let Some(setting) = self.get("begin_suppress_tokens") {
            setting.list("a list of tokens")?;
            // A forced token comes before the first that counts.
            let forced = task.prompt.len() <= 1 && self.get("forced_bos_token_id").is_some();
            let at = task.prompt.len().saturating_add(usize::from(forced));
            chain.push(SuppressedAtStart { tokens: setting.tokens()?, at });
        }
        Ok(())
    }

    /// Those that options may choose instead, and top-h between them.
    fn add_first_warpers(&self, chosen: &Warpers, chain: &mut LogitsProcessors) -> Result<()> {
        let positive = |n: f64| n > 0.0 && n.is_finite();
        let temperature = match (chosen.temperature, self.get("temperature")) {
            (Some(temperature), _) => Some(temperature),
            (None, Some(setting)) => Some(float32(setting.number_of("a number above 0", positive)?)),
            (None, None) => None,
        };
        if let Some(temperature) = temperature.filter(|t| differs(f64::from(*t))) {
            chain.push(Temperature(temperature));
        }
        if let Some(setting) = self.get("top_h") {
            chain.push(TopH(setting.number_of("a number above 0, up to 1", |n| n > 0.0 && n <= 1.0)?));
        }
        let top_k = match (chosen.top_k, self.get("top_k")) {
            (Some(top_k), _) => top_k,
            (None, Some(setting)) => {
                let count = usize::try_from(setting.integer()?);
                count.map_err(|_| setting.wrong("a whole number from 0 up; 0 is all"))?
            }
            (None, None) => TOP_K,
        };
        if top_k > 0 {
            chain.push(TopK(top_k));
        }
        let top_p = match (chosen.top_p, self.get("top_p")) {
            (Some(top_p), _) => f64::from(top_p),
            (None, Some(setting)) => setting.number_of("a number from 0 to 1", |n| n >= 0.0)?,
            (None, None) => 1.0,
        };
        if top_p < 1.0 {
            chain.push(TopP(top_p));
        }
        Ok(())
    }

    fn add_further_warpers(&self, chain: &mut LogitsProcessors) -> Result<()> {
        if let Some(setting) = self.get("min_p") {
            chain.push(MinP(float32(setting.number_of("a number from 0 to 1", |n| (0.0..=1.0).contains(&n))?)));
        }
        if let Some(setting) = self.get("typical_p") {
            let mass = setting.number_of("a number above 0", |n| n > 0.0)?;
            if mass < 1.0 {
                chain.push(Typical(mass));
            }
        }
        let share = |key| match self.get(key) {
            // transformers takes no notice of others.
            Some(setting) => setting.number().map(|n| Some(n).filter(|n| *n > 0.0 && *n < 1.0)),
            None => Ok(None),
        };
        if let Some(epsilon) = share("epsilon_cutoff")? {
            chain.push(Epsilon(epsilon));
        }
        if let Some(eta) = share("eta_cutoff")? {
            chain.push(Eta(eta));
        }
        Ok(())
    }
}

/// False for 1, where a factor changes nothing.
fn differs(factor: f64) -> bool {
    (factor - 1.0).abs() > 0.0
}

/// transformers computes in float32.
#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
fn float32(value: f64) -> f32 {
    value as f32
}
