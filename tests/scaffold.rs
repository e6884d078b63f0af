//! Drafts of templates: near a known architecture they build at once; of a stranger every tensor has its place and only
//! what leaves no trace in names and shapes is left to the author.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::models::options;
use common::{Case, TestResult, hf2onnx, repository};
use hf2onnx::describe::Template;
use hf2onnx::read::Repository;
use hf2onnx::scaffold::{Draft, draft};

/// A case's repository whose configuration says that it is something else.
fn renamed(case: &str, into: &Path) -> TestResult<PathBuf> {
    renamed_from(&Case::named(case)?.repo()?, case, into)
}

fn renamed_from(repo: &Path, case: &str, into: &Path) -> TestResult<PathBuf> {
    for entry in fs::read_dir(repo)? {
        let path = entry?.path();
        let name = path.file_name().ok_or("no name")?;
        fs::copy(&path, into.join(name))?;
    }
    let path = into.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    let keys = config.as_object_mut().ok_or("no object")?;
    keys.insert("model_type".to_owned(), format!("unknown_{case}").into());
    fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
    Ok(into.to_owned())
}

fn of(repo: &Path) -> TestResult<Draft> {
    let draft = draft(&mut Repository::open(repo)?)?;
    Template::parse("draft.toml", &draft.template).map_err(|error| format!("{error}\n{}", draft.template))?;
    Ok(draft)
}

#[test]
fn a_variant_extends_the_right_template_and_builds() -> TestResult {
    for case in ["llama", "llama-bias", "mistral", "qwen2", "qwen2-plain", "mixtral", "deepseek_v3", "gemma"] {
        let scratch = tempfile::tempdir()?;
        let draft = of(&renamed(case, scratch.path())?)?;
        let wanted = case.split('-').next().unwrap_or(case);
        assert_eq!(draft.extends, wanted, "{case}: {:?}", draft.nearest);
        assert_eq!(draft.failure, None, "{case}:\n{}", draft.template);
        assert!(draft.guesses.is_empty() && draft.todos.is_empty(), "{case}:\n{}", draft.template);
    }
    Ok(())
}

/// The parts of quantised weights are no tensors of their own.
#[test]
fn a_quantised_variant_is_seen_decoded() -> TestResult {
    let quantized = repository().join("golden").join("quantized");
    for (case, wanted) in [
        ("gptq-actorder", "llama"),
        ("awq", "llama"),
        ("ct-pack", "llama"),
        ("bnb-nf4", "llama"),
        ("modelopt-nvfp4", "llama"),
        ("fp8-moe", "qwen3_moe"),
        ("mxfp4", "gpt_oss"),
    ] {
        let scratch = tempfile::tempdir()?;
        let repo = renamed_from(&quantized.join(case), case, scratch.path())?;
        let draft = of(&repo)?;
        assert_eq!(draft.extends, wanted, "{case}: {:?}", draft.nearest);
        assert_eq!(draft.failure, None, "{case}:\n{}", draft.template);
        assert!(draft.guesses.is_empty() && draft.todos.is_empty(), "{case}:\n{}", draft.template);
        assert!(draft.template.contains("# The weights are quantised"), "{case}:\n{}", draft.template);
        let error = hf2onnx::compile::compile(&options(&repo, "ort-cpu")?).err().ok_or("an unknown type was built")?;
        assert!(error.expected.contains(&format!("{wanted} (100 %)")), "{case}: {error}");
    }
    // A packed weight that does not say its shape is said, and a draft is a draft nevertheless.
    let scratch = tempfile::tempdir()?;
    let draft = of(&renamed_from(&quantized.join("quanto"), "quanto", scratch.path())?)?;
    assert!(
        draft.failure.as_ref().is_some_and(|words| words.contains("does not say its shape")),
        "{:?}",
        draft.failure
    );
    Ok(())
}

/// What a variant has besides is asked for, never dropped.
#[test]
fn a_variant_that_is_not_quite_known_asks() -> TestResult {
    let scratch = tempfile::tempdir()?;
    let repo = renamed("qwen2", scratch.path())?;
    let path = repo.join("config.json");
    let text = fs::read_to_string(&path)?.replace("\"hidden_size\"", "\"d_model\"").replacen('{', "{\"twist\": 3,", 1);
    fs::write(&path, text.replace("unknown_qwen2", "twisted").replace("Qwen2ForCausalLM", "TwistedForCausalLM"))?;
    let draft = of(&repo)?;
    assert_eq!(draft.extends, "qwen2", "{}", draft.template);
    assert_eq!(draft.failure, None, "{}", draft.template);
    assert!(draft.template.contains("hidden_size = \"=d_model\"  # guess:"), "{}", draft.template);
    assert!(draft.todos.iter().any(|todo| todo.contains("twist")), "{:?}", draft.todos);
    Ok(())
}

#[test]
fn a_stranger_is_bound_whole() -> TestResult {
    let repo = Case::named("my_model")?.repo()?;
    let draft = of(&repo)?;
    assert_eq!(draft.extends, "llama");
    assert_eq!(draft.failure, None, "{}", draft.template);
    insta::assert_snapshot!("my_model", draft.template);
    // What the author has to find in the modeling file.
    let corrected = [
        ("layout = \"half\"", "layout = \"interleaved\""),
        ("activation = \"silu\"", "activation = \"relu2\""),
        ("score = \"softmax\"", "score = \"sigmoid\""),
    ];
    let right = corrected.iter().fold(draft.template.clone(), |text, (guess, truth)| {
        assert!(text.lines().any(|line| line.contains(guess) && line.contains("# TODO")), "{guess} in\n{text}");
        text.replace(guess, truth)
    });
    let config = Repository::open(&repo)?.config;
    let spec = |name: &str, text: &str| -> TestResult<serde_json::Value> {
        let template = Template::parse(name, text)?;
        let mut spec = serde_json::to_value(hf2onnx::describe::describe(&template, &config, &[])?.spec)?;
        spec.as_object_mut().ok_or("no object")?.remove("template");
        Ok(spec)
    };
    let own = fs::read_to_string(repo.join("template.toml"))?;
    assert_eq!(spec("draft.toml", &right)?, spec("template.toml", &own)?);
    Ok(())
}

#[test]
fn the_error_for_an_unknown_model_names_the_nearest() -> TestResult {
    let scratch = tempfile::tempdir()?;
    let repo = renamed("qwen2", scratch.path())?;
    let ran =
        hf2onnx(["build".as_ref(), repo.as_os_str(), "--output".as_ref(), scratch.path().join("out").as_os_str()])?;
    let words = String::from_utf8(ran.stderr)?;
    assert_eq!(ran.status.code(), Some(1));
    assert!(words.contains("model-type-unknown") && words.contains("qwen2 (100 %)"), "{words}");
    Ok(())
}

#[test]
fn a_draft_is_written_once() -> TestResult {
    let scratch = tempfile::tempdir()?;
    let repo = Case::named("my_model")?.repo()?;
    let path = scratch.path().join("my.toml");
    let run = || hf2onnx(["scaffold".as_ref(), repo.as_os_str(), "--output".as_ref(), path.as_os_str()]);
    assert!(run()?.status.success());
    Template::read(&path)?;
    assert_eq!(run()?.status.code(), Some(1), "an existing file is not replaced");
    Ok(())
}

/// Whatever the configuration says, a draft is a template.
#[test]
fn odd_configurations_still_give_a_draft() -> TestResult {
    let odd = [
        "{}",
        r#"{"model_type": "a\"]\nb", "architectures": 3, "quote\"d key\n": "x\u0007y"}"#,
        r#"{"model_type": "x", "num_hidden_layers": 99999999999, "hidden_size": -1, "vocab_size": "many"}"#,
        r#"{"model_type": "x", "num_attention_heads": 0, "n_layer": null, "d_model": 64, "rope_scaling": {"type": 1}}"#,
        r#"{"model_type": "x", "width": 64, "heads": 4, "vocab_size": 320, "quantization_config": {"bits": 4}}"#,
    ];
    for config in odd {
        let scratch = tempfile::tempdir()?;
        fs::copy(Case::named("my_model")?.repo()?.join("model.safetensors"), scratch.path().join("model.safetensors"))?;
        fs::write(scratch.path().join("config.json"), config)?;
        of(scratch.path()).map_err(|error| format!("{config}: {error}"))?;
    }
    Ok(())
}
