//! Chat templates render as transformers renders them, byte by byte; what fails there fails here.
//!
//! `golden/chat` holds templates in the styles of the field, conversations, and small templates for each place where
//! Jinja shows that it is Python's, with what transformers makes of them (`golden/chat.py`).
#![allow(clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::TestResult;
use hf2onnx::chat::{ChatTemplate, Clock, Conversation};
use serde_json::{Map, Value};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/chat")
}

fn read(name: &str) -> TestResult<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(folder().join(name))?)?)
}

/// The time of the recordings: 2024-02-09 15:04:05.123456, an hour east.
fn clock() -> TestResult<Clock> {
    Ok(Clock::at(1_707_487_445_123_456, "<+01>-1").ok_or("a time")?)
}

/// One line for each case that is not as recorded.
#[derive(Default)]
struct Differences {
    cases: usize,
    found: Vec<String>,
}

impl Differences {
    fn compare(&mut self, name: &str, wanted: Option<&str>, rendered: &Result<String, hf2onnx::error::Error>) {
        self.cases += 1;
        match (wanted, rendered) {
            (Some(wanted), Ok(text)) if wanted == text => {}
            (None, Err(_)) => {}
            (wanted, Ok(text)) => self.found.push(format!("{name}\n  wanted {wanted:?}\n  found  {text:?}")),
            (wanted, Err(error)) => self.found.push(format!("{name}\n  wanted {wanted:?}\n  found  {error}")),
        }
    }

    fn none(self, least: usize) {
        assert!(self.cases >= least, "{} cases", self.cases);
        assert!(self.found.is_empty(), "{} of {}:\n{}", self.found.len(), self.cases, self.found.join("\n"));
    }
}

#[test]
fn templates_render_conversations_as_recorded() -> TestResult {
    let conversations = read("conversations.json")?;
    let recorded = read("renderings.json")?;
    let tokens = conversations["tokens"].as_object().ok_or("tokens")?;
    let mut differences = Differences::default();
    let templates = recorded.as_object().ok_or("renderings")?;
    assert!(templates.len() >= 40, "{} templates", templates.len());
    for (name, renderings) in templates {
        let source = fs::read_to_string(folder().join(format!("templates/{name}.jinja")))?;
        let template = ChatTemplate::new(source, tokens.clone(), name);
        for (key, wanted) in renderings.as_object().ok_or("renderings")? {
            let conversation = Conversation::from_json(conversations["conversations"][key].clone())?;
            let rendered = template.render_at(&conversation, clock()?);
            differences.compare(&format!("{name}: {key}"), wanted.as_str(), &rendered);
        }
    }
    differences.none(600);
    Ok(())
}

#[test]
fn snippets_render_as_recorded() -> TestResult {
    let snippets = read("snippets.json")?;
    let conversation = Conversation::from_json(snippets["variables"].clone())?;
    let mut differences = Differences::default();
    for case in snippets["cases"].as_array().ok_or("cases")? {
        let source = case["template"].as_str().ok_or("template")?;
        let template = ChatTemplate::new(source.to_owned(), Map::new(), "snippet");
        // Where Python prints an address there is nothing to agree on: it is an error, never another text.
        let wanted = if case["refused"].is_string() { None } else { case["text"].as_str() };
        differences.compare(source, wanted, &template.render_at(&conversation, clock()?));
    }
    differences.none(380);
    Ok(())
}
