//! Quantised checkpoints from the repository to the built model: what the formats' own libraries make of the weights,
//! transformers computed with, and so does the build.
#![allow(clippy::print_stderr)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use common::models::{build_with, options, runtime};
use common::{TestResult, repository, scratch};
use hf2onnx::compile::{Options, Weights};
use hf2onnx::golden::Golden;
use hf2onnx::verify::{self, Verdict, against_golden};
use rayon::prelude::*;
use serde_json::Value;

/// Every quantised repository.
fn repositories() -> TestResult<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(repository().join("golden").join("quantized"))? {
        all.push(entry?.path());
    }
    all.retain(|dir| dir.join("golden.safetensors").is_file());
    all.sort();
    assert!(all.len() >= 21, "{} repositories", all.len());
    Ok(all)
}

fn name(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Builds, verifies, and gives the record and every complaint.
fn verified(options: &Options, golden: &Path) -> TestResult<(Value, Vec<String>)> {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("model");
    build_with(options, &output)?;
    let settings = verify::Options { threads: 1, ..verify::Options::default() };
    let report = against_golden(&output, &Golden::read(golden)?, &settings)?;
    let wrong = report.scenarios.iter().filter(|o| !matches!(o.verdict, Verdict::Holds | Verdict::NearTie));
    let wrong = wrong.map(|o| {
        format!("{}: {:?} {}", o.scenario, o.comparison.map(|c| c.max), o.note.as_deref().unwrap_or_default())
    });
    Ok((serde_json::from_slice(&fs::read(output.join("hf2onnx.json"))?)?, wrong.collect()))
}

fn must_hold(what: &str, jobs: &[(String, Options)]) -> TestResult<Vec<Value>> {
    runtime()?;
    let start = Instant::now();
    let run = |(name, options): &(String, Options)| {
        let golden = options.repository.join("golden.safetensors");
        let (record, wrong) = verified(options, &golden).unwrap_or_else(|e| (Value::Null, vec![e.to_string()]));
        (record, wrong.into_iter().map(|line| format!("{name}: {line}")).collect::<Vec<_>>())
    };
    let ran: Vec<_> = jobs.par_iter().map(run).collect();
    eprintln!("{what}: {} models in {:.1} s", jobs.len(), start.elapsed().as_secs_f64());
    let complaints: Vec<&str> = ran.iter().flat_map(|(_, lines)| lines).map(String::as_str).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    Ok(ran.into_iter().map(|(record, _)| record).collect())
}

/// Decoded to float32, every format computes what transformers computes with its library's values.
#[test]
fn every_format_decoded() -> TestResult {
    let mut jobs = Vec::new();
    for dir in repositories()? {
        jobs.push((name(&dir), options(&dir, "ort-cpu")?));
    }
    for record in must_hold("decoded", &jobs)? {
        let used = record["config_keys"]["used"].as_array().ok_or("no keys")?;
        assert!(used.iter().any(|key| key.as_str().is_some_and(|key| key.contains("quant"))), "{used:?}");
    }
    Ok(())
}

/// Quantised weights are no bytes that a graph could take from the checkpoint's files: they are written, the others linked.
#[test]
fn linked_beside_decoded() -> TestResult {
    let mut jobs = Vec::new();
    for dir in repositories()? {
        let own = options(&dir, "standard")?;
        jobs.push((name(&dir), Options { weights: Weights::Link { hash: false }, ..own }));
    }
    must_hold("linked", &jobs)?;
    Ok(())
}
