//! Chat templates render as transformers renders them, byte by byte; what fails there fails here.
//!
//! `golden/chat` holds templates in the styles of the field, conversations, and small templates for each place where
//! Jinja shows that it is Python's, with what transformers makes of them (`golden/chat.py`).
#![allow(clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::TestResult;
use hf2onnx::chat::{ChatTemplate, Clock, Conversation, SpecialTokens};
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

/// Which tokens a template may name, from all the files and classes that name some, and the id that ends a text.
#[test]
fn special_tokens_are_those_of_transformers() -> TestResult {
    let recorded = read("special_tokens.json")?;
    let cases = recorded["cases"].as_array().ok_or("cases")?;
    assert!(cases.len() > 25, "{} cases", cases.len());
    for case in cases {
        let folder = tempfile::tempdir()?;
        let tokenizer = &recorded["tokenizers"][case["tokenizer"].as_str().ok_or("tokenizer")?];
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string())?;
        for (name, value) in case["files"].as_object().ok_or("files")? {
            fs::write(folder.path().join(name), value.to_string())?;
        }
        let tokens = SpecialTokens::read(folder.path())?;
        let found = (Value::Object(tokens.named().clone()), tokens.id("eos_token"));
        assert_eq!(found, (case["named"].clone(), case["eos"].as_i64()), "{}", case["name"]);
    }
    Ok(())
}

/// Where templates lie, which one wins, and which one tools take.
#[test]
fn templates_are_found_where_transformers_finds_them() -> TestResult {
    let both = r#"[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]"#;
    let config = |template: &str| ("tokenizer_config.json", format!("{{\"chat_template\": {template}}}"));
    let file = |name: &'static str, source: &str| (name, source.to_owned());
    let extra = "additional_chat_templates/tool_use.jinja";
    for (files, without_tools, with_tools) in [
        (vec![config("\"C\"")], Some("C"), Some("C")),
        (vec![config(both)], Some("D"), Some("T")),
        (vec![config(r#"{"default": "D", "tool_use": "T"}"#)], Some("D"), Some("T")),
        (vec![config(r#"[{"name": "rag", "template": "R"}]"#)], None, None),
        (vec![config(both), file("chat_template.jinja", "F")], Some("F"), Some("F")),
        (vec![file("chat_template.jinja", "F"), file(extra, "X")], Some("F"), Some("X")),
        // A folder alone has no default, whatever the configuration says.
        (vec![config("\"C\""), file(extra, "X")], None, Some("X")),
    ] {
        let folder = tempfile::tempdir()?;
        for (name, text) in &files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().ok_or("a folder")?)?;
            fs::write(path, text)?;
        }
        let template = ChatTemplate::open(folder.path(), &Map::new())?.ok_or("a template")?;
        let mut conversation = Conversation::of_user("x");
        assert_eq!(template.render(&conversation).ok().as_deref(), without_tools, "{files:?}");
        conversation.tools = Some(Vec::new());
        assert_eq!(template.render(&conversation).ok().as_deref(), with_tools, "{files:?}");
    }
    Ok(())
}

/// All directives of a date at a fixed time in a zone, as Python on Linux writes them.
#[test]
fn dates_are_local() -> TestResult {
    let template = ChatTemplate::new("{{ strftime_now(f) }}".into(), Map::new(), "dates");
    let zone = "CET-1CEST,M3.5.0,M10.5.0/3";
    for (seconds, format, wanted) in [
        (1_711_846_799, "%F %T", "2024-03-31 01:59:59"),
        (1_711_846_800, "%F %T", "2024-03-31 03:00:00"),
        (951_827_696, "%A %d %B %Y, %I:%M:%S %p, day %j", "Tuesday 29 February 2000, 01:34:56 PM, day 060"),
        (1_609_455_600, "%G-W%V-%u %U %W %-d %e %y %C %s", "2020-W53-5 00 00 1  1 21 20 1609455600"),
        (0, "%a %b %c %q %%", "Thu Jan Thu Jan  1 01:00:00 1970 %q %"),
    ] {
        let mut conversation = Conversation::of_user("x");
        conversation.variables.insert("f".into(), format.into());
        let clock = Clock::at(seconds * 1_000_000, zone).ok_or("a time")?;
        assert_eq!(template.render_at(&conversation, clock)?, wanted, "{format}");
    }
    Ok(())
}
