//! A tokenizer's decoder, token by token: what a token comes to as soon as it is certain, whatever follows.
//!
//! The library decodes whole lists of tokens. Each of its decoders is a stage here that holds back no more than what
//! later tokens may change, and leaves the decoding itself to the library. The stages together give the text that the
//! library gives for the whole list. tokenizers 0.23 has a stream of its own: it takes a text as certain once it does
//! not end in U+FFFD, which is wrong for byte tokens, where one stray byte turns the whole run into U+FFFD.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder as _, Result};

use super::alphabet;

/// One decoder after the other.
#[derive(Debug, Clone)]
pub(super) struct Decoding(Vec<Stage>);

#[derive(Debug, Clone)]
enum Stage {
    /// Looks at each token for itself.
    Each(DecoderWrapper),
    /// Treats the first token unlike the others.
    First(DecoderWrapper, Seen),
    /// Treats the last token unlike the others, so one waits.
    Last(DecoderWrapper, Option<String>),
    /// Drops repetitions.
    Repeated(DecoderWrapper, Option<String>),
    /// Runs of byte tokens wait for their end.
    ByteRuns(DecoderWrapper, Vec<String>),
    /// Tokens are bytes in letters; those of an unfinished character wait.
    Letters(Vec<u8>),
    /// Takes letters off the start of the whole text.
    Start(char, usize),
    /// Puts spaces between the tokens.
    Spaced(Seen),
    /// Decoders that may change anything up to the end: everything waits.
    Whole { decoders: Vec<DecoderWrapper>, joined: bool, held: Vec<String> },
}

/// True once a token has come.
type Seen = bool;

impl Decoding {
    /// The stages of a decoder; without one, tokens are separated by spaces.
    pub(super) fn new(decoder: Option<&DecoderWrapper>) -> Self {
        let Some(decoder) = decoder else { return Self(vec![Stage::Spaced(false)]) };
        let mut decoders = Vec::new();
        flatten(decoder, &mut decoders);
        let (mut stages, mut joined) = (Vec::new(), false);
        for (at, decoder) in decoders.iter().enumerate() {
            let Some(own) = stages_of(decoder, joined) else {
                let rest = decoders.get(at..).unwrap_or_default().to_vec();
                stages.push(Stage::Whole { decoders: rest, joined, held: Vec::new() });
                break;
            };
            joined |= matches!(decoder, DecoderWrapper::Fuse(_) | DecoderWrapper::ByteLevel(_));
            stages.extend(own);
        }
        Self(stages)
    }

    /// The text that is certain with this token.
    pub(super) fn push(&mut self, token: String) -> Result<String> {
        let Self(stages) = self;
        pass(stages, vec![token])
    }

    /// The rest of the text, after the last token.
    pub(super) fn finish(mut self) -> Result<String> {
        let mut text = String::new();
        let mut stages = self.0.as_mut_slice();
        while let Some((stage, rest)) = stages.split_first_mut() {
            text += &pass(rest, stage.finish()?)?;
            stages = rest;
        }
        Ok(text)
    }
}

/// Sends tokens through stages.
fn pass(stages: &mut [Stage], mut tokens: Vec<String>) -> Result<String> {
    for stage in stages {
        let mut passed = Vec::new();
        for token in tokens {
            passed.extend(stage.push(token)?);
        }
        tokens = passed;
    }
    Ok(tokens.concat())
}

/// How tokens that are bytes are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ByteTokens {
    /// `<0x0A>`.
    Numbers,
    /// In GPT-2's alphabet.
    Letters,
}

/// How a decoder's tokens spell bytes, if they do.
pub(super) fn bytes_of(decoder: &DecoderWrapper) -> Option<ByteTokens> {
    let mut decoders = Vec::new();
    flatten(decoder, &mut decoders);
    let has = |kind: fn(&DecoderWrapper) -> bool| decoders.iter().any(kind);
    if has(|decoder| matches!(decoder, DecoderWrapper::ByteFallback(_))) {
        Some(ByteTokens::Numbers)
    } else {
        has(|decoder| matches!(decoder, DecoderWrapper::ByteLevel(_))).then_some(ByteTokens::Letters)
    }
}

/// Sequences of sequences as one.
fn flatten(decoder: &DecoderWrapper, into: &mut Vec<DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().for_each(|inner| flatten(inner, into)),
        other => into.push(other.clone()),
    }
}

/// A decoder's stage, if it needs one; nothing if it has to see the whole text. `joined` says that
/// the tokens are parts of one, because a decoder before has joined them.
fn stages_of(decoder: &DecoderWrapper, joined: bool) -> Option<Vec<Stage>> {
    use DecoderWrapper as D;
    Some(vec![match decoder {
        D::Fuse(_) => return Some(Vec::new()),
        D::Strip(strip) if joined && strip.stop == 0 => Stage::Start(strip.content, strip.start),
        _ if joined => return None,
        D::Replace(_) | D::Strip(_) => Stage::Each(decoder.clone()),
        D::Metaspace(_) | D::WordPiece(_) => Stage::First(decoder.clone(), false),
        D::BPE(_) => Stage::Last(decoder.clone(), None),
        D::CTC(_) => Stage::Repeated(decoder.clone(), None),
        D::ByteFallback(_) => Stage::ByteRuns(decoder.clone(), Vec::new()),
        D::ByteLevel(_) => Stage::Letters(Vec::new()),
        D::Sequence(_) => return None,
    }])
}

impl Stage {
    /// The tokens that go on to the next stage.
    fn push(&mut self, token: String) -> Result<Vec<String>> {
        match self {
            Self::Each(decoder) => decoder.decode_chain(vec![token]),
            Self::First(decoder, seen) => {
                let before = usize::from(std::mem::replace(seen, true));
                let tokens = [vec![String::new(); before], vec![token]].concat();
                Ok(decoder.decode_chain(tokens)?.into_iter().skip(before).collect())
            }
            Self::Last(decoder, held) => match held.replace(token) {
                None => Ok(Vec::new()),
                Some(certain) => Ok(decoder.decode_chain(vec![certain, String::new()])?.into_iter().take(1).collect()),
            },
            Self::Repeated(_, last) if last.as_ref() == Some(&token) => Ok(Vec::new()),
            Self::Repeated(decoder, last) => {
                *last = Some(token.clone());
                decoder.decode_chain(vec![token])
            }
            Self::ByteRuns(_, run) if byte_token(&token).is_some() => {
                run.push(token);
                Ok(Vec::new())
            }
            Self::ByteRuns(decoder, run) => {
                let mut tokens = decoder.decode_chain(std::mem::take(run))?;
                tokens.push(token);
                Ok(tokens)
            }
            Self::Letters(held) => {
                held.extend(alphabet::bytes(&token).unwrap_or_else(|| token.into_bytes()));
                Ok(vec![certain_text(held)])
            }
            Self::Start(content, left) => {
                let kept = token.trim_start_matches(|letter| {
                    let taken = letter == *content && *left > 0;
                    *left -= usize::from(taken);
                    taken
                });
                if !kept.is_empty() {
                    *left = 0;
                }
                Ok(vec![kept.to_owned()])
            }
            Self::Spaced(seen) => Ok(vec![if std::mem::replace(seen, true) { format!(" {token}") } else { token }]),
            Self::Whole { held, .. } => {
                held.push(token);
                Ok(Vec::new())
            }
        }
    }

    /// What was held back.
    fn finish(&mut self) -> Result<Vec<String>> {
        match self {
            Self::Last(decoder, held) => held.take().map_or(Ok(Vec::new()), |last| decoder.decode_chain(vec![last])),
            Self::ByteRuns(decoder, run) => decoder.decode_chain(std::mem::take(run)),
            Self::Letters(held) => Ok(vec![String::from_utf8_lossy(&std::mem::take(held)).into_owned()]),
            Self::Whole { held, .. } if held.is_empty() => Ok(Vec::new()),
            Self::Whole { decoders, joined, held } => {
                let tokens = std::mem::take(held);
                let tokens = if *joined { vec![tokens.concat()] } else { tokens };
                decoders.iter().try_fold(tokens, |tokens, decoder| decoder.decode_chain(tokens))
            }
            _ => Ok(Vec::new()),
        }
    }
}

/// The byte of a token such as `<0x0A>`, as the library reads it.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Takes the text off the front that no later byte changes. What is no UTF-8 is U+FFFD, as often as the standard
/// library says it, which the library asks too.
fn certain_text(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut used = 0;
    for chunk in held.utf8_chunks() {
        text += chunk.valid();
        used += chunk.valid().len();
        let invalid = chunk.invalid();
        let unfinished = || std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if invalid.is_empty() || used + invalid.len() == held.len() && unfinished() {
            break;
        }
        text.push('\u{fffd}');
        used += invalid.len();
    }
    held.drain(..used);
    text
}
