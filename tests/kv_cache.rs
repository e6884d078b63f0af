//! Caches of keys and values in int8: what they cost, that every way of running them agrees, and where they are refused.
#![allow(clippy::print_stderr)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::models::{build_with, options, runtime};
use common::{Case, TestResult, hf2onnx, kjv_llama, repository, scratch};
use hf2onnx::calibrate::{Calibration, Text};
use hf2onnx::compile::{KvCache, Options, compile};
use hf2onnx::element::ElementType;
use hf2onnx::error::Code;
use hf2onnx::golden::Golden;
use hf2onnx::session::{self, Decoder};
use hf2onnx::tokenizer::Tokenizer;
use hf2onnx::verify::{self, WINDOW, against_golden, compare_builds, text_windows};

/// What the trained model itself wrote: nothing of what it is measured on.
fn text() -> PathBuf {
    repository().join("tests").join("calibration.txt")
}

/// Builds with an int8 cache whose scales were measured on the text.
fn with_int8_cache(options: &Options, output: &Path) -> TestResult {
    let text = Text { path: &text(), tokens: 4096 };
    let calibration = Calibration::new(options, &text, &output.with_extension("float"))?;
    let cache = KvCache::Int8(Some(calibration.cache_scales()?));
    build_with(&Options { cache, ..options.clone() }, output)?;
    Ok(())
}

#[test]
fn a_trained_model_loses_next_to_nothing() -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    let (float, int8) = (place.path().join("reference"), place.path().join("int8"));
    let options = options(&kjv_llama(), "ort-cpu")?;
    build_with(&options, &float)?;
    with_int8_cache(&options, &int8)?;
    let open = |model: &Path| Decoder::open(model, &session::Options { threads: 1, ..session::Options::default() });
    let windows = text_windows(&Tokenizer::open(&float)?, &kjv_llama().join("eval.txt"), WINDOW)?;
    let mut models = vec![open(&int8)?];
    assert!(models.iter().flat_map(Decoder::slots).all(|slot| slot.element == ElementType::I8));
    let loss = compare_builds(&mut open(&float)?, &mut models, &windows)?.pop().ok_or("no loss")?.quality;
    eprintln!("int8 cache: {loss:?}");
    // Another text than the scales are of: were it cut off, this is where it would show.
    assert!(loss.kl_mean > 0.0 && loss.kl_mean < 2e-4, "{}", loss.kl_mean);
    assert!(loss.top1 > 0.99 && loss.perplexity.is_some_and(|p| p.change.abs() < 1e-3), "{loss:?}");
    let report = against_golden(&int8, &Golden::read(&kjv_llama())?, &verify::Options::default())?;
    assert!(report.holds(), "{report}");
    let cost = report.cost.ok_or("a quantised cache has a cost")?;
    assert_eq!((cost.scheme.as_str(), cost.bar), ("an int8 cache", verify::Bar::of_int8_cache()));
    same_in_place(&mut open(&int8)?)
}

/// Past and present in one buffer that grows, and apart: the same logits to the last bit.
fn same_in_place(decoder: &mut Decoder) -> TestResult {
    assert!(decoder.shares_buffers());
    let mut rows = [decoder.row(4, true)?, decoder.row(4, false)?];
    for piece in [&[5_i64, 9, 400, 1000, 77][..], &[12], &[3, 1500, 8], &[42]] {
        let logits: Vec<Vec<f32>> = rows.iter_mut().map(|row| decoder.extend(row, piece)).collect::<Result<_, _>>()?;
        assert_eq!(logits.first(), logits.last(), "after {piece:?}");
    }
    Ok(())
}

/// Random weights attend sharply and lose most. Windows, experts, sinks, falling scores, and a head that is no power of two.
#[test]
fn cases_of_random_weights_hold_in_every_scenario() -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    for name in ["llama", "mistral", "mixtral", "llama-headdim", "gptj", "gpt_oss", "gemma2", "smollm3", "falcon-alibi"]
    {
        // The tokenizer that some cases have fits them all: they share a vocabulary of 320.
        let repo = place.path().join(format!("{name}-repo"));
        let case = Case::named(name)?;
        copy(&case.repo()?, &repo)?;
        copy_tokenizer(&repo)?;
        let output = place.path().join(name);
        with_int8_cache(&options(&repo, "ort-cpu")?, &output)?;
        let report = against_golden(&output, &Golden::read(&case.golden())?, &verify::Options::default())?;
        let errors: Vec<String> = report
            .scenarios
            .iter()
            .filter_map(|o| Some(format!("{} {:.1e}", o.scenario, o.comparison?.error)))
            .collect();
        eprintln!("{name}: {}", errors.join(", "));
        assert!(report.holds(), "{name}: {report}");
    }
    Ok(())
}

fn copy(from: &Path, into: &Path) -> TestResult {
    fs::create_dir_all(into)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), into.join(entry.file_name()))?;
    }
    Ok(())
}

fn copy_tokenizer(into: &Path) -> TestResult {
    let from = Case::named("llama")?.dir;
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        fs::copy(from.join(name), into.join(name))?;
    }
    Ok(())
}

/// Refused before anything is measured, with the reason.
#[test]
fn what_has_no_such_cache_is_refused_by_name() -> TestResult {
    let int8 = KvCache::Int8(None);
    for (case, target, words) in [
        ("llama", "standard", "target standard"),
        ("llama", "primitive", "target primitive"),
        ("llama", "ort-cuda", "target ort-cuda"),
        ("deepseek_v3", "ort-cpu", "key heads of 24 and value heads of 12 differ"),
        ("gemma3n_text", "ort-cpu", "reads another's"),
    ] {
        let options = Options { cache: int8.clone(), ..Case::named(case)?.options(target)? };
        let error = compile(&options).map(|_| ()).err().ok_or(format!("{case} on {target} compiled"))?;
        assert_eq!(error.code, Code::UsageInvalid);
        let text = error.to_string();
        assert!(text.contains("--kv-cache int8") && text.contains(words), "{case} on {target}: {text}");
    }
    Ok(())
}

#[test]
fn the_command_line_measures_and_records() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let (model, repo, text) = (place.path().join("model"), kjv_llama(), text());
    let places = || [repo.as_os_str(), "--output".as_ref(), model.as_os_str(), "--kv-cache".as_ref(), "int8".as_ref()];
    let refused = hf2onnx(std::iter::once("build".as_ref()).chain(places()))?;
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && stderr.contains("--calibrate FILE"), "{stderr}");
    let foretold = hf2onnx(["build", "--dry-run"].map(std::ffi::OsStr::new).into_iter().chain(places()))?;
    assert!(foretold.status.success() && !model.exists());
    let arguments = ["build", "--calibrate-tokens", "600", "--verify", "--calibrate"].map(std::ffi::OsStr::new);
    let ran = hf2onnx(arguments.into_iter().chain([text.as_os_str()]).chain(places()))?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(model.join("hf2onnx.json"))?)?;
    assert_eq!(manifest["kv_cache"]["type"], "int8");
    assert_eq!(manifest["kv_cache"]["calibration"]["tokens"], 600);
    assert_eq!(manifest["verified"]["holds"], true);
    Ok(())
}
