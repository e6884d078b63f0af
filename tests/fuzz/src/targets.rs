//! What is fuzzed: each target takes any bytes and must neither panic nor hang nor fill the memory. The stable tests
//! replay the corpus through the same functions (`tests/corpus.rs`).

mod encoding;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use hf2onnx::build::{self, Logits};
use hf2onnx::chat::{ChatTemplate, Conversation};
use hf2onnx::describe::{Catalogue, Template, describe};
use hf2onnx::error::Error;
use hf2onnx::golden::Golden;
use hf2onnx::lower;
use hf2onnx::opset::Target;
use hf2onnx::read::{json_object, safetensors_header, safetensors_index};
use serde_json::{Map, Value, json};

pub use encoding::encoding;

/// Most layers of a model that is fuzzed as far as its graph: thousands are tested elsewhere, and slow.
const LAYERS: u64 = 6;

/// A safetensors file, and an index. A header that is accepted describes the file exactly.
pub fn safetensors(bytes: &[u8]) {
    match safetensors_header(bytes, Path::new("model.safetensors")) {
        Ok(tensors) => {
            let mut spans: Vec<(u64, u64)> = tensors.iter().map(|tensor| (tensor.offset, tensor.length)).collect();
            spans.sort_unstable();
            let starts = spans.first().map(|(offset, _)| *offset);
            let covered = spans.iter().fold(starts, |at, (offset, length)| {
                assert_eq!(at, Some(*offset), "tensors lie one behind the other");
                offset.checked_add(*length)
            });
            assert!(covered.is_none_or(|end| end == bytes.len() as u64), "the last tensor ends with the file");
        }
        Err(error) => says(&error),
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        match safetensors_index(text, Path::new("model.safetensors.index.json")) {
            Ok(map) => assert!(!map.is_empty()),
            Err(error) => says(&error),
        }
    }
}

/// A configuration, as far as the graphs of every target. The first byte chooses the mode: a text as it is, or the
/// configuration of a golden case of which the other bytes change a few values.
pub fn config(bytes: &[u8]) {
    let Some((mode, rest)) = bytes.split_first() else { return };
    if mode % 2 == 0 {
        let Ok(text) = std::str::from_utf8(rest) else { return };
        match json_object(text, Path::new("config.json")) {
            Ok(config) => graphs(&config, None),
            Err(error) => says(&error),
        }
    } else {
        let cases = cases();
        let (Some((chosen, changes)), false) = (rest.split_first(), cases.is_empty()) else { return };
        if let Some(case) = cases.get(usize::from(*chosen) % cases.len()) {
            let mut config = case.clone();
            changes.chunks(4).take(16).for_each(|change| perturb(&mut config, change));
            graphs(&config, None);
        }
    }
}

/// A template of a user's, alone and with a plain configuration.
pub fn template(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Template::parse("mine.toml", text) {
        Ok(template) => {
            let _ = template.annotated();
            graphs(&plain(), Some(&template));
        }
        Err(error) => says(&error),
    }
}

/// A chat template, which renders a conversation with tools.
pub fn chat(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let conversation = json!({
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Wie sp\u{e4}t ist es?\r\n"}]},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET", "n": [1, 2.5, null, true]}}},
            ]},
            {"role": "tool", "name": "clock", "content": "{\"now\": \"12:00\"}"},
        ],
        "tools": [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}],
    });
    let Ok(conversation) = Conversation::from_json(conversation) else { panic!("the conversation is one") };
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name.to_owned(), json!(text)));
    let template = ChatTemplate::new(text.to_owned(), tokens.into_iter().collect(), "chat_template.jinja");
    if let Err(error) = template.render(&conversation) {
        says(&error);
    }
    drop(template.notes());
}

/// A golden file. One that is accepted is what `verify` can run.
pub fn golden(bytes: &[u8]) {
    match Golden::from_bytes(PathBuf::from("golden.safetensors"), bytes) {
        Ok(golden) => {
            let vocabulary = i64::try_from(golden.vocabulary()).unwrap_or(i64::MAX);
            assert!(golden.input_ids.data.iter().all(|id| (0..vocabulary).contains(id)), "ids are tokens");
            let positions = golden.logits.data.chunks(golden.vocabulary()).zip(&golden.attention_mask.data);
            let tokens = positions.filter(|(_, mask)| **mask == 1);
            assert!(tokens.flat_map(|(logits, _)| logits).all(|logit| logit.is_finite()), "logits are numbers");
            let _ = golden.evaluation();
        }
        Err(error) => says(&error),
    }
}

/// The graphs of a configuration on every target.
fn graphs(config: &Map<String, Value>, template: Option<&Template>) {
    let layers = ["num_hidden_layers", "n_layer", "n_layers", "num_layers"];
    if layers.iter().any(|key| config.get(*key).and_then(Value::as_u64).is_some_and(|n| (LAYERS..=4096).contains(&n))) {
        return;
    }
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let Some(template) = template.or_else(|| catalogue().for_model_type(model_type)) else { return };
    let description = match describe(template, config, &[]) {
        Ok(description) => description,
        Err(error) => return says(&error),
    };
    let model = match build::decoder(&description.spec, Logits::Last) {
        Ok(model) => model,
        Err(error) => return says(&error),
    };
    for target in Target::all().unwrap_or_default() {
        let options = lower::Options::plain(target);
        if let Err(error) = lower::lower(&model, &options) {
            says(&error);
        }
    }
}

/// An error owes its reader a subject, and ends.
fn says(error: &Error) {
    let text = error.to_string();
    assert!(!error.subject.is_empty() && text.len() < 100_000, "{} bytes of error", text.len());
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "control characters: {text:?}");
}

/// Changes one value: which one, to what, and how much are a byte each, and one chooses among the parts of an object.
fn perturb(config: &mut Map<String, Value>, change: &[u8]) {
    let at = |index: usize| change.get(index).copied().unwrap_or(0);
    let count = config.len().max(1);
    let Some(value) = config.values_mut().nth(usize::from(at(0)) % count) else { return };
    let value = match value {
        Value::Object(inner) if !inner.is_empty() && at(3) % 4 != 0 => {
            let count = inner.len();
            match inner.values_mut().nth(usize::from(at(3)) % count) {
                Some(part) => part,
                None => return,
            }
        }
        Value::Array(list) if !list.is_empty() && at(3) % 4 != 0 => {
            let count = list.len();
            match list.get_mut(usize::from(at(3)) % count) {
                Some(item) => item,
                None => return,
            }
        }
        other => other,
    };
    *value = instead(at(1), at(2), value);
}

/// Another value in the place of one.
fn instead(kind: u8, amount: u8, old: &Value) -> Value {
    let small = i64::from(amount);
    match kind % 20 {
        0 => Value::Null,
        1 => json!(amount.is_multiple_of(2)),
        2 => json!(0),
        3 => json!(-small),
        4 => json!(small),
        5 => json!(1_u64 << (amount % 64)),
        6 => json!((1_u64 << (amount % 64)) - 1),
        7 => json!(f64::from(amount) / 16.0),
        8 => json!(10_f64.powi(i32::from(amount) - 128)),
        9 => json!(-10_f64.powi(i32::from(amount) - 128)),
        10 => json!({ "__float__": one_of(&["NaN", "Infinity", "-Infinity"], amount) }),
        11 => json!("x".repeat(usize::from(amount) * 300)),
        12 => json!(one_of(&["silu", "relu2", "full_attention", "sliding_attention", "yarn", "\u{1b}[31m"], amount)),
        // One list deep: what a few changes make must stay as small as a file that could say it.
        13 if !old.is_array() && !old.is_object() => Value::Array(vec![old.clone(); usize::from(amount) * 16]),
        14 => Value::Array(Vec::new()),
        15 => json!({ "rope_type": one_of(&["yarn", "llama3", "dynamic", "linear", "longrope"], amount),
            "factor": small - 1, "rope_theta": 1e4, "low_freq_factor": small, "high_freq_factor": 4 }),
        16 => json!({}),
        17 => json!(i64::MIN),
        18 => old.as_i64().map_or(Value::Null, |old| json!(old.saturating_add(small - 128))),
        _ => old.as_i64().map_or(Value::Null, |old| json!(old.saturating_mul(small))),
    }
}

fn one_of<'t>(words: &[&'t str], amount: u8) -> &'t str {
    words.get(usize::from(amount) % words.len()).copied().unwrap_or_default()
}

/// The configurations of the golden cases, by name.
fn cases() -> &'static [Map<String, Value>] {
    static CASES: OnceLock<Vec<Map<String, Value>>> = OnceLock::new();
    CASES.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folders = [root.join("golden/cases"), root.join("../../golden/cases")];
        let entries = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten();
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path().join("config.json")).collect();
        paths.sort();
        let configs = paths.iter().filter_map(|path| {
            let text = std::fs::read_to_string(path).ok()?;
            json_object(&text, path).ok()
        });
        configs.collect()
    })
}

fn catalogue() -> &'static Catalogue {
    static CATALOGUE: OnceLock<Catalogue> = OnceLock::new();
    CATALOGUE.get_or_init(|| match Catalogue::built_in() {
        Ok(catalogue) => catalogue,
        Err(error) => panic!("{error}"),
    })
}

/// A configuration that most templates can read something from.
fn plain() -> Map<String, Value> {
    let config = json!({
        "model_type": "mine", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": 64,
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": false,
    });
    config.as_object().cloned().unwrap_or_default()
}
