//! Tokenizers and chat templates that are broken or mean harm: `generate` says which file is, and does not panic.
#![allow(clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::Path;

use common::{TestResult, hf2onnx, kjv_llama};
use serde_json::{Value, json};

/// A tokenizer of two letters.
fn letters() -> Value {
    json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}})
}

/// Letters with one part changed.
fn with(pointer: &str, key: &str, value: Value) -> String {
    let mut file = letters();
    file.pointer_mut(pointer).unwrap_or(&mut Value::Null)[key] = value;
    file.to_string()
}

/// What `generate` says of a directory of these files, once as text and once as JSON. `file` is the one at fault.
fn refused(files: &[(&str, &[u8])], arguments: &[&str], file: &str, words: &[&str]) -> TestResult {
    let dir = tempfile::tempdir()?;
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes)?;
    }
    for form in [&[][..], &["--json"]] {
        let place: &Path = dir.path();
        let mut all: Vec<&std::ffi::OsStr> = form.iter().map(AsRef::as_ref).collect();
        all.extend(["generate".as_ref(), place.as_os_str(), "--prompt".as_ref(), "ab".as_ref()]);
        all.extend(arguments.iter().map(|argument| -> &std::ffi::OsStr { argument.as_ref() }));
        let ran = hf2onnx(all)?;
        let said = String::from_utf8(ran.stderr)?;
        assert_eq!(ran.status.code(), Some(1), "{file}: {said}");
        assert!(!said.contains("panicked") && said.len() < 20_000, "{file}: {said}");
        assert!(said.contains("tokenizer-invalid") && said.contains(file), "{file}: {said}");
        for word in words {
            assert!(said.contains(word), "{file}: `{word}` is not in: {said}");
        }
        if !form.is_empty() {
            let value: Value = serde_json::from_str(said.trim())?;
            let fields = ["subject", "found", "expected", "help"].map(|field| value["error"][field].as_str());
            assert!(fields.iter().all(|field| field.is_some_and(|text| !text.is_empty())), "{value}");
        }
    }
    Ok(())
}

#[test]
fn tokenizers() -> TestResult {
    let whole = fs::read(kjv_llama().join("tokenizer.json"))?;
    let half = &whole[..whole.len() / 2];
    let short = json!({"type": "BPE", "vocab": {"aa": 0, "b": 1}, "merges": [["aa", "b"]],
        "continuing_subword_prefix": "####"});
    for (bytes, words) in [
        (half, &["EOF", "line"][..]),
        (b"", &["EOF"]),
        (b"{}", &["Model missing"]),
        (b"[]", &["invalid type: sequence"]),
        (b"\xff\xfe", &["expected value"]),
        (b"null", &["invalid type: null"]),
        ("[".repeat(100_000).as_bytes(), &["invalid type: sequence"]),
        (with("", "version", json!(1)).as_bytes(), &["invalid type: integer `1`"]),
        (with("", "model", json!("BPE")).as_bytes(), &["ModelUntagged"]),
        (with("", "model", json!({"type": "BPE"})).as_bytes(), &["Missing vocab"]),
        (with("", "added_tokens", json!({"a": 0})).as_bytes(), &["invalid type: map"]),
        (with("/model", "vocab", json!(["a", "b"])).as_bytes(), &["expected a map"]),
        (with("/model", "vocab", json!({"a": -1})).as_bytes(), &["integer `-1`, expected u32"]),
        (with("/model", "vocab", json!({"a": "0"})).as_bytes(), &["expected u32 at"]),
        (with("/model", "merges", json!([["a", "c"]])).as_bytes(), &["`c` out of vocabulary"]),
        // On these the library panics.
        (with("/model", "merges", json!([["a", "b"]])).as_bytes(), &["the tokenizers library fails on"]),
        (with("", "model", short).as_bytes(), &["the tokenizers library fails on"]),
    ] {
        refused(&[("tokenizer.json", bytes)], &[], "tokenizer.json", words)?;
    }
    refused(&[], &[], "tokenizer.json", &["repository's tokenizer.json"])
}

/// What only shows when the text is encoded.
#[test]
fn tokenizers_that_encode_nothing() -> TestResult {
    let trie = json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="});
    let outside = json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
    let words = json!({"type": "WordPiece", "vocab": {"x": 0}, "unk_token": "u", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100});
    for (key, value, found) in [
        ("normalizer", trie, "the tokenizers library fails on"),
        ("post_processor", outside, "the tokenizers library fails on"),
        ("model", json!({"type": "Unigram", "vocab": [["x", 0.0]]}), "unknown token"),
        ("model", words, "Missing [UNK]"),
    ] {
        refused(
            &[("tokenizer.json", with("", key, value).as_bytes())],
            &[],
            "by tokenizer.json",
            &["the text", found],
        )?;
    }
    Ok(())
}

#[test]
fn chat_templates() -> TestResult {
    let tokenizer = letters().to_string();
    let (config, file) = ("tokenizer_config.json", "chat_template.jinja");
    let doubling =
        "{% set ns = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    let lists =
        "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}";
    let shared = "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == ns.x }}";
    let long = "x".repeat(200_000);
    for (name, bytes, words) in [
        (config, &b"{\"chat_template\": "[..], "EOF"),
        (config, b"", "EOF"),
        (config, b"\xff", "UTF-8"),
        (config, br#"{"chat_template": 3}"#, "neither a text nor a list"),
        (config, br#"{"chat_template": [{"name": "default"}]}"#, "neither a text nor a list"),
        (config, br#"{"chat_template": "{% if %}"}"#, "expected an expression"),
        (file, b"\xff", "UTF-8"),
        (file, b"{% for m in messages %}", "Unexpected end of template"),
        (file, b"a }} {{ }} b", "expected an expression"),
        (file, b"{{ messages[0].role.of.nothing }}", "has no attribute 'of'"),
        (file, b"{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (file, b"{{ ([0, 0] * (2**63))|list }}", "more work than a chat template may take"),
        (file, doubling.as_bytes(), "more work than a chat template may take"),
        (file, lists.as_bytes(), "more work than a chat template may take"),
        (file, shared.as_bytes(), "more work than a chat template may take"),
        (file, b"{{ range(10**9) }}", "Range too big"),
        (file, b"{{ 'x' * 10**9 }}", "more work than a chat template may take"),
        (file, b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        (file, long.as_bytes(), "a template of 200000 bytes"),
    ] {
        refused(&[("tokenizer.json", tokenizer.as_bytes()), (name, bytes)], &["--chat"], name, &[words])?;
    }
    refused(&[("tokenizer.json", tokenizer.as_bytes())], &["--chat"], "no chat template", &["tokenizer_config.json"])
}
