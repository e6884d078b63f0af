//! Checks that other projects' own code makes, in a virtual environment that the tests make.

mod common;

use std::path::Path;

use common::{TestResult, build, cases, kjv_llama, python};

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

/// The independent judge agrees on every case, for every target.
#[test]
fn check_onnx_accepts_every_case() -> TestResult {
    let place = tempfile::tempdir_in(common::scratch())?;
    for case in cases()? {
        for target in ["ort-cpu", "standard", "primitive"] {
            let output = place.path().join(format!("{}-{target}", case.name));
            build(&case.repo()?, &output, target, case.template().as_deref())?;
            let flags = ["--tol", "1e-4"].map(Path::new);
            python::run("check_onnx.py", &[&[case.dir.as_path(), &output], &flags[..]].concat())?;
        }
    }
    Ok(())
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

/// onnxruntime-genai takes the directory as it is and generates the same tokens.
#[test]
fn genai_generates_the_expected_tokens() -> TestResult {
    let place = tempfile::tempdir_in(common::scratch())?;
    let output = place.path().join("kjv-llama");
    build(&kjv_llama(), &output, "ort-cpu", None)?;
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(output.join("genai_config.json"))?)?;
    assert_eq!(config.pointer("/search/past_present_share_buffer"), Some(&serde_json::Value::Bool(true)));
    python::run("check_genai.py", &[&output, &kjv_llama().join("greedy.json")]).map(drop)
}
