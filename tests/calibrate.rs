//! Calibration: a text that the model reads while it is quantised brings it closer to the float build on another one.
#![allow(clippy::print_stderr)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::models::{build_with, options, runtime};
use common::{TestResult, hf2onnx, kjv_llama, repository, scratch};
use hf2onnx::calibrate::{Calibration, Text};
use hf2onnx::compile::{self, Options, compile};
use hf2onnx::error::Code;
use hf2onnx::recipe::{Changes, Recipe};
use hf2onnx::session::{self, Decoder, IntMatrix};
use hf2onnx::tokenizer::Tokenizer;
use hf2onnx::write::Force;

/// What the model itself wrote, at a temperature of 1: nothing of what it is measured on.
fn text() -> PathBuf {
    repository().join("tests").join("calibration.txt")
}

fn quantised(scheme: &str, changes: &Changes) -> TestResult<Options> {
    Ok(Options { recipe: Some(Recipe::new(scheme, changes)?), ..options(&kjv_llama(), "ort-cpu")? })
}

/// Builds a model that is calibrated with some memory for second moments.
fn calibrated(options: &Options, output: &Path, budget: usize) -> TestResult {
    let compiled = compile(options)?;
    let text = Text { path: &text(), tokens: 16 << 10 };
    let float = output.with_extension("float");
    let mut calibration = Calibration::new(options, &text, &float)?.with_budget(budget);
    let record = calibration.record.clone();
    let known = Some((&mut calibration as _, record));
    compile::write_calibrated(&compiled, options, output, Force::No, known, |_| {})?.commit()?;
    drop(calibration);
    assert!(!float.exists(), "the float build is never put in its place");
    Ok(())
}

/// What a model makes of `eval.txt`, in windows: log-probabilities, and the tokens that follow.
struct Reading {
    positions: Vec<Vec<f64>>,
    targets: Vec<usize>,
}

impl Reading {
    fn of(model: &Path) -> TestResult<Self> {
        let mut decoder = Decoder::open(model, &session::Options::default())?;
        let ids = Tokenizer::open(model)?.encode(&fs::read_to_string(kjv_llama().join("eval.txt"))?, false)?;
        let mut reading = Self { positions: Vec::new(), targets: Vec::new() };
        for window in ids.windows(513).step_by(512) {
            let inputs: Vec<i64> = window[..512].iter().copied().map(i64::from).collect();
            let (mask, places) = (vec![1; inputs.len()], (0_i64..).take(inputs.len()).collect());
            let mut state = decoder.empty_state(1)?;
            let row = IntMatrix::from_row;
            let step = decoder.run(&row(inputs), &row(mask), &row(places), &mut state)?;
            let width = step.logits.shape[2];
            reading.positions.extend(step.logits.data.chunks(width).map(log_probabilities));
            reading.targets.extend(window[1..].iter().map(|id| *id as usize));
        }
        Ok(reading)
    }

    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    fn perplexity(&self) -> f64 {
        let losses = self.positions.iter().zip(&self.targets).map(|(logs, target)| -logs[*target]);
        (losses.sum::<f64>() / self.targets.len() as f64).exp()
    }

    /// Mean KL(reference || self), and the share of positions where both have the same likeliest token.
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    fn against(&self, reference: &Self) -> (f64, f64) {
        let (mut kl, mut same) = (0.0, 0.0);
        for (p, q) in reference.positions.iter().zip(&self.positions) {
            kl += p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            same += f64::from(u8::from(likeliest(p) == likeliest(q)));
        }
        let count = reference.positions.len() as f64;
        (kl / count, same / count)
    }
}

fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - largest) - sum.ln()).collect()
}

fn likeliest(values: &[f64]) -> Option<usize> {
    (0..values.len()).max_by(|a, b| values[*a].total_cmp(&values[*b]))
}

fn data(model: &Path) -> TestResult<Vec<u8>> {
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(model.join("hf2onnx.json"))?)?;
    let onnx = manifest["onnx"].as_str().ok_or("no graph")?;
    Ok(fs::read(model.join(format!("{onnx}_data")))?)
}

#[test]
fn a_calibrated_model_is_closer_to_the_float_build_at_the_same_size() -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    let float = place.path().join("reference");
    build_with(&options(&kjv_llama(), "ort-cpu")?, &float)?;
    let reference = Reading::of(&float)?;
    eprintln!("float: perplexity {:.3}", reference.perplexity());
    // Eight-bit activations are the same noise in both, and larger than what is measured.
    let changes = Changes { accuracy_level: Some(1), ..Changes::default() };
    for (scheme, most) in [("q4", 0.85), ("int4", 0.85), ("q4-mixed", 0.85)] {
        let options = quantised(scheme, &changes)?;
        let (plain, better) = (place.path().join(scheme), place.path().join(format!("{scheme}-calibrated")));
        build_with(&options, &plain)?;
        calibrated(&options, &better, usize::MAX)?;
        assert_eq!(data(&plain)?.len(), data(&better)?.len());
        let (before, after) = (Reading::of(&plain)?, Reading::of(&better)?);
        let ((kl, top), (lower, higher)) = (before.against(&reference), after.against(&reference));
        eprintln!("{scheme}: KL {kl:.5} -> {lower:.5}, same token {top:.4} -> {higher:.4}");
        eprintln!("{scheme}: perplexity {:.3} -> {:.3}", before.perplexity(), after.perplexity());
        assert!(lower < most * kl, "{scheme}: {lower} calibrated, {kl} without");
    }
    Ok(())
}

/// Groups of layers, down to one matrix's inputs at a time, see the same activations; and a build is reproducible.
#[test]
fn a_small_memory_gives_the_same_model() -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    let options = quantised("q4", &Changes::default())?;
    let [all, few, again] = ["all", "few", "again"].map(|name| place.path().join(name));
    calibrated(&options, &all, usize::MAX)?;
    calibrated(&options, &few, 400 << 10)?;
    calibrated(&options, &again, 400 << 10)?;
    assert_eq!(data(&few)?, data(&again)?, "two builds");
    assert_eq!(data(&all)?, data(&few)?, "in groups");
    Ok(())
}

#[test]
fn the_command_line_records_the_text() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let (model, repo, text) = (place.path().join("model"), kjv_llama(), text());
    let arguments = ["build", "--quant", "q4", "--calibrate-tokens", "600", "--calibrate"].map(std::ffi::OsStr::new);
    let places = [text.as_os_str(), repo.as_os_str(), "--output".as_ref(), model.as_os_str()];
    let ran = hf2onnx(arguments.into_iter().chain(places))?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(model.join("hf2onnx.json"))?)?;
    let record = &manifest["quantization"]["calibration"];
    assert_eq!(record["method"], "gptq");
    assert_eq!(record["tokens"], 600);
    assert_eq!(record["window"], 512);
    assert_eq!(record["sha256"].as_str().map(str::len), Some(64));
    let left: Vec<_> = fs::read_dir(place.path())?.collect::<Result<_, _>>()?;
    assert_eq!(left.len(), 1, "nothing but the model is left: {left:?}");
    Ok(())
}

#[test]
fn what_can_not_be_calibrated_on() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let short = place.path().join("short.txt");
    fs::write(&short, "In the beginning")?;
    let options = quantised("q4", &Changes::default())?;
    let refused = |options: &Options, path: &Path| {
        Calibration::new(options, &Text { path, tokens: 1000 }, &place.path().join("float")).map(|_| ()).err()
    };
    let error = refused(&options, &short).ok_or("a short text was taken")?;
    assert_eq!(error.code, Code::UsageInvalid);
    assert!(error.to_string().contains("short.txt"), "{error}");
    let error = refused(&options, &place.path().join("none.txt")).ok_or("a missing text was taken")?;
    assert_eq!(error.code, Code::Io);
    let bare = place.path().join("bare");
    fs::create_dir(&bare)?;
    for name in ["config.json", "model.safetensors"] {
        fs::copy(kjv_llama().join(name), bare.join(name))?;
    }
    let error = refused(&Options { repository: bare, ..options }, &text()).ok_or("no tokenizer was needed")?;
    assert_eq!(error.code, Code::TokenizerInvalid);
    let alone = hf2onnx(["build", "x", "--output", "y", "--calibrate", "z"])?;
    assert_eq!(alone.status.code(), Some(2));
    Ok(())
}
