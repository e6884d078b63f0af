//! `--provider` on the command line, on a machine that need not have a GPU: what is missing is said with the next step,
//! and where the nodes run is listed for the processor as it is for a GPU.
#![allow(clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::models::{build_with, options};
use common::{TestResult, hf2onnx, kjv_llama, scratch};
use hf2onnx::runtime::{Provider, Search};
use serde_json::{Value, json};

fn built(place: &Path) -> TestResult<PathBuf> {
    let dir = place.join("model");
    build_with(&options(&kjv_llama(), "ort-cpu")?, &dir)?;
    Ok(dir)
}

fn run(words: &[&str], dir: &Path, more: &[&str]) -> TestResult<Output> {
    let words = words.iter().map(AsRef::<std::ffi::OsStr>::as_ref);
    hf2onnx(words.chain([dir.as_os_str()]).chain(more.iter().map(AsRef::as_ref)))
}

/// The error of a run that failed, from its JSON.
fn error(ran: &Output) -> TestResult<Value> {
    assert_eq!(ran.status.code(), Some(1), "{}", String::from_utf8_lossy(&ran.stderr));
    let text = String::from_utf8(ran.stderr.clone())?;
    let line = text.lines().find(|line| line.starts_with('{')).ok_or("no error")?;
    Ok(serde_json::from_str::<Value>(line)?["error"].clone())
}

fn has(error: &Value, field: &str, words: &str) {
    assert!(error[field].as_str().is_some_and(|text| text.contains(words)), "no `{words}` in {error:#}");
}

/// The library of the processor, by each command that runs a model.
#[test]
fn a_library_without_the_cuda_provider_is_refused() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let dir = built(place.path())?;
    common::models::runtime()?;
    let library = Search::default().run().library().ok_or("no onnxruntime")?.path;
    let beside = Provider::Cuda.library().ok_or("no name")?;
    if library.with_file_name(beside).exists() {
        return Ok(());
    }
    let library = library.to_str().ok_or("no UTF-8")?;
    for (words, more) in
        [("verify", &[] as &[&str]), ("generate", &["--prompt", "In the"]), ("bench", &["--new-tokens", "1"])]
    {
        let more = [&["--provider", "cuda", "--runtime", library], more].concat();
        let error = error(&run(&["--json", words], &dir, &more)?)?;
        assert_eq!(error["code"], "runtime-missing", "{words}");
        has(&error, "found", beside);
        has(&error, "help", "runtime install --provider cuda");
    }
    Ok(())
}

/// A folder with the names of the right files and nothing in them: it is passed over, and not used in silence.
#[test]
fn a_library_that_does_not_load_is_an_error() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    for name in ["libonnxruntime.so.1.31.1", Provider::Cuda.library().ok_or("no name")?] {
        fs::write(place.path().join(name), "no library")?;
    }
    let folder = place.path().to_str().ok_or("no UTF-8")?;
    let ran = hf2onnx(["--json", "runtime", "--provider", "cuda", "--runtime", folder])?;
    let report: Value = serde_json::from_slice(&ran.stdout)?;
    assert_eq!(
        (&report["provider"], &report["used"], &report["pinned"]),
        (&json!("cuda"), &Value::Null, &json!("1.31.1"))
    );
    let libraries = report["cuda"]["libraries"].as_array().ok_or("no libraries")?;
    assert!(libraries.iter().any(|library| library["name"].as_str().is_some_and(|name| name.contains("cudart"))));
    assert!(report["cuda"]["driver"].get("version").is_some(), "{report:#}");
    has(&error(&ran)?, "subject", "libonnxruntime.so.1.31.1");
    // Text says the same, a line for each.
    let ran = hf2onnx(["runtime", "--provider", "cuda", "--runtime", folder])?;
    let text = String::from_utf8(ran.stdout)?;
    assert!(text.contains("NVIDIA driver") && text.contains("cublasLt"), "{text}");
    Ok(())
}

/// The profile of a real session is read here as it is on a GPU.
#[test]
fn verify_lists_where_the_nodes_run() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let dir = built(place.path())?;
    let ran = run(&["--json", "verify"], &dir, &["--strict-provider", "--threads", "1"])?;
    assert_eq!(ran.status.code(), Some(0), "{}", String::from_utf8_lossy(&ran.stderr));
    let report: Value = serde_json::from_slice(&ran.stdout)?;
    let placement = &report["placement"];
    assert_eq!((&placement["provider"], &placement["elsewhere"]), (&json!("cpu"), &json!([])));
    // Five layers, each of a dozen nodes.
    assert!(placement["nodes"].as_u64().is_some_and(|nodes| nodes > 60), "{placement}");
    let text = String::from_utf8(run(&["verify"], &dir, &["--strict-provider"])?.stdout)?;
    assert!(text.contains("nodes on CPUExecutionProvider, none elsewhere"), "{text}");
    // Without the option nobody asked.
    let plain = run(&["--json", "verify"], &dir, &["--provider", "cpu"])?;
    assert_eq!(serde_json::from_slice::<Value>(&plain.stdout)?["placement"], Value::Null);
    Ok(())
}

#[test]
fn what_is_no_provider_is_a_wrong_command_line() -> TestResult {
    for words in [["--provider", "rocm"], ["--provider-option", "device_id"]] {
        let ran = run(&["verify"], Path::new("nowhere"), &words)?;
        assert_eq!(ran.status.code(), Some(2), "{words:?}");
    }
    Ok(())
}
