//! Configurations and templates that are broken or mean harm: each has its error, soon and in little memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::format_collect)]

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::Case;
use hf2onnx::build::{self, Logits};
use hf2onnx::describe::{Catalogue, Template, choose, describe};
use hf2onnx::error::{Code, Error, Result};
use hf2onnx::lower;
use hf2onnx::opset::Target;
use hf2onnx::read::json_object;
use serde_json::{Map, Value, json};

/// More than the slowest of these takes in a debug build beside other work; without its limit each takes minutes.
const A_MOMENT: Duration = Duration::from_secs(30);

fn config_of(case: &str) -> Map<String, Value> {
    let path = Case::named(case).unwrap().dir.join("config.json");
    json_object(&fs::read_to_string(&path).unwrap(), &path).unwrap()
}

/// The graphs of a configuration on every target.
fn graphs(template: &Template, config: &Map<String, Value>) -> Result<()> {
    let description = describe(template, config, &[])?;
    let model = build::decoder(&description.spec, Logits::Last)?;
    for target in Target::all()? {
        lower::lower(&model, &lower::Options::plain(target))?;
    }
    Ok(())
}

fn failure(case: &str, changes: &[(&str, Value)]) -> Option<Error> {
    let mut config = config_of(case);
    config.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    let catalogue = Catalogue::built_in().unwrap();
    let model_type = config["model_type"].as_str().unwrap();
    graphs(catalogue.for_model_type(model_type).unwrap(), &config).err()
}

fn refused(case: &str, changes: &[(&str, Value)], code: Code, words: &[&str]) {
    let started = Instant::now();
    let error = failure(case, changes).unwrap_or_else(|| panic!("{case} was built with {changes:.200?}"));
    let text = error.to_string();
    assert!(started.elapsed() < A_MOMENT, "{:?} for {text}", started.elapsed());
    assert_eq!(error.code, code, "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert!(text.len() < 20_000, "{} bytes of error", text.len());
}

#[test]
fn sizes() {
    let huge = json!(1_u64 << 46);
    for (key, value, code, word) in [
        ("num_hidden_layers", json!(1_000_000), Code::SpecInvalid, "at most 4096"),
        ("num_hidden_layers", json!(u64::MAX), Code::ConfigInvalid, "num_hidden_layers"),
        ("num_hidden_layers", json!(0), Code::SpecInvalid, "0 layers"),
        ("num_hidden_layers", json!(-1), Code::ConfigInvalid, "-1"),
        ("num_hidden_layers", json!(1.5), Code::ConfigInvalid, "1.5"),
        ("num_hidden_layers", json!("2"), Code::ConfigInvalid, "\"2\""),
        ("num_hidden_layers", json!([2]), Code::ConfigInvalid, "layers"),
        ("hidden_size", json!(0), Code::SpecInvalid, "0"),
        ("hidden_size", json!(-64), Code::ConfigInvalid, "-64"),
        ("hidden_size", huge.clone(), Code::SpecInvalid, "hidden_size"),
        ("hidden_size", json!(1e300), Code::ConfigInvalid, "1e+300"),
        ("hidden_size", json!({"a": 1}), Code::ConfigInvalid, "hidden_size"),
        ("hidden_size", json!(true), Code::ConfigInvalid, "true"),
        ("vocab_size", huge.clone(), Code::SpecInvalid, "vocab_size"),
        ("intermediate_size", huge, Code::SpecInvalid, "intermediate_size"),
        ("intermediate_size", json!(i64::MIN), Code::ConfigInvalid, "intermediate_size"),
        ("num_attention_heads", json!(0), Code::SpecInvalid, "0 query heads"),
        ("num_attention_heads", json!(3), Code::SpecInvalid, "3 query heads"),
        ("num_attention_heads", json!(1 << 20), Code::SpecInvalid, "1048576 heads"),
        ("num_key_value_heads", json!(-2), Code::ConfigInvalid, "-2"),
        ("head_dim", json!(1 << 30), Code::SpecInvalid, "1073741824"),
        ("head_dim", json!(7), Code::SpecInvalid, "8 rotated elements of 7"),
        ("rms_norm_eps", json!("small"), Code::ConfigInvalid, "small"),
        ("rms_norm_eps", json!(1e300), Code::SpecInvalid, "eps"),
        ("hidden_act", json!("x".repeat(70_000)), Code::ConfigInvalid, "hidden_act"),
        ("hidden_act", json!("\u{1b}[31m"), Code::ConfigInvalid, "\\u{1b}"),
        ("tie_word_embeddings", json!("yes"), Code::ConfigInvalid, "yes"),
        ("rope_theta", json!({"__float__": "NaN"}), Code::ConfigInvalid, "NaN"),
    ] {
        let head = if key == "num_attention_heads" { vec![("num_key_value_heads", json!(2))] } else { Vec::new() };
        let rope = if key == "rope_theta" { vec![("rope_parameters", Value::Null)] } else { Vec::new() };
        refused("llama", &[vec![(key, value)], head, rope].concat(), code, &[word]);
    }
}

/// The product of two sizes that are allowed can still be no file.
#[test]
fn products_that_overflow() {
    let most = json!(0x7fff_ffff);
    let sizes = [("vocab_size", most.clone()), ("hidden_size", most.clone()), ("head_dim", json!(16))];
    refused("llama", &sizes, Code::SpecInvalid, &["weight", "63 bits"]);
    refused("mixtral", &[("num_local_experts", json!(1_u64 << 40))], Code::SpecInvalid, &["experts"]);
    refused("mixtral", &[("num_local_experts", json!(1 << 20))], Code::SpecInvalid, &["1048576 experts"]);
    refused("mixtral", &[("num_experts_per_tok", json!(0))], Code::SpecInvalid, &["0 of"]);
    refused("mixtral", &[("hidden_size", json!([0])), ("head_dim", json!(16))], Code::ConfigInvalid, &["hidden_size"]);
}

#[test]
fn thousands_of_layers_are_built_or_refused_soon() {
    let started = Instant::now();
    let mut config = config_of("llama");
    config.insert("num_hidden_layers".to_owned(), json!(4096));
    let catalogue = Catalogue::built_in().unwrap();
    let description = describe(catalogue.for_model_type("llama").unwrap(), &config, &[]).unwrap();
    assert_eq!(description.spec.layers.len(), 4096);
    assert!(started.elapsed() < A_MOMENT, "{:?}", started.elapsed());
}

#[test]
fn rope_parameters() {
    let rope = |parameters: Value| [("rope_parameters", parameters)];
    for (key, value) in [
        ("rope_theta", json!(0)),
        ("rope_theta", json!(-1e4)),
        ("rope_theta", json!({"__float__": "Infinity"})),
        ("factor", json!(0)),
        ("factor", json!(-2.0)),
        ("factor", json!({"__float__": "NaN"})),
        ("factor", json!({"__float__": "-Infinity"})),
        ("original_max_position_embeddings", json!(0)),
        ("low_freq_factor", json!(0.0)),
        ("high_freq_factor", json!(1.0)),
        ("attention_factor", json!(-1)),
    ] {
        let mut parameters = json!({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
        parameters[key] = value;
        refused("llama", &rope(parameters), Code::ConfigInvalid, &[&format!("rope_parameters.{key}")]);
    }
    let long =
        |short: Value| json!({"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": [1.0]});
    refused("llama", &rope(long(json!([-1.0]))), Code::ConfigInvalid, &["rope_parameters.short_factor", "-1"]);
    refused("llama", &rope(long(json!(vec![1.0; 100_000]))), Code::ConfigInvalid, &["short_factor", "100000 items"]);
    let more = json!({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2.0});
    refused("phi", &rope(more), Code::ConfigInvalid, &["rope_parameters.partial_rotary_factor", "2"]);
    let tiny = json!({"rope_type": "default", "rope_theta": 1e-300});
    refused("llama", &rope(tiny), Code::SpecInvalid, &["rope"]);
    let flat = json!({"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-300});
    refused("llama", &rope(flat), Code::SpecInvalid, &["rope", "no numbers"]);
}

#[test]
fn schedules() {
    for (value, words) in [
        (json!([]), vec!["layer_types", "0 types"]),
        (json!(["full_attention"]), vec!["layer_types", "1 types"]),
        (json!(vec!["full_attention"; 70_000]), vec!["layer_types", "70000 items"]),
        (json!(vec![vec!["full_attention"; 3]; 30_000]), vec!["layer_types", "65536"]),
        (json!(7), vec!["layer"]),
    ] {
        let started = Instant::now();
        let words_of_it = format!("{words:?}");
        let error = failure("gemma3_text", &[("layer_types", value)]).unwrap_or_else(|| panic!("{words_of_it}"));
        assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
        assert!(started.elapsed() < A_MOMENT);
    }
}

#[test]
fn names_without_end() {
    let started = Instant::now();
    let long = "x".repeat(2_000_000);
    let error = choose(config_with("model_type", &json!(long)).as_object().unwrap(), None).unwrap_err();
    assert!(error.code == Code::ModelTypeUnknown && error.to_string().len() < 20_000, "{error}");
    refused("llama", &[(long.as_str(), json!(1))], Code::ConfigUnusedKey, &["xxx"]);
    refused("llama", &[("odd_key", json!(long))], Code::ConfigUnusedKey, &["odd_key"]);
    assert!(started.elapsed() < A_MOMENT, "{:?}", started.elapsed());
}

fn config_with(key: &str, value: &Value) -> Value {
    let mut config = config_of("llama");
    config.insert(key.to_owned(), value.clone());
    Value::Object(config)
}

#[test]
fn texts_that_are_no_configuration() {
    let deep = |open: &str| format!("{{\"a\": {}", open.repeat(1_000_000));
    for text in [deep("["), deep("{\"a\":"), String::new(), "[]".into(), "{\"a\":NaN".into(), "{\"a\": +1}".into()] {
        let error = json_object(&text, Path::new("config.json")).unwrap_err();
        assert!(error.code == Code::ConfigInvalid && error.subject == "config.json", "{error}");
    }
}

/// A template of the user's over the plain one, with these lines of a table.
fn templated(text: &str) -> Result<()> {
    let text = format!("extends = \"llama\"\nmodel_type = [\"llama\"]\n{text}\n");
    graphs(&Template::parse("mine.toml", &text)?, &config_of("llama"))
}

#[test]
fn templates() {
    let doubling: String = (0..23).map(|i| format!("a{i} = \"=a{0} ~ a{0}\"\n", i + 1)).collect();
    let branching: String = (0..23).map(|i| format!("a{i} = \"=a{0} + a{0}\"\n", i + 1)).collect();
    templated(&format!("[model]\nvocab_size = \"=a0 + 0 * vocab_size\"\n[let]\n{branching}a23 = \"=1\"")).unwrap();
    // Jinja multiplies the length unchecked; what is unchecked depends on the build.
    let overflow = if cfg!(debug_assertions) { "Jinja itself fails" } else { "max of more than 65536" };
    for (text, code, words) in [
        (
            format!("[let]\n{doubling}a23 = \"=hidden_act\"\n[mlp]\nactivation = \"=a0\""),
            Code::ExpressionFailed,
            "more than",
        ),
        (
            "[let]\na = \"=b\"\nb = \"=a\"\n[mlp]\nactivation = \"=a or hidden_act\"".into(),
            Code::ExpressionFailed,
            "circle",
        ),
        ("[mlp]\nactivation = \"=a or hidden_act\"\n[let]\na = \"=a\"".into(), Code::ExpressionFailed, "circle"),
        ("[mlp]\nactivation = \"=([0] * 10**12) or hidden_act\"".into(), Code::ExpressionFailed, "more than 65536"),
        ("[mlp]\nactivation = \"=('x' * 10**9) or hidden_act\"".into(), Code::ExpressionFailed, "too large"),
        ("[mlp]\nactivation = \"=('x'|indent(10**9)) or hidden_act\"".into(), Code::ExpressionFailed, "filter"),
        ("[mlp]\nactivation = \"=(range(10**9)) or hidden_act\"".into(), Code::ExpressionFailed, "range"),
        ("[attention]\nscale = \"=1e308 * 10\"".into(), Code::ExpressionFailed, "no number"),
        ("[attention]\nscale = nan".into(), Code::TemplateInvalid, "NaN"),
        ("[attention]\nscale = inf".into(), Code::TemplateInvalid, "inf"),
        ("[attention]\nscale = \"=1 // 0\"".into(), Code::ExpressionFailed, "unable to calculate 1 // 0"),
        ("[attention]\nscale = \"=1 }} + 1\"".into(), Code::ExpressionFailed, "a `}` that closes nothing"),
        ("[attention]\nscale = \"=([0, 0] * 2**63)|max\"".into(), Code::ExpressionFailed, overflow),
        ("[attention]\nsoftcap = 0.0".into(), Code::SpecInvalid, "division by 0"),
        (
            format!("[attention]\nscale = \"={}1{}\"", "(".repeat(900), ")".repeat(900)),
            Code::ExpressionFailed,
            "recursion",
        ),
        (format!("[attention]\nscale = \"=1{}\"", "+1".repeat(10_000)), Code::ExpressionFailed, "2000 bytes"),
        (format!("[attention]\nscale = {}", "[".repeat(100_000)), Code::TemplateInvalid, "recursion"),
        (format!("[tensors]\n\"{}\" = \"x\"", "{a,b}".repeat(60)), Code::TemplateInvalid, "names"),
        ("tensors = 3".into(), Code::TemplateInvalid, "a table"),
        (format!("# {}", "x".repeat(2 << 20)), Code::TemplateInvalid, "bytes"),
    ] {
        let started = Instant::now();
        let error = templated(&text).err().unwrap_or_else(|| panic!("it was built: {text:.300}"));
        assert!(error.code == code && error.to_string().contains(words), "`{words}` for {text:.200}: {error}");
        assert!(started.elapsed() < A_MOMENT, "{:?} for {text:.200}", started.elapsed());
    }
    // As deep as an expression can be: there is stack enough.
    let deepest = format!("[attention]\nscale = \"=(1{}) * 0.001\"", "+1".repeat(980));
    templated(&deepest).unwrap();
}

#[test]
fn templates_that_extend_themselves() {
    for (name, parent) in [("mine.toml", "mine"), ("mine.toml", "mine.toml"), ("mine.toml", "../llama"), ("x", "")] {
        let text = format!("extends = {parent:?}\nmodel_type = [\"mine\"]\n");
        let error = Template::parse(name, &text).unwrap_err();
        assert!(error.code == Code::TemplateInvalid && error.to_string().contains("one of"), "{error}");
    }
    // Named as a built-in one, it extends that and not itself.
    assert!(Template::parse("llama", "extends = \"llama\"\nmodel_type = [\"llama\"]\n").is_ok());
    let odd = Template::parse("mine.toml", "extends = 3\nmodel_type = [\"mine\"]\n").unwrap_err();
    assert!(odd.to_string().contains("one of"), "{odd}");
    let odd = Template::parse("mine.toml", "extends = \"llama\"\nmodel_type = [3]\n").unwrap_err();
    assert!(odd.to_string().contains("model_type"), "{odd}");
    let dotted = format!("extends = \"llama\"\nmodel_type = [\"m\"]\n[model]\n{}x = 1\n", "a.".repeat(100_000));
    assert!(Template::parse("mine.toml", &dotted).is_err());
}
