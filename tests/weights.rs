//! Where a graph finds its weights: linked files, split files, and sources that change meanwhile.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::models::{build_with, options, runtime};
use common::{Case, TestResult, hf2onnx, scratch};
use hf2onnx::compile::{self, Options, Weights, compile};
use hf2onnx::element::ElementType;
use hf2onnx::error::Code;
use hf2onnx::golden::Golden;
use hf2onnx::verify::{self, against_golden};
use hf2onnx::write::Force;
use serde_json::Value;

const LINK: Weights = Weights::Link { hash: false };

fn with(case: &str, weights: Weights) -> TestResult<Options> {
    Ok(Options { weights, ..Case::named(case)?.options("ort-cpu")? })
}

fn json(path: &Path) -> TestResult<Value> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn names(dir: &Path) -> TestResult<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Must hold against the case's golden.
fn verified(case: &str, output: &Path) -> TestResult {
    runtime()?;
    let settings = verify::Options { threads: 1, ..verify::Options::default() };
    let report = against_golden(output, &Golden::read(&Case::named(case)?.golden())?, &settings)?;
    if report.holds() { Ok(()) } else { Err(report.to_string().into()) }
}

#[test]
fn linked_files_are_the_checkpoint_s_own() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    for (case, written) in [("llama-sharded", false), ("mixtral", false), ("gemma2", true)] {
        let output = place.path().join(case);
        let options = with(case, LINK)?;
        let compiled = build_with(&options, &output)?;
        // Only gemma's norms need arithmetic: one is added to each.
        assert_eq!(output.join("onnx/model.onnx_data").exists(), written, "{case}");
        assert_eq!(compiled.layout.written_bytes() > 0, written, "{case}");
        for file in compiled.repository.checkpoint.files() {
            let link = output.join("onnx").join(&file.name);
            assert_eq!(fs::metadata(&link)?.len(), file.size);
            #[cfg(unix)]
            {
                use std::os::unix::fs::MetadataExt as _;
                assert_eq!(fs::metadata(&link)?.ino(), fs::metadata(&file.path)?.ino(), "{case}: {}", file.name);
            }
        }
        let manifest = json(&output.join("hf2onnx.json"))?;
        assert_eq!(manifest["weights"], "link");
        let shard = &manifest["sources"][1];
        assert!(shard["size"].as_u64() > Some(0) && shard["sha256"].is_null(), "{shard}");
        let hashed = place.path().join(format!("{case}-hashed"));
        build_with(&Options { weights: Weights::Link { hash: true }, ..options }, &hashed)?;
        assert!(json(&hashed.join("hf2onnx.json"))?["sources"][1]["sha256"].is_string());
    }
    Ok(())
}

/// transformers.js asks for `model.onnx_data`, and for as many files as the configuration says: none of a linked model.
#[test]
fn consumers_are_told_of_written_files_alone() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("model");
    build_with(&with("llama", LINK)?, &output)?;
    let config = json(&output.join("config.json"))?;
    assert!(config["transformers.js_config"]["use_external_data_format"].is_null(), "{config}");
    Ok(())
}

#[test]
fn a_cache_snapshot_of_links_is_linked() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let cache = place.path().join("models--org--name");
    let (blobs, snapshot) = (cache.join("blobs"), cache.join("snapshots").join("0123456789abcdef"));
    fs::create_dir_all(&blobs)?;
    fs::create_dir_all(&snapshot)?;
    let repo = Case::named("llama")?.repo()?;
    for name in names(&repo)? {
        fs::copy(repo.join(&name), blobs.join(format!("hash-of-{name}")))?;
        let target = Path::new("../../blobs").join(format!("hash-of-{name}"));
        #[cfg(unix)]
        std::os::unix::fs::symlink(target, snapshot.join(&name))?;
        #[cfg(windows)]
        if std::os::windows::fs::symlink_file(target, snapshot.join(&name)).is_err() {
            // Without the right to make symbolic links there are none in the cache either.
            return Ok(());
        }
    }
    let output = place.path().join("model");
    build_with(&Options { weights: LINK, ..options(&snapshot, "ort-cpu")? }, &output)?;
    assert_eq!(names(&output.join("onnx"))?, ["model.onnx", "model.safetensors"]);
    assert!(!fs::symlink_metadata(output.join("onnx/model.safetensors"))?.is_symlink());
    verified("llama", &output)
}

#[test]
fn weights_are_split_into_files() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("model");
    let limit = 100_000;
    let options = with("llama", Weights::Pack { shard_size: Some(limit) })?;
    let compiled = build_with(&options, &output)?;
    let count = compiled.layout.written.len();
    assert!(count > 2, "{:?}", compiled.layout.written);
    let mut wanted: Vec<String> = (1..count).map(|i| format!("model.onnx_data_{i}")).collect();
    wanted.extend(["model.onnx", "model.onnx_data"].map(str::to_owned));
    wanted.sort();
    assert_eq!(names(&output.join("onnx"))?, wanted);
    for name in wanted.iter().filter(|name| name.contains("data")) {
        assert!(fs::metadata(output.join("onnx").join(name))?.len() <= limit, "{name}");
    }
    let config = json(&output.join("config.json"))?;
    assert_eq!(config["transformers.js_config"]["use_external_data_format"]["model.onnx"], count);
    verified("llama", &output)?;

    let small = compile(&Options { weights: Weights::Pack { shard_size: Some(1000) }, ..options }).unwrap_err();
    assert_eq!(small.code, Code::UsageInvalid);
    assert!(small.subject.contains("--shard-size") && small.found.contains("lm_head.weight"), "{small}");
    Ok(())
}

#[test]
fn a_dry_run_foretells_what_a_build_writes() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("model");
    let repo = Case::named("mixtral")?.repo()?;
    let arguments = |more: &[&str]| -> Vec<PathBuf> {
        let mut all: Vec<PathBuf> =
            vec!["--json".into(), "build".into(), repo.clone(), "--output".into(), output.clone()];
        all.extend(more.iter().map(PathBuf::from));
        all
    };
    let ran = hf2onnx(arguments(&["--dry-run"]))?;
    let foretold: Value = serde_json::from_slice(&ran.stdout)?;
    assert!(!output.exists() && names(place.path())?.is_empty(), "nothing is written");
    assert!(foretold["free_bytes"].as_u64() > Some(0) && foretold["seconds"].is_number(), "{foretold}");
    assert!(hf2onnx(arguments(&[]))?.status.success());
    let size = |name: &str| fs::metadata(output.join("onnx").join(name)).map(|metadata| metadata.len());
    assert_eq!(foretold["cost"]["graph"], size("model.onnx")?);
    assert_eq!(foretold["cost"]["written"], size("model.onnx_data")?);
    assert_eq!(foretold["disk_bytes"], size("model.onnx")? + size("model.onnx_data")?);

    let words = hf2onnx(arguments(&["--force", "--timings"]))?;
    let words = String::from_utf8_lossy(&words.stderr).into_owned();
    for stage in ["read", "describe", "lower", "weights", "commit", "total"] {
        assert!(words.lines().any(|line| line.starts_with(stage) && line.ends_with(" s")), "{stage}: {words}");
    }
    Ok(())
}

/// The file is shortened when the first chunk has been read: an error, and no output.
#[test]
fn a_source_that_is_cut_short_meanwhile() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let (repo, output) = (place.path().join("repo"), place.path().join("model"));
    fs::create_dir(&repo)?;
    let source = Case::named("llama")?.repo()?;
    for name in names(&source)? {
        fs::copy(source.join(&name), repo.join(&name))?;
    }
    let options = options(&repo, "ort-cpu")?;
    let compiled = compile(&options)?;
    let weights = repo.join("model.safetensors");
    let cut = |_| fs::OpenOptions::new().write(true).open(&weights).and_then(|file| file.set_len(5000)).unwrap();
    let error = compile::write(&compiled, &options, &output, Force::No, cut).unwrap_err();
    assert_eq!(error.code, Code::WeightsCorrupt, "{error}");
    assert!(error.subject.contains("model.safetensors") && error.found.contains("changed"), "{error}");
    assert_eq!(names(place.path())?, ["repo"]);
    Ok(())
}

#[test]
fn what_does_not_go_together_is_refused() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let repo = Case::named("llama")?.repo()?;
    for (flags, word) in [
        (["--weights", "link", "--dtype", "f16"].as_slice(), "--dtype"),
        (&["--weights", "link", "--shard-size", "2GB"], "--shard-size"),
        (&["--hash-linked"], "--hash-linked"),
        (&["--shard-size", "many"], "no size"),
        (&["--shard-size=-1GB"], "no size"),
        (&["--shard-size", "0"], "no size"),
    ] {
        let mut arguments = vec!["build".into(), repo.clone(), "--output".into(), place.path().join("model")];
        arguments.extend(flags.iter().map(PathBuf::from));
        let ran = hf2onnx(arguments)?;
        let words = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(!ran.status.success() && words.contains(word), "{flags:?}: {words}");
    }
    Ok(())
}

/// A bfloat16 checkpoint is widened exactly, so it loses nothing by being packed as it is; and the output says what a
/// session pays for that.
#[test]
fn bfloat16_stays_what_it_is() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("model");
    // Stored in float16, so both narrow types differ from it.
    let options = Options { element: ElementType::BF16, ..with("llama-f16", Weights::Pack { shard_size: None })? };
    let compiled = build_with(&options, &output)?;
    assert_eq!(names(&output.join("onnx"))?, ["model_bf16.onnx", "model_bf16.onnx_data"]);
    assert!(compiled.cost(&options).widened > compiled.cost(&options).written);
    verified("llama-f16", &output)
}
