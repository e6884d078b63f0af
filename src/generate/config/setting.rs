//! One value of a configuration, and the error that it is when it is none that generating can be done with.

use std::path::Path;

use serde_json::Value;

use crate::error::{Code, Error, Result};
use crate::read::{token_numbers, whole};

/// A key that is there, and is not null.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting<'c> {
    pub(super) file: &'c Path,
    pub(super) key: &'static str,
    pub(super) value: &'c Value,
}

impl<'c> Setting<'c> {
    /// The error.
    pub(super) fn wrong(&self, expected: impl std::fmt::Display) -> Error {
        let option = match self.key {
            "max_new_tokens" | "max_length" => "--max-new-tokens",
            "temperature" | "do_sample" => "--temperature",
            "top_k" => "--top-k",
            "top_p" => "--top-p",
            _ => "",
        };
        let instead = if option.is_empty() { String::new() } else { format!(", or choose with {option}") };
        Error::new(Code::ConfigInvalid, format!("{}: key `{}`", self.file.display(), self.key))
            .found(self.value)
            .expected(expected)
            .help(format!("correct the file, or take the key out of it{instead}"))
    }

    fn of(&self, value: &'c Value) -> Self {
        Self { value, ..*self }
    }

    pub(super) fn flag(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    pub(super) fn number(&self) -> Result<f64> {
        float(self.value).ok_or_else(|| self.wrong("a number"))
    }

    /// A number for which `fits` holds, as `expected` says it.
    pub(super) fn number_of(&self, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64> {
        float(self.value).filter(|number| fits(*number)).ok_or_else(|| self.wrong(expected))
    }

    /// A whole number.
    pub(super) fn integer(&self) -> Result<i64> {
        whole(self.value).ok_or_else(|| self.wrong("a whole number"))
    }

    /// A number of tokens; what is below one sets nothing, as in transformers.
    pub(super) fn count(&self) -> Result<Option<usize>> {
        Ok(usize::try_from(self.integer()?).ok().filter(|count| *count > 0))
    }

    /// A list.
    pub(super) fn list(&self, expected: &str) -> Result<&'c [Value]> {
        self.value.as_array().map(Vec::as_slice).ok_or_else(|| self.wrong(expected))
    }

    /// Numbers of tokens: one or a list. Negative ones are no tokens, and are passed over as transformers does.
    pub(super) fn tokens(&self) -> Result<Vec<u32>> {
        let numbers = token_numbers(self.value).ok_or_else(|| self.wrong("a token's number, or a list of them"))?;
        Ok(numbers.into_iter().filter_map(|number| u32::try_from(number).ok()).collect())
    }

    /// Tokens that the vocabulary has to have.
    pub(super) fn tokens_below(&self, vocabulary: Option<usize>) -> Result<Vec<u32>> {
        let most = vocabulary.and_then(|size| u32::try_from(size).ok()).unwrap_or(u32::MAX);
        let expected = || self.wrong(format!("tokens from 0 to below {most}, the model's vocabulary"));
        let values = self.value.as_array().map_or(std::slice::from_ref(self.value), Vec::as_slice);
        let token = |value| whole(value).and_then(|n| u32::try_from(n).ok()).filter(|token| *token < most);
        values.iter().map(|value| token(value).ok_or_else(expected)).collect()
    }

    /// A list of lists of tokens that the vocabulary has to have.
    pub(super) fn sequences(&self, vocabulary: Option<usize>) -> Result<Vec<Vec<u32>>> {
        let expected = "a list of lists of tokens, such as [[5], [7, 9]]";
        let lists = self.list(expected)?.iter().map(|value| match value {
            Value::Array(_) => self.of(value).tokens_below(vocabulary),
            _ => Err(self.wrong(expected)),
        });
        let lists = lists.collect::<Result<Vec<_>>>()?;
        if lists.is_empty() { Err(self.wrong(expected)) } else { Ok(lists) }
    }

    /// Sequences of tokens with a number each.
    pub(super) fn biases(&self, vocabulary: Option<usize>) -> Result<Vec<(Vec<u32>, f64)>> {
        let expected = "a list of sequences with a number each, such as [[[5], 1.0], [[7, 9], -2.5]]";
        let pairs = self.list(expected)?.iter().map(|pair| match pair.as_array().map(Vec::as_slice) {
            Some([tokens @ Value::Array(sequence), bias]) if !sequence.is_empty() => {
                let bias = float(bias).ok_or_else(|| self.wrong(expected))?;
                Ok((self.of(tokens).tokens_below(vocabulary)?, bias))
            }
            _ => Err(self.wrong(expected)),
        });
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        if pairs.is_empty() { Err(self.wrong(expected)) } else { Ok(pairs) }
    }

    /// Texts: one or a list.
    pub(super) fn texts(&self) -> Result<Vec<String>> {
        let values = self.value.as_array().map_or(std::slice::from_ref(self.value), Vec::as_slice);
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let texts: Option<Vec<String>> = values.iter().map(text).collect();
        texts.filter(|texts| !texts.is_empty()).ok_or_else(|| self.wrong("a text that is not empty, or a list of them"))
    }
}

/// A number, as Python reads it: `Infinity` as well.
fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::Object(special) => match special.get("__float__")?.as_str()? {
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}
