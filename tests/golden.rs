//! The promise: every case, on every target, computes what the reference computes, in every scenario.
#![allow(clippy::print_stderr)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use common::models::{TARGETS, build_with, options, runtime};
use common::{Case, TestResult, cases, kjv_llama, scratch};
use hf2onnx::build::Logits;
use hf2onnx::compile::{Options, Weights};
use hf2onnx::describe::Catalogue;
use hf2onnx::element::ElementType;
use hf2onnx::generate::{Settings, generate};
use hf2onnx::golden::Golden;
use hf2onnx::lower::Padding;
use hf2onnx::opset::Positions;
use hf2onnx::session::{self, Decoder};
use hf2onnx::tokenizer::Tokenizer;
use hf2onnx::verify::{self, Outcome, Report, Verdict, against_golden};
use rayon::prelude::*;

/// Scenarios without padding on the left: what `--padding right` promises.
const WITHOUT_LEFT: [&str; 5] = ["prefill", "batch-right", "decode", "chunks", "greedy"];

/// One model to build and to compare.
struct Job {
    name: String,
    options: Options,
    golden: PathBuf,
    /// Scenarios that must hold; all of them if empty.
    scenarios: &'static [&'static str],
    /// True where chance puts single positions far off: the median one is judged.
    typical: bool,
}

impl Job {
    fn new(case: &Case, target: &str) -> TestResult<Self> {
        Ok(Self {
            name: format!("{} on {target}", case.name),
            options: case.options(target)?,
            golden: case.golden(),
            scenarios: &[],
            typical: false,
        })
    }

    fn run(&self) -> TestResult<Vec<String>> {
        let place = tempfile::tempdir_in(scratch())?;
        let output = place.path().join("model");
        build_with(&self.options, &output)?;
        let golden = Golden::read(&self.golden)?;
        let settings = verify::Options { threads: 1, ..verify::Options::default() };
        let report = against_golden(&output, &golden, &settings)?;
        Ok(self.complaints(&report))
    }

    fn complaints(&self, report: &Report) -> Vec<String> {
        let promised = |o: &&Outcome| self.scenarios.is_empty() || self.scenarios.contains(&o.scenario.as_str());
        let mut lines = Vec::new();
        for outcome in report.scenarios.iter().filter(promised) {
            let bar = outcome.allowed.as_ref().and_then(|allowed| allowed.typical);
            let typical = outcome.comparison.zip(bar).is_some_and(|(found, bar)| found.typical <= bar);
            // A scenario that could not be compared proves nothing: that is a failure too.
            if !(self.typical && typical || matches!(outcome.verdict, Verdict::Holds | Verdict::NearTie)) {
                let by = outcome.comparison.map_or("not compared".to_owned(), |c| format!("off by {:.1e}", c.max));
                let tokens =
                    outcome.greedy.as_ref().map_or(String::new(), |g| format!(", {}/{} tokens", g.matched, g.of));
                let note = outcome.note.as_deref().unwrap_or_default();
                lines.push(format!("{}: {} {by}{tokens} {note}", self.name, outcome.scenario));
            }
        }
        let texts = report.perplexity.iter().filter(|p| p.verdict != Verdict::Holds);
        lines.extend(texts.map(|p| format!("{}: perplexity off by {:?}", self.name, p.difference)));
        if let (Some(divergence), false) = (&report.divergence, lines.is_empty()) {
            lines.push(format!("{}: {}", self.name, divergence.message));
        }
        lines
    }
}

/// Runs every job and reports all that is wrong at once, one line each.
fn must_hold(what: &str, jobs: &[Job]) -> TestResult {
    runtime()?;
    let start = Instant::now();
    let complaints: Vec<String> = jobs
        .par_iter()
        .flat_map_iter(|job| job.run().unwrap_or_else(|error| vec![format!("{}: {error}", job.name)]))
        .collect();
    eprintln!("{what}: {} models in {:.1} s", jobs.len(), start.elapsed().as_secs_f64());
    report(complaints);
    Ok(())
}

fn report(mut complaints: Vec<String>) {
    complaints.sort();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

fn jobs(names: &[&str]) -> TestResult<Vec<Job>> {
    let mut jobs = Vec::new();
    for name in names {
        for target in TARGETS {
            jobs.push(Job::new(&Case::named(name)?, target)?);
        }
    }
    Ok(jobs)
}

#[test]
fn every_case_on_every_target() -> TestResult {
    let cases = cases()?;
    let names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    must_hold("float32", &jobs(&names)?)
}

/// The target for the CUDA provider has other forms of attention and experts in float32, where it is to be verified;
/// onnxruntime computes them on the CPU as well.
#[test]
fn for_the_cuda_provider_in_float32() -> TestResult {
    let jobs: Result<Vec<Job>, _> = cases()?.iter().map(|case| Job::new(case, "ort-cuda")).collect();
    must_hold("ort-cuda in float32", &jobs?)
}

/// Cases of which single positions go another way in float16 on the CPU, where attention accumulates in float16 as no
/// GPU does: another expert for a token of the three mixtures, attention that is all but undecided for one of the other.
const CHANCE: [&str; 4] = ["deepseek_v32", "gpt_oss-a", "phi3-longrope", "phimoe-b"];

/// The graphs that are meant for a GPU, computed in float16 on the CPU, which has kernels or casts for all of it: held to
/// what transformers in float16 is off by.
#[test]
fn for_the_cuda_provider_in_float16() -> TestResult {
    let mut jobs = Vec::new();
    for case in cases()? {
        let typical = CHANCE.contains(&case.name.as_str());
        jobs.push(Job { typical, ..Job::new(&case, "ort-cuda")? });
    }
    for padding in ["llama", "gpt_oss"] {
        let mut job = Job::new(&Case::named(padding)?, "ort-cuda")?;
        job.name += " with --padding right";
        (job.options.padding, job.scenarios) = (Padding::Right, &WITHOUT_LEFT);
        jobs.push(job);
    }
    for name in ["llama", "qwen2", "mixtral"] {
        let mut job = Job::new(&Case::named(name)?, "ort-cuda")?;
        job.name += " with --logits last";
        job.options.logits = Logits::Last;
        jobs.push(job);
    }
    must_hold("ort-cuda in float16", &in_float16(jobs))
}

/// The same with queries and keys rotated outside of attention, by the positions that are given.
#[test]
fn for_the_cuda_provider_in_float16_with_position_ids() -> TestResult {
    let mut jobs = Vec::new();
    for case in cases()? {
        let typical = CHANCE.contains(&case.name.as_str());
        let mut job = Job { typical, ..Job::new(&case, "ort-cuda")? };
        job.name += " with --positions ids";
        job.options.positions = Positions::Ids;
        jobs.push(job);
    }
    must_hold("ort-cuda in float16 with --positions ids", &in_float16(jobs))
}

fn in_float16(mut jobs: Vec<Job>) -> Vec<Job> {
    for job in &mut jobs {
        job.name += " in float16";
        job.options.element = ElementType::F16;
    }
    jobs
}

/// Every case with its matrices in half precision, held to what rounding them does to transformers.
#[test]
fn float16() -> TestResult {
    must_hold("float16", &halved(ElementType::F16)?)
}

#[test]
fn bfloat16() -> TestResult {
    must_hold("bfloat16", &halved(ElementType::BF16)?)
}

fn halved(element: ElementType) -> TestResult<Vec<Job>> {
    let mut jobs = Vec::new();
    for case in cases()? {
        let mut options = case.options("ort-cpu")?;
        options.element = element;
        let name = format!("{} on ort-cpu in {element}", case.name);
        jobs.push(Job { name, options, golden: case.golden(), scenarios: &[], typical: false });
    }
    Ok(jobs)
}

/// Every case with its weights in the checkpoint's own files, on the target with the most operators of its own; a few
/// on the others. The checkpoint and the output have to lie on one file system for links.
#[test]
fn linked_weights() -> TestResult {
    let cases = cases()?;
    let mut jobs: Vec<Job> = cases.iter().map(|case| Job::new(case, "ort-cpu")).collect::<Result<_, _>>()?;
    for name in ["llama", "mixtral", "gpt2", "gpt_neox", "gpt_oss", "phi3", "gemma2", "deepseek_v3"] {
        for target in ["standard", "primitive"] {
            jobs.push(Job::new(&Case::named(name)?, target)?);
        }
    }
    for job in &mut jobs {
        job.name += " with --weights link";
        job.options.weights = Weights::Link { hash: false };
    }
    must_hold("--weights link", &jobs)
}

#[test]
fn only_right_padding() -> TestResult {
    let mut jobs = jobs(&["llama", "mixtral"])?;
    for job in &mut jobs {
        job.name += " with --padding right";
        job.options.padding = Padding::Right;
        job.scenarios = &WITHOUT_LEFT;
    }
    must_hold("--padding right", &jobs)
}

/// Positions that are counted from the mask are those of the goldens. Where rows have no gaps, attention rotates.
#[test]
fn positions_from_the_mask() -> TestResult {
    let mut jobs = jobs(&["llama", "gpt2", "llama4_text", "phi3-longrope"])?;
    for case in cases()? {
        let mut job = Job::new(&case, "ort-cpu")?;
        job.name += " with --padding right";
        (job.options.padding, job.scenarios) = (Padding::Right, &WITHOUT_LEFT);
        jobs.push(job);
    }
    for job in &mut jobs {
        job.name += " with --positions mask";
        job.options.positions = Positions::Mask;
    }
    must_hold("--positions mask", &jobs)
}

#[test]
fn only_the_last_logits() -> TestResult {
    let mut jobs = jobs(&["llama", "mixtral"])?;
    for job in &mut jobs {
        job.name += " with --logits last";
        job.options.logits = Logits::Last;
    }
    must_hold("--logits last", &jobs)
}

/// A trained model: scenarios, perplexity over a text, and forty tokens for each prompt.
#[test]
fn a_trained_model() -> TestResult {
    runtime()?;
    let texts: Vec<serde_json::Value> = serde_json::from_slice(&fs::read(kjv_llama().join("greedy.json"))?)?;
    let complaints = TARGETS.par_iter().flat_map_iter(|target| {
        trained(target, &texts).unwrap_or_else(|error| vec![format!("kjv-llama on {target}: {error}")])
    });
    let complaints: Vec<String> = complaints.collect();
    report(complaints);
    Ok(())
}

fn trained(target: &str, texts: &[serde_json::Value]) -> TestResult<Vec<String>> {
    let job = Job {
        name: format!("kjv-llama on {target}"),
        options: options(&kjv_llama(), target)?,
        golden: kjv_llama().join("golden.safetensors"),
        scenarios: &[],
        typical: false,
    };
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("model");
    build_with(&job.options, &output)?;
    let settings = verify::Options { threads: 1, ..verify::Options::default() };
    let report = against_golden(&output, &Golden::read(&job.golden)?, &settings)?;
    let mut complaints = job.complaints(&report);
    if report.perplexity.is_empty() {
        complaints.push(format!("{}: no perplexity: {}", job.name, report.notes.join("; ")));
    }
    complaints.extend(continuations(&output, texts)?.into_iter().map(|line| format!("{}: {line}", job.name)));
    Ok(complaints)
}

/// What is wrong with the continuations of the texts.
fn continuations(model: &Path, texts: &[serde_json::Value]) -> TestResult<Vec<String>> {
    let mut decoder = Decoder::open(model, &session::Options { threads: 1, ..session::Options::default() })?;
    let tokenizer = Tokenizer::open(model)?;
    let mut complaints = Vec::new();
    for text in texts {
        let prompt = text["prompt"].as_str().ok_or("no prompt")?;
        let wanted: Vec<i64> = serde_json::from_value(text["ids"].clone())?;
        let ids = tokenizer.encode(prompt, true)?;
        let count = wanted.len() - ids.len();
        assert_eq!(count, 40, "{prompt}");
        let settings = Settings::greedy(count);
        let got = generate(&mut decoder, &tokenizer, &ids, &settings, &mut |_| true)?;
        if [got.prompt_ids, got.ids].concat() != wanted {
            complaints.push(format!("{prompt:?} is continued by {:?}", got.text));
        }
    }
    Ok(complaints)
}

/// A template without a case is untested.
#[test]
fn every_template_has_a_case() -> TestResult {
    let mut types = BTreeSet::new();
    for case in cases()? {
        let config: serde_json::Value = serde_json::from_slice(&fs::read(case.dir.join("config.json"))?)?;
        types.extend(config["model_type"].as_str().map(str::to_owned));
    }
    let catalogue = Catalogue::built_in()?;
    let covered = |names: &[String]| names.iter().any(|name| types.contains(name));
    let bare: Vec<&str> = catalogue
        .templates()
        .iter()
        .filter(|template| !covered(&template.model_types))
        .map(|template| template.name.as_str())
        .collect();
    assert!(bare.is_empty(), "templates without a golden case: {}", bare.join(", "));
    Ok(())
}
