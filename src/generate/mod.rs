//! Generating text: a prompt is run once, then token by token through the cache, and the text is handed on as it comes.

pub mod config;
pub mod logits;
mod sampling;
mod stop;

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::{Code, Error, Result};
use crate::session::Decoder;
use crate::tokenizer::{Stream, Tokenizer};
use logits::{LogitsProcessor as _, LogitsProcessors};
pub use sampling::Choice;
use sampling::Chooser;
pub use stop::Stop;
use stop::StopCheck;

/// New tokens that the caches have room for at first.
const ROOM: usize = 256;

/// How to generate.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Longest continuation in tokens.
    pub max_new_tokens: usize,
    /// What is done to the scores of each token.
    pub processors: LogitsProcessors,
    /// How tokens are chosen by their scores.
    pub choice: Choice,
    /// What ends the text.
    pub stop: Stop,
}

impl Settings {
    /// So many of the likeliest tokens, whatever they are.
    pub fn greedy(max_new_tokens: usize) -> Self {
        let (processors, stop) = (LogitsProcessors::default(), Stop::default());
        Self { max_new_tokens, processors, choice: Choice::Likeliest, stop }
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finish {
    /// A token or a string came that ends it.
    Stop,
    /// It reached its longest length.
    Length,
    /// It took as long as it may.
    Time,
    /// Whoever received the text wanted no more.
    Cancelled,
}

/// What was generated.
#[derive(Debug, Clone, Serialize)]
pub struct Generated {
    /// The prompt's tokens.
    pub prompt_ids: Vec<i64>,
    /// The new tokens, a stop token included.
    pub ids: Vec<i64>,
    /// The new text.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Seconds until the first token.
    pub prefill_seconds: f64,
    /// Seconds for all later tokens.
    pub decode_seconds: f64,
    /// Prompt tokens per second.
    pub prefill_tokens_per_second: f64,
    /// Later tokens per second.
    pub decode_tokens_per_second: f64,
}

/// Continues a prompt. `on_text` receives the text piece by piece, and ends it by returning false.
pub fn generate(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    settings: &Settings,
    on_text: &mut dyn FnMut(&str) -> bool,
) -> Result<Generated> {
    if prompt.is_empty() {
        return Err(Error::new(Code::UsageInvalid, "the prompt").found("no tokens").expected("one token at least"));
    }
    check_tokens(decoder, prompt)?;
    let mut chooser = Chooser::new(settings.choice);
    let mut stop = StopCheck::new(&settings.stop, tokenizer, prompt)?;
    let mut stream = Stream::new(tokenizer, prompt)?;
    let mut row = decoder.row(prompt.len().saturating_add(settings.max_new_tokens.min(ROOM)), true)?;
    let mut all: Vec<i64> = prompt.iter().copied().map(i64::from).collect();
    let (mut from, mut text, mut finish) = (0, String::new(), Finish::Length);
    let (start, mut first) = (Instant::now(), None);
    while all.len() - prompt.len() < settings.max_new_tokens {
        let mut scores = decoder.extend(&mut row, all.get(from..).unwrap_or_default())?;
        from = all.len();
        settings.processors.process(&all, &mut scores);
        let token = chooser.next(&scores).and_then(|token| u32::try_from(token).ok()).ok_or_else(nothing_left)?;
        first.get_or_insert_with(|| start.elapsed());
        all.push(i64::from(token));
        let piece = stream.push(token)?;
        text += &piece;
        if !piece.is_empty() && !on_text(&piece) {
            finish = Finish::Cancelled;
            break;
        }
        if let Some(reason) = stop.push(token, start.elapsed())? {
            finish = reason;
            break;
        }
    }
    let total = start.elapsed();
    let rest = stream.finish()?;
    if !rest.is_empty() && finish != Finish::Cancelled {
        on_text(&rest);
        text += &rest;
    }
    let ids = all.split_off(prompt.len());
    let prefill = first.unwrap_or_default();
    let decode = total.saturating_sub(prefill);
    Ok(Generated {
        prefill_seconds: prefill.as_secs_f64(),
        decode_seconds: decode.as_secs_f64(),
        prefill_tokens_per_second: rate(all.len(), prefill),
        decode_tokens_per_second: rate(ids.len().saturating_sub(1), decode),
        prompt_ids: all,
        ids,
        text,
        finish,
    })
}

/// Every token of a prompt is one that the model has.
fn check_tokens(decoder: &Decoder, prompt: &[u32]) -> Result<()> {
    let Some(size) = decoder.vocabulary() else { return Ok(()) };
    match prompt.iter().find(|id| **id >= size) {
        None => Ok(()),
        Some(odd) => Err(Error::new(Code::TokenizerInvalid, decoder.file().display())
            .found(format!("token {odd} in the prompt"))
            .expected(format!("tokens below {size}, the model's vocabulary"))
            .help("the tokenizer is another model's: put the right tokenizer.json into the directory")),
    }
}

fn nothing_left() -> Error {
    Error::new(Code::ConfigInvalid, "the next token's scores")
        .found("no token that the settings of generation_config.json leave")
        .expected("one token at least")
        .help("forbid fewer tokens: suppress_tokens, bad_words_ids, no_repeat_ngram_size")
}

fn rate(tokens: usize, time: Duration) -> f64 {
    let tokens = f64::from(u32::try_from(tokens).unwrap_or(u32::MAX));
    if time.is_zero() { 0.0 } else { tokens / time.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Search, ensure};
    use crate::session::Options;
    use crate::toy::{Fault, write};

    /// Sixteen letters, one token each.
    fn letters() -> Tokenizer {
        let vocabulary: serde_json::Map<String, serde_json::Value> =
            ('a'..='p').zip(0..).map(|(letter, id): (char, u32)| (letter.to_string(), id.into())).collect();
        let json = serde_json::json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []}});
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn generating_through_the_cache_gives_what_recomputing_gives_and_stops_where_it_should() {
        ensure(&Search::default(), &mut |_| {}).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), Fault::None);
        let mut decoder = Decoder::open(folder.path(), &Options::default()).unwrap();
        let tokenizer = letters();
        let prompt = tokenizer.encode("cab", true).unwrap();
        let mut settings = Settings::greedy(12);
        let mut streamed = String::new();
        let mut keep = |piece: &str| {
            streamed += piece;
            true
        };
        let all = generate(&mut decoder, &tokenizer, &prompt, &settings, &mut keep).unwrap();
        assert_eq!((all.ids.len(), all.finish, &all.text), (12, Finish::Length, &streamed));
        assert_eq!(all.prompt_ids, [2, 0, 1]);
        for (k, id) in all.ids.iter().enumerate() {
            let mut before = prompt.clone();
            before.extend(all.ids[..k].iter().map(|i| u32::try_from(*i).unwrap()));
            let one = Settings { max_new_tokens: 1, ..settings.clone() };
            let again = generate(&mut decoder, &tokenizer, &before, &one, &mut |_| true).unwrap();
            assert_eq!(again.ids, [*id]);
        }
        settings.stop.tokens = vec![u32::try_from(all.ids[4]).unwrap()];
        let stopped = generate(&mut decoder, &tokenizer, &prompt, &settings, &mut |_| true).unwrap();
        let end = all.ids.iter().position(|i| i == &all.ids[4]).unwrap();
        assert_eq!((stopped.finish, stopped.ids.as_slice()), (Finish::Stop, &all.ids[..=end]));
        settings.stop.tokens = vec![];
        let cancelled = generate(&mut decoder, &tokenizer, &prompt, &settings, &mut |_| false).unwrap();
        assert_eq!((cancelled.finish, cancelled.ids.len()), (Finish::Cancelled, 1));
        let beyond = generate(&mut decoder, &tokenizer, &[2, 16], &settings, &mut |_| true).unwrap_err();
        assert_eq!(beyond.code, Code::TokenizerInvalid, "a token that the model does not have");
        assert!(beyond.to_string().contains("token 16"), "{beyond}");
        assert_eq!(
            generate(&mut decoder, &tokenizer, &[], &settings, &mut |_| true).unwrap_err().code,
            Code::UsageInvalid
        );
    }
}
