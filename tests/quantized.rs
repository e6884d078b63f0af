//! Quantised checkpoints from the repository to the built model: what the formats' own libraries make of the weights,
//! transformers computed with, and so does the build.
// Cases are damaged on purpose; one that is not what it was fails its test.
#![allow(clippy::print_stderr, clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use common::models::{build_with, options, runtime};
use common::quantized::{Repository, Tensor};
use common::{TestResult, hf2onnx, repository, scratch};
use hf2onnx::compile::{Compiled, Options, Weights};
use hf2onnx::element::{ElementType, StoredType};
use hf2onnx::encoding::{affine_rows, order};
use hf2onnx::golden::Golden;
use hf2onnx::lower::Part;
use hf2onnx::recipe::{Changes, Recipe};
use hf2onnx::verify::{self, Outcome, Verdict, against_golden};
use rayon::prelude::*;
use serde_json::{Value, json};

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
fn verified(options: &Options, golden: &Path, tolerance: f64) -> TestResult<(Value, Vec<String>)> {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("model");
    build_with(options, &output)?;
    let settings = verify::Options { threads: 1, tolerance: Some(tolerance), ..verify::Options::default() };
    let report = against_golden(&output, &Golden::read(golden)?, &settings)?;
    // Integers are judged by a bar of their own, which says little here.
    let far = |o: &Outcome| o.greedy.is_none() && o.comparison.is_none_or(|c| c.max > tolerance);
    let wrong = report
        .scenarios
        .iter()
        .filter(|o| far(o) || !matches!(o.verdict, Verdict::Holds | Verdict::NearTie | Verdict::NotCompared));
    let wrong = wrong.map(|o| {
        format!("{}: {:?} {}", o.scenario, o.comparison.map(|c| c.max), o.note.as_deref().unwrap_or_default())
    });
    Ok((serde_json::from_slice(&fs::read(output.join("hf2onnx.json"))?)?, wrong.collect()))
}

/// A repository to build, and the largest difference of a logit from the reference, relative to the largest one.
struct Job {
    name: String,
    options: Options,
    tolerance: f64,
}

impl Job {
    fn new(dir: &Path, target: &str, quant: &str, level: i64) -> TestResult<Self> {
        let recipe = Recipe::new(quant, &Changes { accuracy_level: Some(level), ..Changes::default() })?;
        let options = Options { recipe: Some(recipe), ..options(dir, target)? };
        Ok(Self { name: name(dir), options, tolerance: 1e-4 })
    }
}

fn must_hold(what: &str, jobs: &[Job]) -> TestResult<Vec<Value>> {
    runtime()?;
    let start = Instant::now();
    let run = |job: &Job| {
        let golden = job.options.repository.join("golden.safetensors");
        let (record, wrong) =
            verified(&job.options, &golden, job.tolerance).unwrap_or_else(|e| (Value::Null, vec![e.to_string()]));
        (record, wrong.into_iter().map(|line| format!("{}: {line}", job.name)).collect::<Vec<_>>())
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
    let jobs =
        repositories()?.iter().map(|dir| Job::new(dir, "ort-cpu", "float", 1)).collect::<TestResult<Vec<_>>>()?;
    for record in must_hold("decoded", &jobs)? {
        let keys = record["config_keys"]["used"].as_array().unwrap();
        assert!(keys.iter().any(|key| key.as_str().unwrap().contains("quant")), "{keys:?}");
        assert_eq!(record["quantization"]["matrices"], json!({}));
        assert!(record["onnx"] == "onnx/model.onnx" && record["quantization"]["checkpoint"]["exact"].is_null());
    }
    Ok(())
}

/// Quantised weights are no bytes that a graph could take from the checkpoint's files: they are written, the others
/// linked.
#[test]
fn linked_beside_decoded() -> TestResult {
    let mut jobs = Vec::new();
    for dir in repositories()? {
        let mut job = Job::new(&dir, "primitive", "float", 1)?;
        job.options.weights = Weights::Link { hash: false };
        jobs.push(job);
    }
    must_hold("linked", &jobs)?;
    Ok(())
}

/// The operators compute with the same integers and scales, and with the product in float32, which the formats' libraries
/// round to the type of the model: that is all that is between them, half a unit of float16's or bfloat16's last place.
#[test]
fn repacked_as_it_is() -> TestResult {
    let mut jobs = Vec::new();
    for dir in repositories()? {
        for target in ["ort-cpu", "standard"] {
            let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
            let tolerance = if config["dtype"] == "bfloat16" { 8e-3 } else { 1e-3 };
            jobs.push(Job { tolerance, ..Job::new(&dir, target, "stored", 1)? });
        }
    }
    let mut said = String::new();
    for (job, record) in jobs.iter().zip(must_hold("repacked", &jobs)?) {
        let (quantization, target) = (&record["quantization"], &record["target"]);
        let from = &quantization["checkpoint"];
        let matrices = quantization["matrices"].as_object().unwrap();
        let kept: Vec<String> = matrices.iter().map(|(scheme, of)| format!("{} {scheme}", of["matrices"])).collect();
        let reasons: BTreeSet<&str> = from["decoded"].as_object().unwrap().values().filter_map(Value::as_str).collect();
        let reordered = from["reordered"].as_array().map_or(0, Vec::len);
        let kept = if reordered > 0 { format!("{kept:?}, {reordered} reordered") } else { format!("{kept:?}") };
        writeln!(said, "{} for {target}, exact {}: {kept}, else {reasons:?}", job.name, from["exact"])?;
    }
    insta::assert_snapshot!(said);
    Ok(())
}

/// One integer of a packed row.
fn integer(packed: &[u8], index: usize, bits: usize) -> u8 {
    let shift = index * bits % 8;
    packed[index * bits / 8] >> shift & (u8::MAX >> (8 - bits))
}

/// Compares what lies in a built directory with what an independent reader of the checkpoint finds: how many integers.
fn compare_integers(case: &Repository, compiled: &Compiled, output: &Path) -> TestResult<usize> {
    let catalogue = case.catalogue()?;
    let onnx = compiled.quantization.as_ref().map_or("", |quantization| quantization.suffix);
    let data = fs::read(output.join("onnx").join(format!("model{onnx}.onnx_data")))?;
    let mut compared = 0;
    for (initializer, extent) in compiled.plan.initializers.iter().zip(&compiled.layout.extents) {
        let Some((scheme, part)) = initializer.quantized else { continue };
        // Joined matrices lie one behind the other.
        let sources = initializer.weight.sources();
        let weight = catalogue.get(sources[0]).ok_or("no such weight")?;
        let mut made = affine_rows(weight, case, 0..weight.rows(), order(weight, case)?.as_deref())?;
        for source in &sources[1..] {
            let weight = catalogue.get(source).ok_or("no such weight")?;
            let next = affine_rows(weight, case, 0..weight.rows(), order(weight, case)?.as_deref())?;
            made.codes.extend(next.codes);
            made.scales.extend(next.scales);
            made.zeros.extend(next.zeros);
        }
        let at = usize::try_from(extent.offset)?;
        let bytes = &data[at..at + usize::try_from(extent.length)?];
        let floats = |bytes: &[u8]| {
            let tensor = Tensor { dtype: stored(initializer.element), shape: Vec::new(), bytes: bytes.to_vec() };
            tensor.floats()
        };
        let (columns, bits) = (weight.columns(), usize::from(scheme.bits()));
        match part {
            Part::Data | Part::SignedData => {
                for (row, codes) in bytes.chunks(scheme.row_bytes(columns)).zip(made.codes.chunks(columns)) {
                    assert!(
                        codes.iter().enumerate().all(|(k, code)| integer(row, k, bits) == *code),
                        "{}",
                        weight.name
                    );
                }
                compared += made.codes.len();
            }
            Part::SignedZeroPoints => return Err("signed zero points on a target that reads unsigned ones".into()),
            Part::Scales => assert_eq!(floats(bytes), made.scales, "{}", weight.name),
            Part::ZeroPoints if scheme.has_float_zeros() => assert_eq!(floats(bytes), made.zeros, "{}", weight.name),
            Part::ZeroPoints => {
                let rows = bytes.chunks(scheme.row_zero_bytes(columns)).zip(made.zeros.chunks(made.blocks()));
                for (row, zeros) in rows {
                    let same = |(b, zero): (usize, &f32)| f32::from(integer(row, b, bits)).to_bits() == zero.to_bits();
                    assert!(zeros.iter().enumerate().all(same), "{}", weight.name);
                }
            }
        }
    }
    Ok(compared)
}

fn stored(element: ElementType) -> StoredType {
    match element {
        ElementType::F16 => StoredType::F16,
        ElementType::BF16 => StoredType::BF16,
        _ => StoredType::F32,
    }
}

#[test]
fn integers_and_scales_are_the_checkpoints() -> TestResult {
    let mut compared = 0;
    for dir in repositories()? {
        let place = tempfile::tempdir_in(scratch())?;
        let output = place.path().join("model");
        let compiled = build_with(&options(&dir, "ort-cpu")?, &output)?;
        compared += compare_integers(&Repository::open(&name(&dir)), &compiled, &output)?;
    }
    assert!(compared > 400_000, "{compared} integers");
    Ok(())
}

const Q: &str = "model.layers.0.self_attn.q_proj";

/// A change to a case, and the code and words of the error that it has to cause.
type Damage = (&'static str, fn(&mut Repository), &'static str, &'static str);

const DAMAGES: [Damage; 8] = [
    ("gptq", |c| drop(c.tensors.remove(&format!("{Q}.scales"))), "tensor-missing", "q_proj.scales"),
    ("bnb-nf4", |c| drop(c.tensors.remove(&format!("{Q}.weight.absmax"))), "tensor-missing", "absmax"),
    ("awq", |c| drop(c.settings().insert("group_size".to_owned(), json!(64))), "tensor-shape", "scales"),
    ("gptq", |c| drop(c.settings().insert("bits".to_owned(), json!(5))), "quantization-unsupported", "bits"),
    (
        "gptq",
        |c| drop(c.settings().insert("quant_method".to_owned(), json!("aqlm"))),
        "quantization-unsupported",
        "AQLM",
    ),
    ("gptq", |c| drop(c.settings().insert("rotation".to_owned(), json!(3))), "config-unused-key", "rotation"),
    (
        "gptq-actorder",
        |c| c.tensors.get_mut(&format!("{Q}.g_idx")).unwrap().bytes[..4].copy_from_slice(&99i32.to_le_bytes()),
        "weights-corrupt",
        "g_idx",
    ),
    // The shapes of the architecture, and not those that the checkpoint says.
    (
        "quanto",
        |c| drop(c.files.get_mut("config.json").unwrap().insert("hidden_size".to_owned(), json!(128))),
        "tensor-shape",
        "[320, 32]",
    ),
];

#[test]
fn damage_is_an_error_and_leaves_nothing() -> TestResult {
    for (name, damage, code, word) in DAMAGES {
        let place = tempfile::tempdir_in(scratch())?;
        let repo = place.path().join("repo");
        fs::create_dir(&repo)?;
        let mut case = Repository::open(name);
        damage(&mut case);
        case.write(&repo);
        let output = place.path().join("out");
        let ran = hf2onnx(["build".as_ref(), repo.as_os_str(), "--output".as_ref(), output.as_os_str()])?;
        let said = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(ran.status.code(), Some(1), "{name}: {said}");
        assert!(said.contains(&format!("error[{code}]: ")) && said.contains(word), "{name}, {code}, {word}: {said}");
        assert_eq!(fs::read_dir(place.path())?.count(), 1, "{name}: left something behind");
    }
    Ok(())
}

#[test]
fn inspection_says_how_weights_are_stored() -> TestResult {
    let dir = repository().join("golden").join("quantized").join("modelopt-fp8");
    let ran = hf2onnx(["inspect".as_ref(), dir.as_os_str()])?;
    let said = String::from_utf8_lossy(&ran.stdout);
    for words in ["BF16, ", "fp8", "input_scale", "quantization_config.quant_algo", "decoded"] {
        assert!(said.to_lowercase().contains(&words.to_lowercase()), "no {words} in {said}");
    }
    let ran = hf2onnx([
        "build".as_ref(),
        dir.as_os_str(),
        "--quant".as_ref(),
        "stored".as_ref(),
        "--dry-run".as_ref(),
        "--output".as_ref(),
        scratch().join("none").as_os_str(),
    ])?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let plain = repository().join("golden").join("kjv-llama");
    let ran = hf2onnx(["inspect".as_ref(), plain.as_os_str(), "--accuracy-level".as_ref(), "1".as_ref()])?;
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.code() == Some(1) && said.contains("not quantised"), "{said}");
    Ok(())
}
