//! `hf2onnx generate`.

use std::hash::{BuildHasher as _, Hasher as _};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::{Output, SessionOptions};
use crate::chat::{ChatTemplate, Conversation, SpecialTokens};
use crate::error::{Code, Error, Result};
use crate::generate::config::{GenerationConfig, Overrides};
use crate::generate::{Choice, Generated, generate};
use crate::session::Decoder;
use crate::tokenizer::Tokenizer;

/// Continue a text with a built model.
///
/// Tokens are the likeliest ones, unless `generation_config.json` or an option asks for sampling. That file is followed
/// as transformers' `generate` follows it: penalties, forbidden and forced tokens, lengths, stop strings, and when
/// sampling temperature, top-k, top-p, min-p and the rest; what is not followed (beams, guidance, watermarks) is named on
/// stderr. An option here is stronger than the file. The prompt and its continuation go to stdout as they come, the speed
/// goes to stderr.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hf2onnx generate out/kjv --prompt \"In the beginning\" --max-new-tokens 40\n  \
    hf2onnx generate out/qwen --chat --prompt \"Why is the sky blue?\" --temperature 0.7 --seed 1\n  \
    hf2onnx generate out/qwen --messages conversation.json")]
pub(super) struct Generate {
    /// A directory that `hf2onnx build` wrote
    dir: PathBuf,
    /// The text to continue, or the message to answer
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, required_unless_present = "messages")]
    prompt: Option<String>,
    /// Put the prompt into the model's chat template
    #[arg(long)]
    chat: bool,
    /// A conversation for the chat template, in JSON: a list of messages, or an object with `messages`, `tools`,
    /// `documents` and the template's own variables
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    messages: Option<PathBuf>,
    /// Longest continuation in tokens [default: the model's own `max_new_tokens` or `max_length`, or 256]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Sample, with logits divided by this; 0 takes the likeliest token [default: the model's own]
    #[arg(long, value_name = "T", value_parser = at_least_zero)]
    temperature: Option<f32>,
    /// Sample among the likeliest tokens whose probabilities add up to this [default: the model's own, or 1]
    #[arg(long, value_name = "P", value_parser = share)]
    top_p: Option<f32>,
    /// Sample among this many of the likeliest tokens; 0 is all [default: the model's own, or 50]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Where the random numbers start [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    #[command(flatten)]
    session: SessionOptions,
}

fn at_least_zero(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|t: &f32| t.is_finite() && *t >= 0.0).ok_or_else(|| "not a number from 0 up".into())
}

fn share(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|p| (0.0..=1.0).contains(p)).ok_or_else(|| "not a number from 0 to 1".into())
}

impl Generate {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        if !self.dir.is_dir() {
            return Err(Error::new(Code::Io, self.dir.display())
                .found("no such directory")
                .expected("a directory that `hf2onnx build` wrote"));
        }
        let tokenizer = Tokenizer::open(&self.dir)?;
        let (text, prompt) = self.prompt_tokens(&tokenizer, output)?;
        let config = GenerationConfig::read(&self.dir)?;
        let overrides = self.overrides();
        let settings = config.settings(&prompt, &overrides)?;
        for note in config.notes(&overrides)? {
            output.say(&note);
        }
        self.session.ensure(output)?;
        let mut decoder = Decoder::open(&self.dir, &self.session.session())?;
        if !output.is_json() && !self.is_chat() {
            output.piece(&text);
        }
        let generated = generate(&mut decoder, &tokenizer, &prompt, &settings, &mut |piece| {
            if !output.is_json() {
                output.piece(piece);
            }
            !output.is_closed()
        })?;
        if output.is_json() {
            let seed = if let Choice::Drawn { seed } = settings.choice { seed } else { 0 };
            return output.value(&json!({ "prompt": text, "seed": seed, "generated": generated }));
        }
        output.line("");
        output.say(&speed(&generated));
        Ok(())
    }

    fn is_chat(&self) -> bool {
        self.chat || self.messages.is_some()
    }

    /// The prompt as the model gets it, and its tokens.
    fn prompt_tokens(&self, tokenizer: &Tokenizer, output: &Output) -> Result<(String, Vec<u32>)> {
        let prompt = self.prompt.as_deref().unwrap_or_default();
        if !self.is_chat() {
            return Ok((prompt.to_owned(), tokenizer.encode(prompt, true)?));
        }
        let conversation = match &self.messages {
            Some(file) => conversation(file)?,
            None => Conversation::of_user(prompt),
        };
        let tokens = SpecialTokens::read(&self.dir)?;
        let template = ChatTemplate::open(&self.dir, tokens.named())?.ok_or_else(|| {
            Error::new(Code::TokenizerInvalid, self.dir.display())
                .found("no chat template")
                .expected("chat_template.jinja, or chat_template in tokenizer_config.json")
                .help("leave --chat out: the model may not be one for conversations")
        })?;
        let text = template.render(&conversation)?;
        template.notes().iter().for_each(|note| output.say(note));
        // The template writes the special tokens itself.
        let tokens = tokenizer.encode(&text, false)?;
        Ok((text, tokens))
    }

    /// What the user chooses in place of the model.
    fn overrides(&self) -> Overrides {
        let Self { max_new_tokens, temperature, top_k, top_p, .. } = *self;
        let chat = self.is_chat();
        let seed = self.seed.unwrap_or_else(|| std::hash::RandomState::new().build_hasher().finish());
        Overrides { max_new_tokens, temperature, top_k, top_p, seed, chat }
    }
}

/// Reads the file of `--messages`.
fn conversation(file: &Path) -> Result<Conversation> {
    let bytes = std::fs::read(file).map_err(|error| Error::io(file, &error))?;
    let json = serde_json::from_slice(&bytes).map_err(|error| {
        Error::new(Code::UsageInvalid, file.display()).found(error).expected("a conversation in JSON")
    })?;
    Conversation::from_json(json).map_err(|error| Error { subject: file.display().to_string(), ..error })
}

fn speed(generated: &Generated) -> String {
    format!(
        "prefill {} tokens in {:.3} s ({:.1} tokens/s), decode {} tokens in {:.3} s ({:.1} tokens/s)",
        generated.prompt_ids.len(),
        generated.prefill_seconds,
        generated.prefill_tokens_per_second,
        generated.ids.len().saturating_sub(1),
        generated.decode_seconds,
        generated.decode_tokens_per_second,
    )
}
