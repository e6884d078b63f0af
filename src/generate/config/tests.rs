use serde_json::json;

use super::*;
use crate::generate::logits::LogitsProcessor as _;

/// A file of golden/generation.
pub(in crate::generate) fn recorded(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join("generation").join(name);
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap().clone();
    assert!(!cases.is_empty(), "{name}");
    cases
}

fn config(values: &Value) -> GenerationConfig {
    GenerationConfig { values: serde_json::from_value(values.clone()).unwrap(), ..GenerationConfig::default() }
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A score as it is recorded.
fn score(value: &Value) -> f32 {
    match value.as_str() {
        Some(text) => text.parse().unwrap(),
        None if value.is_null() => f32::NEG_INFINITY,
        None => serde_json::from_value(value.clone()).unwrap(),
    }
}

fn close(got: f32, expected: f32) -> bool {
    got.to_bits() == expected.to_bits() || (got - expected).abs() <= 2e-6 * expected.abs().max(1.0)
}

#[test]
fn scores_become_what_transformers_makes_of_them() {
    let mut wrong = Vec::new();
    for case in recorded("processors.json") {
        let prompt: Vec<u32> = numbers(&case["prompt"]);
        let settings = config(&case["settings"]).settings(&prompt, &Overrides::default()).unwrap();
        let ids: Vec<i64> = [numbers::<i64>(&case["prompt"]), numbers(&case["new"])].concat();
        let mut scores: Vec<f32> = case["scores"].as_array().unwrap().iter().map(score).collect();
        settings.processors.process(&ids, &mut scores);
        let expected: Vec<f32> = case["expected"].as_array().unwrap().iter().map(score).collect();
        let same = scores.len() == expected.len() && scores.iter().zip(&expected).all(|(a, b)| close(*a, *b));
        if !same {
            wrong.push(format!("{} behind {ids:?}:\n{scores:?}\n{expected:?}", case["settings"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_transformers_refuses_is_refused_by_name() {
    for case in recorded("errors.json") {
        let config = GenerationConfig { vocabulary: Some(2048), ..config(&case["settings"]) };
        let error = config.settings(&[9; 10], &Overrides::default()).map(|_| ()).unwrap_err();
        let key = format!("key `{}`", case["key"].as_str().unwrap());
        assert!(error.code == Code::ConfigInvalid && error.subject.ends_with(&key), "{}: {error}", case["settings"]);
        // Where nothing is drawn, sampling settings may be anything.
        if case["settings"]["do_sample"] == true {
            config.settings(&[9; 10], &Overrides { temperature: Some(0.0), ..Overrides::default() }).unwrap();
        }
    }
}

#[test]
fn options_are_stronger_than_the_file() {
    let file =
        json!({"do_sample": true, "temperature": "x", "top_k": -1, "top_p": 7, "max_new_tokens": 0, "max_length": "a"});
    let of = |overrides: Overrides| config(&file).settings(&[1, 2], &overrides);
    let greedy = of(Overrides { max_new_tokens: Some(3), temperature: Some(0.0), ..Overrides::default() }).unwrap();
    assert_eq!((greedy.max_new_tokens, greedy.choice), (3, Choice::Likeliest));
    let all = Overrides {
        max_new_tokens: Some(3),
        temperature: Some(0.5),
        top_k: Some(2),
        top_p: Some(1.0),
        seed: 8,
        chat: false,
    };
    let drawn = of(all).unwrap();
    assert_eq!(drawn.choice, Choice::Drawn { seed: 8 });
    let mut scores = vec![1.0, 2.0, 3.0];
    drawn.processors.process(&[], &mut scores);
    assert_eq!(scores, [f32::NEG_INFINITY, 4.0, 6.0]);
    for (without, key) in [
        (Overrides { max_new_tokens: None, ..all }, "max_new_tokens"),
        (Overrides { temperature: None, ..all }, "temperature"),
        (Overrides { top_k: None, ..all }, "top_k"),
    ] {
        let error = of(without).map(|_| ()).unwrap_err();
        assert!(error.subject.ends_with(&format!("`{key}`")) && error.help.contains("--"), "{error}");
    }
    // An option that only sampling has is a wish to sample, from fifty tokens as transformers does.
    let sampled =
        config(&json!({})).settings(&[1], &Overrides { top_p: Some(0.999_999), ..Overrides::default() }).unwrap();
    let mut scores: Vec<f32> = (0..60_u8).map(f32::from).map(|n| n * 1e-3).collect();
    sampled.processors.process(&[], &mut scores);
    assert_eq!(scores.iter().filter(|score| score.is_finite()).count(), 50);
}

#[test]
fn lengths() {
    let most = |file: Value, option: Option<usize>, context: Option<usize>| {
        let config = GenerationConfig { context, ..config(&file) };
        config
            .settings(&[5; 6], &Overrides { max_new_tokens: option, ..Overrides::default() })
            .map(|s| s.max_new_tokens)
    };
    assert_eq!(most(json!({}), None, None).unwrap(), 256);
    assert_eq!(most(json!({"max_length": 30}), None, None).unwrap(), 24);
    assert_eq!(most(json!({"max_length": 30, "max_new_tokens": 4}), None, None).unwrap(), 4);
    assert_eq!(most(json!({"max_length": 30, "max_new_tokens": 4.0}), Some(7), None).unwrap(), 7);
    assert_eq!(most(json!({"max_length": 30}), None, Some(20)).unwrap(), 14);
    assert_eq!(most(json!({}), None, Some(6)).unwrap_err().code, Code::UsageInvalid);
}

#[test]
fn a_directory() {
    let folder = tempfile::tempdir().unwrap();
    let read = || GenerationConfig::read(folder.path()).unwrap();
    let write = |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    let stop = |chat: bool| read().settings(&[1], &Overrides { chat, ..Overrides::default() }).unwrap().stop.tokens;
    assert_eq!((stop(false), read().context, read().vocabulary), (vec![], None, None));
    write(
        "config.json",
        json!({"eos_token_id": 7, "max_position_embeddings": 64, "vocab_size": 32, "no_repeat_ngram_size": "x"}),
    );
    assert_eq!((read().context, read().vocabulary), (Some(64), Some(32)));
    // Settings of old repositories count, and are named by their file.
    let error = read().settings(&[1], &Overrides::default()).map(|_| ()).unwrap_err();
    assert!(error.subject.ends_with("config.json: key `no_repeat_ngram_size`"), "{error}");
    write("generation_config.json", json!({"max_new_tokens": 5}));
    assert_eq!((stop(false), stop(true)), (vec![7], vec![7]));
    write("tokenizer.json", json!({"added_tokens": [{"id": 9, "content": "<end>"}], "model": {"vocab": {}}}));
    write("tokenizer_config.json", json!({"eos_token": "<end>"}));
    // transformers' `generate` does not know the tokenizer's end; a chat's answer ends with it.
    assert_eq!((stop(false), stop(true)), (vec![7], vec![7, 9]));
    write("generation_config.json", json!({"eos_token_id": [2, 1, 2]}));
    assert_eq!((stop(false), stop(true)), (vec![1, 2], vec![1, 2, 9]));
    write("config.json", json!({"text_config": {"eos_token_id": 3, "max_position_embeddings": 16}}));
    write("generation_config.json", json!({"eos_token_id": [-1]}));
    assert_eq!((stop(false), read().context), (vec![3], Some(16)));
    write("config.json", json!({}));
    assert_eq!((stop(false), stop(true)), (vec![9], vec![9]));
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    assert_eq!(GenerationConfig::read(folder.path()).map(|_| ()).unwrap_err().code, Code::ConfigInvalid);
}

#[test]
fn what_is_not_followed_is_named() {
    let named = |file: Value, overrides: Overrides| config(&file).notes(&overrides).unwrap();
    let drawn = Overrides { temperature: Some(1.0), ..Overrides::default() };
    for (key, value) in [
        ("num_beams", json!(3)),
        ("num_beams", json!("3")),
        ("num_beam_groups", json!(2)),
        ("constraints", json!([1])),
        ("force_words_ids", json!([[1]])),
        ("dola_layers", json!("low")),
        ("guidance_scale", json!(1.5)),
        ("watermarking_config", json!({"bias": 2.5})),
        ("token_healing", json!(true)),
        ("num_return_sequences", json!(2)),
        ("prompt_lookup_num_tokens", json!(3)),
        ("assistant_early_exit", json!(2)),
        ("use_mtp", json!(true)),
        ("cache_implementation", json!("quantized")),
        ("top_a", json!(0.2)),
        ("frequency_penalty", json!(0)),
    ] {
        for overrides in [Overrides::default(), drawn] {
            let notes = named(json!({key: value}), overrides);
            let start = format!("generation_config.json: `{key}` ({value}) is not followed: ");
            assert!(notes.len() == 1 && notes[0].starts_with(&start), "{notes:?}");
        }
    }
    // What changes nothing is not worth a word.
    let quiet = json!({"num_beams": 1, "num_return_sequences": 1.0, "guidance_scale": 1.0, "token_healing": false, "constraints": null,
        "cache_implementation": "static", "use_cache": false, "transformers_version": "4.1", "_from_model_config": true, "top_k": 50,
        "temperature": 1.0, "length_penalty": 2.0, "early_stopping": true, "penalty_alpha": 0.6, "top_p": 1, "unknown": null});
    assert_eq!(named(quiet, drawn), [""; 0]);
    let idle = json!({"temperature": 0.6, "top_p": 0.9, "min_p": 0.1, "no_repeat_ngram_size": 2});
    let notes = named(idle.clone(), Overrides::default());
    assert!(notes.len() == 1 && notes[0].contains("`temperature`, `top_p`, `min_p`: without `do_sample`"), "{notes:?}");
    assert_eq!(named(idle, Overrides { temperature: Some(0.0), ..Overrides::default() }), [""; 0], "the user said it");
    assert_eq!(named(json!({"penalty_alpha": 0.6, "top_k": 4}), Overrides::default()).len(), 2);
}
