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
use hf2onnx::session::{self, Decoder};
use hf2onnx::tokenizer::Tokenizer;
use hf2onnx::verify::{Quality, WINDOW, compare_builds, text_windows};
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

/// What models lose against a reference on `eval.txt`.
fn losses(reference: &Path, models: &[&Path]) -> TestResult<Vec<Quality>> {
    let open = |model: &Path| Decoder::open(model, &session::Options::default());
    let windows = text_windows(&Tokenizer::open(reference)?, &kjv_llama().join("eval.txt"), WINDOW)?;
    let mut models: Vec<Decoder> = models.iter().map(|model| open(model)).collect::<Result<_, _>>()?;
    let losses = compare_builds(&mut open(reference)?, &mut models, &windows)?;
    Ok(losses.into_iter().map(|loss| loss.quality).collect())
}

fn data(model: &Path) -> TestResult<Vec<u8>> {
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(model.join("hf2onnx.json"))?)?;
    let onnx = manifest.get("onnx").and_then(serde_json::Value::as_str).ok_or("no graph")?;
    Ok(fs::read(model.join(format!("{onnx}_data")))?)
}

#[test]
fn a_calibrated_model_is_closer_to_the_float_build_at_the_same_size() -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    let float = place.path().join("reference");
    build_with(&options(&kjv_llama(), "ort-cpu")?, &float)?;
    // Eight-bit activations are the same noise in both, and larger than what is measured.
    let changes = Changes { accuracy_level: Some(1), ..Changes::default() };
    for (scheme, most) in [("q4", 0.85), ("int4", 0.85), ("q4-mixed", 0.7)] {
        let options = quantised(scheme, &changes)?;
        let (plain, better) = (place.path().join(scheme), place.path().join(format!("{scheme}-calibrated")));
        build_with(&options, &plain)?;
        calibrated(&options, &better, usize::MAX)?;
        assert_eq!(data(&plain)?.len(), data(&better)?.len());
        let found = losses(&float, &[&plain, &better])?;
        let [before, after] = found.as_slice() else { return Err("two models, two losses".into()) };
        eprintln!("{scheme}: {before:?}\n -> {after:?}");
        let (kl, lower) = (before.kl_mean, after.kl_mean);
        assert!(after.top1 > before.top1, "{scheme}: {} calibrated, {} without", after.top1, before.top1);
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
fn the_report_compares_with_and_without() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let (repo, text, page) = (kjv_llama(), text(), place.path().join("report.html"));
    let (repo, text, html) = (repo.to_string_lossy(), text.to_string_lossy(), page.to_string_lossy());
    let few = ["--calibrate", &text, "--calibrate-tokens", "2000", "--tokens", "1200", "--repeat", "0"];
    let ran = hf2onnx(["--json", "quant-report", &repo, "--schemes", "int4", "--html", &html].into_iter().chain(few))?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let json: serde_json::Value = serde_json::from_slice(&ran.stdout)?;
    let schemes = json["schemes"].as_array().ok_or("no schemes")?;
    let [plain, better] = schemes.as_slice() else { return Err(format!("{json}").into()) };
    assert_eq!([&plain["name"], &better["name"]], ["int4", "int4:calibrated"]);
    assert_eq!(plain["bytes"].as_u64().ok_or("no size")?, better["bytes"].as_u64().ok_or("no size")?);
    let kl = |scheme: &serde_json::Value| scheme["kl_mean"].as_f64().ok_or("no divergence");
    let (before, after) = (kl(plain)?, kl(better)?);
    eprintln!("{before} -> {after}");
    assert!(after < 0.95 * before, "{after} calibrated, {before} without");
    assert!(plain.get("calibration").is_none());
    let record = &better["calibration"];
    assert_eq!([&record["text"], &record["method"]], ["calibration.txt", "gptq"]);
    assert_eq!(record["tokens"], 2000);
    let sentence = "calibrated (GPTQ) on 2000 tokens of calibration.txt: int4:calibrated";
    assert!(fs::read_to_string(&page)?.contains(sentence));

    // Where schemes say which of them are calibrated, no others are.
    let ran = hf2onnx(["quant-report", &repo, "--schemes", "int8,int4:f16:calibrated"].into_iter().chain(few))?;
    let table = String::from_utf8_lossy(&ran.stdout);
    let rows: Vec<&str> = table.lines().filter_map(|line| line.split_once("  ")).map(|(name, _)| name).collect();
    assert_eq!(rows, ["scheme", "float32", "int8", "int4:f16:calibrated"], "{table}");
    assert!(table.contains("of calibration.txt: int4:f16:calibrated\n"), "{table}");
    Ok(())
}

#[test]
fn the_report_says_what_calibrated_needs() -> TestResult {
    let (repo, text) = (kjv_llama(), text());
    let (repo, text) = (repo.to_string_lossy(), text.to_string_lossy());
    for (arguments, reason) in [
        (vec!["--schemes", "q4,int4:f16:calibrated"], "`calibrated` in `int4:f16:calibrated`, without --calibrate"),
        (vec!["--schemes", "float:calibrated", "--calibrate", &text], "`float:calibrated`, which rounds nothing"),
        (vec!["--schemes", "float", "--calibrate", &text], "beside float, which round nothing"),
        (vec!["--calibrate", &text, "--with", "q4:calibrated=x"], "`q4:calibrated` twice"),
        (vec!["--calibrate", &text, "--calibrate-tokens", "100"], "100 tokens of"),
    ] {
        let ran = hf2onnx(["quant-report", &repo].into_iter().chain(arguments.clone()))?;
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(!ran.status.success() && said.contains("usage-invalid"), "{arguments:?}: {said}");
        assert!(said.contains(reason) && !said.contains("building"), "{arguments:?}: {said}");
    }
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
    let stderr = String::from_utf8_lossy(&alone.stderr);
    assert!(!alone.status.success() && stderr.contains("neither --quant nor --kv-cache int8"), "{stderr}");
    Ok(())
}
