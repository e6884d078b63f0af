//! Checks that other projects' own code makes, in a virtual environment that the tests make.

mod common;

use std::path::Path;

use common::models::{TARGETS, build_with, options};
use common::{Case, TestResult, build, cases, kjv_llama, python};
use hf2onnx::compile::Options;
use hf2onnx::lower::Padding;
use hf2onnx::opset::Positions;
use rayon::prelude::*;

#[test]
fn operator_tables_are_what_the_script_writes() -> TestResult {
    python::run("check_schemas.py", &[]).map(drop)
}

#[test]
fn weights_are_restored_bit_for_bit() -> TestResult {
    let mut arguments = Vec::new();
    for case in cases()? {
        let repo = case.repo()?;
        arguments.extend([case.dir, repo]);
    }
    let arguments: Vec<&Path> = arguments.iter().map(AsRef::as_ref).collect();
    let printed = python::run("check_weights.py", &arguments)?;
    assert!(printed.contains("tensors compared"), "{printed}");
    Ok(())
}

/// Cases of which `batch_steps` has no reference: transformers' own cached run departs from its full pass, since the
/// frequencies change with the length, and no golden holds a cached batch.
const WITHOUT_CACHED_BATCH: [&str; 3] = ["llama-dynamic-long", "llama-longrope-crossing", "phimoe-b"];

/// The independent judge agrees on every case, for every target.
#[test]
fn check_onnx_accepts_every_case() -> TestResult {
    let mut jobs = Vec::new();
    for case in cases()? {
        jobs.extend(TARGETS.map(|target| (case.clone(), target)));
    }
    let wrong: Vec<String> =
        jobs.par_iter().filter_map(|(case, target)| judge(case, target).err().map(|e| e.to_string())).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn judge(case: &Case, target: &str) -> TestResult {
    let place = tempfile::tempdir_in(common::scratch())?;
    let output = place.path().join(target);
    build(&case.repo()?, &output, target, case.template().as_deref())?;
    let mut arguments = [case.dir.as_path(), &output, Path::new("--tol"), Path::new("1e-4")].to_vec();
    if WITHOUT_CACHED_BATCH.contains(&case.name.as_str()) {
        arguments.extend(["--only", "full", "batch", "batch_right", "steps", "chunks", "greedy"].map(Path::new));
    }
    python::run("check_onnx.py", &arguments).map(drop)
}

/// The onnx package's checker accepts what is written without vendor operators.
#[test]
fn the_onnx_checker_accepts_standard_and_primitive() -> TestResult {
    let place = tempfile::tempdir_in(common::scratch())?;
    let mut models = Vec::new();
    for case in cases()? {
        for target in ["standard", "primitive"] {
            let output = place.path().join(format!("{}-{target}", case.name));
            build(&case.repo()?, &output, target, case.template().as_deref())?;
            models.push(output.join("onnx").join("model.onnx"));
        }
    }
    let models: Vec<&Path> = models.iter().map(AsRef::as_ref).collect();
    python::run("check_model.py", &models).map(drop)
}

/// onnxruntime-genai takes the directory as it is and generates the same tokens; with positions from the mask, and with
/// rows that attention rotates, too.
#[test]
fn genai_generates_the_expected_tokens() -> TestResult {
    let place = tempfile::tempdir_in(common::scratch())?;
    let both = [Positions::Ids, Positions::Mask];
    for (padding, positions) in [Padding::Any, Padding::Right].into_iter().flat_map(|p| both.map(|q| (p, q))) {
        let output = place.path().join(format!("{padding:?}-{positions:?}"));
        build_with(&Options { padding, positions, ..options(&kjv_llama(), "ort-cpu")? }, &output)?;
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(output.join("genai_config.json"))?)?;
        assert_eq!(config.pointer("/search/past_present_share_buffer"), Some(&serde_json::Value::Bool(true)));
        let ids = config.pointer("/model/decoder/inputs/position_ids");
        assert_eq!(ids.is_some(), positions == Positions::Ids, "{config}");
        python::run("check_genai.py", &[&output, &kjv_llama().join("greedy.json")])?;
    }
    Ok(())
}

/// Cases of which a row in a batch is not the row alone in transformers either: the longest row decides for all when
/// longrope switches, and Llama 4 scales queries by their place in the cache.
const BY_BATCH: [&str; 2] = ["phi3-longrope", "llama4_text"];

/// True of a case with a layer that sees a part of what lies before it, and with keys and values of one size, as the
/// client's caches have them.
fn looks_back_a_part(case: &Case) -> TestResult<bool> {
    let config = hf2onnx::read::json_file(&case.dir.join("config.json"))?;
    let template = hf2onnx::describe::choose(&config, case.template().as_deref())?;
    let spec = hf2onnx::describe::describe(&template, &config, &[])?.spec;
    let mut attentions = spec.layers.iter().map(|layer| &layer.attention);
    let cached = attentions.clone().all(|attention| attention.key_size == attention.value_size);
    Ok(cached && attentions.any(|attention| attention.window.is_some() || attention.chunk.is_some()))
}

/// In onnxruntime-genai a row of a ragged batch gives what it gives alone, whatever windows its layers have.
#[test]
fn genai_runs_ragged_batches_of_windowed_models() -> TestResult {
    let place = tempfile::tempdir_in(common::scratch())?;
    let mut folders = Vec::new();
    for case in cases()?.into_iter().filter(|case| !BY_BATCH.contains(&case.name.as_str())) {
        if looks_back_a_part(&case)? {
            for target in TARGETS {
                let output = place.path().join(format!("{}-{target}", case.name));
                build(&case.repo()?, &output, target, case.template().as_deref())?;
                folders.push(output);
            }
        }
    }
    assert!(folders.len() >= 50, "{} directories", folders.len());
    let folders: Vec<&Path> = folders.iter().map(AsRef::as_ref).collect();
    python::run("check_ragged.py", &folders).map(drop)
}
