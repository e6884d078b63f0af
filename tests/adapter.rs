//! An adapter beside a model, which transformers applies where peft is installed: refused by name, or ignored when that
//! is asked for, and recorded.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{TestResult, hf2onnx, kjv_llama, scratch};
use serde_json::Value;

/// A copy of the trained model with further files.
fn repository(place: &Path, files: &[(&str, &str)]) -> TestResult<PathBuf> {
    let repo = place.join("repo");
    fs::create_dir(&repo)?;
    for entry in fs::read_dir(kjv_llama())? {
        let path = entry?.path();
        fs::copy(&path, repo.join(path.file_name().unwrap_or_default()))?;
    }
    for (name, text) in files {
        fs::write(repo.join(name), text)?;
    }
    Ok(repo)
}

/// The error's JSON, or nothing where the run succeeded.
fn failure(words: &[&str], repo: &Path, more: &[&str]) -> TestResult<Option<Value>> {
    let words = words.iter().map(AsRef::<std::ffi::OsStr>::as_ref).chain([repo.as_os_str()]);
    let ran = hf2onnx(words.chain(more.iter().map(AsRef::as_ref)))?;
    if ran.status.success() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&ran.stderr);
    let line = text.lines().find(|line| line.starts_with('{')).ok_or_else(|| format!("no error: {text}"))?;
    Ok(serde_json::from_str::<Value>(line)?.get("error").cloned())
}

const LORA: &str = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}"#;

#[test]
fn an_adapter_beside_a_model_is_refused_by_every_command_that_compiles() -> TestResult {
    for files in [
        &[("adapter_config.json", LORA), ("adapter_model.safetensors", "")][..],
        &[("adapter_config.json", LORA), ("adapter_model.bin", "")],
        // transformers reads the configuration, and then looks for the weights at the hub or fails.
        &[("adapter_config.json", "{}")],
        &[("adapter_config.json", "not JSON")],
    ] {
        let place = tempfile::tempdir_in(scratch())?;
        let repo = repository(place.path(), files)?;
        let output = place.path().join("out");
        let output = output.to_str().ok_or("no UTF-8")?;
        let build = ["--output", output];
        for (words, more) in [
            (&["--json", "build"], &build[..]),
            (&["--json", "build"], &["--output", output, "--weights", "link"]),
            (&["--json", "build"], &["--output", output, "--dry-run"]),
            (&["--json", "inspect"], &[]),
            (&["--json", "quant-report"], &[]),
        ] {
            let error = failure(words, &repo, more)?.ok_or("it was passed over")?;
            assert_eq!(error["code"], "weights-ambiguous", "{words:?}: {error}");
            let text = error.to_string();
            for word in ["adapter_config.json", "merge it first", "--ignore-adapter"] {
                assert!(text.contains(word), "{words:?}: no `{word}` in {error:#}");
            }
            assert!(!Path::new(output).exists());
        }
    }
    Ok(())
}

#[test]
fn an_ignored_adapter_is_recorded() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let repo = repository(place.path(), &[("adapter_config.json", LORA), ("adapter_model.safetensors", "x")])?;
    let record = |name: &str, repo: &Path, more: &[&str]| -> TestResult<Value> {
        let output = place.path().join(name);
        let words = [&["--output", output.to_str().ok_or("no UTF-8")?], more].concat();
        assert_eq!(failure(&["--json", "build"], repo, &words)?, None);
        Ok(serde_json::from_slice(&fs::read(output.join("hf2onnx.json"))?)?)
    };
    let ignored = record("ignored", &repo, &["--ignore-adapter"])?;
    assert_eq!(ignored["ignored_adapter"]["name"], "adapter_config.json");
    assert_eq!(ignored["ignored_adapter"]["size"], LORA.len());
    assert!(!place.path().join("ignored/adapter_config.json").exists());
    assert_eq!(failure(&["--json", "inspect"], &repo, &["--ignore-adapter"])?, None);
    // The flag changes nothing where there is none, and the weights are the same.
    let plain = record("plain", &kjv_llama(), &["--ignore-adapter"])?;
    assert_eq!((plain.get("ignored_adapter"), &plain["outputs"]), (None, &ignored["outputs"]));
    Ok(())
}

/// transformers knows an adapter by its configuration only.
#[test]
fn weights_of_an_adapter_alone_change_nothing() -> TestResult {
    for name in ["adapter_model.safetensors", "adapter_model.bin"] {
        let place = tempfile::tempdir_in(scratch())?;
        let repo = repository(place.path(), &[(name, "x")])?;
        assert_eq!(failure(&["--json", "inspect"], &repo, &[])?, None, "{name}");
    }
    Ok(())
}

#[test]
fn an_adapter_without_its_model_is_named() -> TestResult {
    for files in [
        &[("adapter_config.json", LORA), ("adapter_model.safetensors", "")][..],
        &[("adapter_config.json", LORA), ("adapter_model.bin", "")],
        &[("adapter_config.json", LORA)],
        &[("adapter_model.bin", "")],
    ] {
        let place = tempfile::tempdir_in(scratch())?;
        let repo = repository(place.path(), files)?;
        fs::remove_file(repo.join("model.safetensors"))?;
        for more in [&[][..], &["--ignore-adapter"]] {
            let error = failure(&["--json", "inspect"], &repo, more)?.ok_or("no weights are no error")?;
            assert_eq!(error["code"], "weights-missing", "{error}");
            assert!(error.to_string().contains("an adapter without its model"), "{error}");
        }
    }
    Ok(())
}
