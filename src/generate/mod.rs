//! Generating text: a prompt is run once, then token by token through the cache, and the text is handed on as it comes.

pub mod chat;
pub mod defaults;
pub mod sampling;

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::{Code, Error, Result};
use crate::session::{Decoder, IntMatrix};
use crate::tokenizer::{Stream, Tokenizer};
use sampling::{Sampler, Sampling};

/// How to generate.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Longest continuation in tokens.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finish {
    /// A stop token came.
    Stop,
    /// It reached its longest length.
    Length,
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
    let mut sampler = Sampler::new(settings.sampling);
    let mut stream = Stream::new(tokenizer, prompt);
    let mut state = decoder.empty_state(1)?;
    let mut all: Vec<i64> = prompt.iter().copied().map(i64::from).collect();
    let (mut from, mut text, mut finish) = (0, String::new(), Finish::Length);
    let (start, mut first) = (Instant::now(), None);
    while all.len() - prompt.len() < settings.max_new_tokens {
        let new = IntMatrix::from_row(all.get(from..).unwrap_or_default().to_vec());
        let positions = (0_i64..).skip(from).take(new.columns).collect();
        let mask = IntMatrix::from_row(vec![1; all.len()]);
        let logits = decoder.run_last(&new, &mask, &IntMatrix::from_row(positions), &mut state)?;
        from = all.len();
        let token = u32::try_from(sampler.next(logits, &all)).unwrap_or(u32::MAX);
        first.get_or_insert_with(|| start.elapsed());
        all.push(i64::from(token));
        if settings.stop.contains(&token) {
            finish = Finish::Stop;
            break;
        }
        let piece = stream.push(token)?;
        text += &piece;
        if !piece.is_empty() && !on_text(&piece) {
            finish = Finish::Cancelled;
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
    Ok(Generated {
        prefill_seconds: prefill.as_secs_f64(),
        decode_seconds: (total - prefill).as_secs_f64(),
        prefill_tokens_per_second: rate(all.len(), prefill),
        decode_tokens_per_second: rate(ids.len().saturating_sub(1), total - prefill),
        prompt_ids: all,
        ids,
        text,
        finish,
    })
}

fn rate(tokens: usize, time: Duration) -> f64 {
    let tokens = f64::from(u32::try_from(tokens).unwrap_or(u32::MAX));
    if time.is_zero() { 0.0 } else { tokens / time.as_secs_f64() }
}
