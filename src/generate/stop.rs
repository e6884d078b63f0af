//! When a text ends.

use std::collections::VecDeque;
use std::time::Duration;

use super::Finish;
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// What ends a text before it reaches its longest length.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stop {
    /// Tokens.
    pub tokens: Vec<u32>,
    /// Texts; the one that ends it stays in it.
    pub strings: Vec<String>,
    /// Time, looked at behind each token.
    pub time: Option<Duration>,
}

/// Asks of each token whether it ends the text.
#[derive(Debug)]
pub(super) struct StopCheck<'s> {
    stop: &'s Stop,
    tokenizer: &'s Tokenizer,
    /// Bytes of the last tokens: as many tokens as the longest string has bytes.
    tail: VecDeque<Vec<u8>>,
    longest: usize,
}

impl<'s> StopCheck<'s> {
    /// A check that has seen the prompt: a string may begin in it.
    pub(super) fn new(stop: &'s Stop, tokenizer: &'s Tokenizer, prompt: &[u32]) -> Result<Self> {
        let longest = stop.strings.iter().map(String::len).max().unwrap_or(0);
        let mut check = Self { stop, tokenizer, tail: VecDeque::new(), longest };
        for token in prompt.iter().rev().take(longest).rev() {
            check.is_string(*token)?;
        }
        Ok(check)
    }

    /// Why the text ends with this token, if it does.
    pub(super) fn push(&mut self, token: u32, elapsed: Duration) -> Result<Option<Finish>> {
        let string = self.longest > 0 && self.is_string(token)?;
        if string || self.stop.tokens.contains(&token) {
            return Ok(Some(Finish::Stop));
        }
        Ok(self.stop.time.filter(|time| elapsed > *time).map(|_| Finish::Time))
    }

    /// True if a string ends in this token or goes through its end: transformers' `StopStringCriteria`.
    fn is_string(&mut self, token: u32) -> Result<bool> {
        if self.tail.len() >= self.longest {
            self.tail.pop_front();
        }
        let before: usize = self.tail.iter().map(Vec::len).sum();
        self.tail.push_back(self.tokenizer.bytes(token)?);
        let bytes: Vec<u8> = self.tail.iter().flatten().copied().collect();
        Ok(self.stop.strings.iter().any(|string| {
            // No place that ends before this token.
            let from = (before + 1).saturating_sub(string.len());
            let tail = bytes.get(from..).unwrap_or_default();
            tail.windows(string.len().max(1)).any(|window| window == string.as_bytes())
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::config::recorded;

    #[test]
    fn strings_end_a_text_where_transformers_ends_it() {
        let mut ends = [0, 0];
        for kind in recorded("strings.json") {
            let tokenizer = Tokenizer::from_json(kind["tokenizer"].to_string().as_bytes()).unwrap();
            for case in kind["cases"].as_array().unwrap() {
                let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
                let strings = serde_json::from_value(case["stop"].clone()).unwrap();
                let stop = Stop { strings, ..Stop::default() };
                let (last, prompt) = ids.split_last().unwrap();
                let finish = StopCheck::new(&stop, &tokenizer, prompt).unwrap().push(*last, Duration::ZERO).unwrap();
                let expected = case["ends"] == true;
                assert_eq!(finish.is_some(), expected, "{} {case}", kind["kind"]);
                ends[usize::from(expected)] += 1;
            }
        }
        assert!(ends.iter().all(|count| *count > 50), "{ends:?}");
    }

    #[test]
    fn tokens_and_time_end_a_text() {
        let tokenizer =
            Tokenizer::from_json(br#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#);
        let tokenizer = tokenizer.unwrap();
        let stop = Stop { tokens: vec![3], time: Some(Duration::from_secs(5)), ..Stop::default() };
        let mut check = StopCheck::new(&stop, &tokenizer, &[3]).unwrap();
        assert_eq!(check.push(0, Duration::from_secs(5)).unwrap(), None);
        assert_eq!(check.push(3, Duration::from_secs(9)).unwrap(), Some(Finish::Stop));
        assert_eq!(check.push(0, Duration::from_secs(9)).unwrap(), Some(Finish::Time));
    }
}
