#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::*;
use crate::error::Code;
use crate::read::json_file;
use tempfile::TempDir;

fn signature() -> Signature {
    Signature {
        onnx_file: "onnx/model.onnx".into(),
        dtype: ElementType::F32,
        quantized: None,
        cache: ElementType::F32,
        data_files: 1,
        vocab_size: 2048,
        context_length: 1024,
        hidden_size: 192,
        layers: 5,
        attention_heads: 6,
        kv_heads: 2,
        head_size: 32,
        share_buffer: true,
        position_ids: true,
        provider: None,
    }
}

/// Writes the files for a repository that holds these; the answer of a file that was not written is null.
fn written(files: &[(&str, Value)], signature: &Signature) -> Result<(ConsumerFiles, impl Fn(&str) -> Value + use<>)> {
    let (source, target) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(source.path().join("model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    for (name, value) in files {
        fs::write(source.path().join(name), value.to_string()).unwrap();
    }
    let repository = Repository::open(source.path()).unwrap();
    let files = write_consumer_files(&repository, signature, target.path())?;
    Ok((files, move |name: &str| json_file(&target.path().join(name)).map_or(Value::Null, Value::Object)))
}

#[test]
fn the_configuration_of_transformers_js() {
    let source = json!({"model_type": "llama", "a": 1e-6});
    let (_, read) = written(&[("config.json", source)], &signature()).unwrap();
    let options = json!({"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}});
    assert_eq!(read("config.json"), json!({"model_type": "llama", "a": 1e-6, "transformers.js_config": options}));

    let options = json!({"dtype": "q4", "device": "webgpu", "use_external_data_format": {"model_q4.onnx": 3}});
    let f16 = Signature {
        onnx_file: "onnx/model_fp16.onnx".into(),
        dtype: ElementType::F16,
        cache: ElementType::F16,
        data_files: 2,
        ..signature()
    };
    let (_, read) = written(&[("config.json", json!({"transformers.js_config": options}))], &f16).unwrap();
    let expected = json!({
        "dtype": "fp16", "device": "webgpu", "kv_cache_dtype": {"fp16": "float16"},
        "use_external_data_format": {"model_q4.onnx": 3, "model_fp16.onnx": 2},
    });
    assert_eq!(read("config.json")["transformers.js_config"], expected);
}

#[test]
fn generation_settings() {
    let config = json!({"eos_token_id": 1, "pad_token_id": null, "temperature": 0.5});
    let (files, read) = written(&[("config.json", config.clone())], &signature()).unwrap();
    assert_eq!(files.written, ["config.json", "genai_config.json", "generation_config.json"]);
    assert!(files.tokenizer.is_empty());
    assert!(files.notes.iter().all(|note| note.contains("tokenizer")) && files.notes.len() == 1);
    // The settings of old repositories stay what transformers takes them for.
    assert_eq!(
        read("generation_config.json"),
        json!({"_from_model_config": true, "eos_token_id": 1, "temperature": 0.5})
    );
    assert_eq!(read("genai_config.json")["search"]["temperature"], 0.5);

    let generation = json!({"eos_token_id": [7, 1], "bos_token_id": 3, "top_k": null, "top_p": 0.9, "do_sample": true});
    let files = [("config.json", config.clone()), ("generation_config.json", generation.clone())];
    let (_, read) = written(&files, &signature()).unwrap();
    assert_eq!(read("generation_config.json"), generation);
    let genai = read("genai_config.json");
    assert_eq!(genai["model"]["eos_token_id"], json!([7, 1]));
    assert_eq!((&genai["model"]["bos_token_id"], &genai["model"]["pad_token_id"]), (&json!(3), &json!(7)));
    assert_eq!((&genai["search"]["top_k"], &genai["search"]["top_p"]), (&json!(50), &json!(0.9)));
    assert_eq!(genai["search"]["do_sample"], true);
}

/// A hint of a wrong form stops no build: it is said, and genai gets what it can read.
#[test]
fn hints_that_are_none() {
    let config = json!({"eos_token_id": 1});
    let cases = [
        (json!({"top_k": -1}), "top_k", json!(0)),
        (json!({"top_k": "50"}), "top_k", json!(50)),
        (json!({"top_k": 1.5}), "top_k", json!(50)),
        (json!({"top_k": 4096}), "top_k", json!(50)),
        (json!({"temperature": [1]}), "temperature", json!(1.0)),
        (json!({"temperature": "0.7", "do_sample": true}), "temperature", json!(1.0)),
        (json!({"temperature": -0.5}), "temperature", json!(1.0)),
        (json!({"temperature": {"__float__": "Infinity"}}), "temperature", json!(1.0)),
        (json!({"do_sample": 1}), "do_sample", json!(false)),
        (json!({"do_sample": "true"}), "do_sample", json!(false)),
        (json!({"top_p": 1.5}), "top_p", json!(1.0)),
        (json!({"repetition_penalty": 0}), "repetition_penalty", json!(1.0)),
        (json!({"no_repeat_ngram_size": -1}), "no_repeat_ngram_size", json!(0)),
        (json!({"num_beams": 0}), "num_beams", json!(1)),
        (json!({"num_return_sequences": 3, "num_beams": 2}), "num_return_sequences", json!(1)),
        (json!({"length_penalty": {}}), "length_penalty", json!(1.0)),
    ];
    for (generation, key, expected) in cases {
        let files = [("config.json", config.clone()), ("generation_config.json", generation.clone())];
        let (files, read) = written(&files, &signature()).unwrap();
        assert_eq!(read("genai_config.json")["search"][key], expected, "{generation}");
        let said =
            files.notes.iter().filter(|note| note.starts_with(&format!("generation_config.json: key `{key}` is ")));
        assert_eq!(said.count(), 1, "{generation}: {:?}", files.notes);
        assert_eq!(read("generation_config.json"), generation, "the file is the repository's");
    }
    let right = json!({"top_k": 20.0, "temperature": 0, "top_p": 1, "num_beams": 4, "num_return_sequences": 4});
    let (files, read) = written(&[("config.json", config), ("generation_config.json", right)], &signature()).unwrap();
    let search = &read("genai_config.json")["search"];
    assert_eq!((&search["top_k"], &search["num_return_sequences"]), (&json!(20), &json!(4)));
    assert!(!files.notes.iter().any(|note| note.contains("key `")), "{:?}", files.notes);
}

/// transformers loads a model with them, and refuses to generate.
#[test]
fn token_ids_of_a_wrong_form() {
    let tokenizer = [
        ("tokenizer.json", json!({"added_tokens": [{"id": 5, "content": "<end>"}], "model": {"vocab": {}}})),
        ("tokenizer_config.json", json!({"eos_token": "<end>"})),
    ];
    for wrong in [json!("2"), json!(true), json!([2, "3"]), json!({"a": 1}), json!([[2]]), json!(2.5)] {
        let generation = json!({"eos_token_id": wrong.clone(), "pad_token_id": 3.0});
        let mut files = vec![("config.json", json!({"eos_token_id": 2})), ("generation_config.json", generation)];
        files.extend(tokenizer.clone());
        let (notes, read) = written(&files, &signature()).map(|(files, read)| (files.notes, read)).unwrap();
        let model = &read("genai_config.json")["model"];
        assert_eq!((&model["eos_token_id"], &model["pad_token_id"]), (&json!([5, 2]), &json!(3)));
        assert!(notes.len() == 1 && notes[0].contains(&format!("`eos_token_id` is {wrong}")), "{notes:?}");
    }
}

#[test]
fn token_ids_that_are_not_configured() {
    let config = json!({"pad_token_id": -1, "bos_token_id": 2048});
    let (files, read) = written(&[("config.json", config)], &signature()).unwrap();
    assert!(files.notes.iter().any(|note| note.contains("eos_token_id")), "{:?}", files.notes);
    let model = &read("genai_config.json")["model"];
    assert_eq!(
        (&model["bos_token_id"], &model["eos_token_id"], &model["pad_token_id"]),
        (&json!(1), &Value::Null, &Value::Null)
    );

    let tokenizer =
        json!({"added_tokens": [{"id": 5, "content": "<end>", "special": true}], "model": {"vocab": {"a": 0}}});
    let files = [
        ("config.json", json!({"eos_token_id": 2})),
        ("tokenizer.json", tokenizer),
        (
            "tokenizer_config.json",
            json!({
                "eos_token": {"content": "<end>"}, "pad_token": "<pad>",
                "added_tokens_decoder": {"6": {"content": "<pad>"}},
            }),
        ),
    ];
    let (_, read) = written(&files, &signature()).unwrap();
    let model = &read("genai_config.json")["model"];
    assert_eq!((&model["eos_token_id"], &model["pad_token_id"]), (&json!([5, 2]), &json!(6)));
}

#[test]
fn the_tokenizer_as_everybody_reads_it() {
    let config = json!({
        "backend": "tokenizers", "extra_special_tokens": ["<a>"], "model_max_length": 1e30,
        "tokenizer_class": "TokenizersBackend", "x": "kept",
    });
    let files = [
        ("config.json", json!({})),
        ("tokenizer.json", json!({"model": {"vocab": {"<a>": 0}}, "added_tokens": [token(0, "<a>")]})),
        ("tokenizer_config.json", config),
        ("golden.json", json!({})),
    ];
    let (files, read) = written(&files, &signature()).unwrap();
    assert_eq!(files.tokenizer, ["tokenizer.json", "tokenizer_config.json"]);
    let expected = json!({
        "additional_special_tokens": ["<a>"], "model_max_length": 1e30,
        "tokenizer_class": "PreTrainedTokenizerFast", "x": "kept",
    });
    assert_eq!(read("tokenizer_config.json"), expected);
}

/// An added token as tokenizer.json has it.
fn token(id: i64, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
}

/// What other files say of tokens is written where everybody looks: the ids are those that transformers 5.23 gives.
#[test]
fn tokens_that_tokenizer_json_lacks_are_written_into_it() {
    let tokenizer = json!({"added_tokens": [token(0, "<s>")], "model": {"vocab": {"<s>": 0, "</s>": 1, "a": 2}}});
    let config = ("config.json", json!({"eos_token_id": 2}));
    let file = ("tokenizer.json", tokenizer);
    let map = ("special_tokens_map.json", json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}));
    let added = ("added_tokens.json", json!({"<new>": 3, "<newer>": 4}));
    let (files, read) = written(&[config.clone(), file.clone(), map, added], &signature()).unwrap();
    let contents = |read: &Value| -> Vec<(i64, String, bool)> {
        let tokens = read["added_tokens"].as_array().unwrap().iter();
        tokens
            .map(|t| (t["id"].as_i64().unwrap(), t["content"].as_str().unwrap().to_owned(), t["special"] == true))
            .collect()
    };
    let expected = [(0, "<s>", true), (1, "</s>", true), (3, "<new>", false), (4, "<newer>", false)];
    assert_eq!(contents(&read("tokenizer.json")), expected.map(|(id, text, special)| (id, text.to_owned(), special)));
    assert_eq!(read("genai_config.json")["model"]["eos_token_id"], json!([1, 2]));
    assert!(files.notes.iter().any(|note| note.contains("<newer>")), "{:?}", files.notes);

    // The configuration's tokens, with their settings.
    let decoder = json!({"3": {"content": "<x>", "special": true, "lstrip": true}, "0": token(0, "<s>")});
    let config_file = ("tokenizer_config.json", json!({"added_tokens_decoder": decoder, "eos_token": "<x>"}));
    let (_, read) = written(&[config.clone(), file.clone(), config_file], &signature()).unwrap();
    let found = read("tokenizer.json");
    assert_eq!(
        (&found["added_tokens"][1]["content"], &found["added_tokens"][1]["lstrip"]),
        (&json!("<x>"), &json!(true))
    );
    assert_eq!(read("genai_config.json")["model"]["eos_token_id"], json!([3, 2]));

    // An id that the tokenizer does not give.
    for other in [json!({"7": {"content": "<x>"}}), json!({"2": {"content": "</s>"}})] {
        let config_file = ("tokenizer_config.json", json!({"added_tokens_decoder": other}));
        let error = written(&[config.clone(), file.clone(), config_file], &signature()).map(|_| ()).unwrap_err();
        assert!(error.code == Code::TokenizerInvalid && error.subject.contains("tokenizer_config.json"), "{error}");
    }
}

/// A repository without a usable tokenizer says so, and what to do.
#[test]
fn notes_on_tokenizers_that_are_partial_or_broken() {
    let config = ("config.json", json!({"eos_token_id": 2}));
    let whole = json!({"added_tokens": [], "model": {"vocab": {"a": 0}}});
    for (files, words) in [
        (vec![], "has no tokenizer"),
        (vec![("tokenizer_config.json", json!({}))], "save_pretrained"),
        (
            vec![("vocab.json", json!({"a": 0})), ("added_tokens.json", json!({}))],
            "no tokenizer.json (it has added_tokens.json, vocab.json)",
        ),
        (vec![("tokenizer.json", json!({}))], "no `vocab`"),
        (vec![("tokenizer.json", json!([]))], "tokenizer.json: "),
        (vec![("tokenizer.json", whole.clone()), ("tokenizer_config.json", json!([]))], "tokenizer_config.json: "),
        (vec![("tokenizer.json", whole.clone()), ("tokenizer_config.json", json!({"bos_token": 3}))], "`bos_token`: 3"),
        (
            vec![("tokenizer.json", whole.clone()), ("tokenizer_config.json", json!({"chat_template": "{% if %}"}))],
            "does not parse",
        ),
        (
            vec![
                ("tokenizer.json", whole.clone()),
                ("tokenizer_config.json", json!({"chat_template": "{{ bos_token }}"})),
            ],
            "names `bos_token`, which no file",
        ),
    ] {
        let all: Vec<_> = std::iter::once(config.clone()).chain(files).collect();
        let (files, _) = written(&all, &signature()).unwrap();
        assert!(files.notes.iter().any(|note| note.contains(words)), "{words}: {:?}", files.notes);
    }
    let (files, _) = written(&[config, ("tokenizer.json", whole)], &signature()).unwrap();
    assert!(files.notes.is_empty(), "{:?}", files.notes);
}

#[test]
fn files_are_copied_as_bytes() {
    let (source, target) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::create_dir(source.path().join("additional_chat_templates")).unwrap();
    let names =
        ["additional_chat_templates/rag.jinja", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"];
    for name in names {
        fs::write(source.path().join(name), b"{ broken \xff").unwrap();
    }
    assert_eq!(copy_tokenizer(source.path(), target.path(), &SpecialTokens::default()).unwrap(), names);
    for name in names {
        assert_eq!(fs::read(target.path().join(name)).unwrap(), b"{ broken \xff");
    }
}

#[test]
fn the_whole_genai_configuration() {
    let config = json!({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2});
    let unshared = Signature { share_buffer: false, position_ids: false, ..signature() };
    for (name, signature) in [("shared", signature()), ("unshared", unshared)] {
        let (_, read) = written(&[("config.json", config.clone())], &signature).unwrap();
        insta::assert_snapshot!(name, format!("{:#}", read("genai_config.json")));
    }
}
