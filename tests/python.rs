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
