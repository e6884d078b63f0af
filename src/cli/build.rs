//! `hf2onnx build`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;

use super::quantization::QuantizationOptions;
use super::verify::{judge, print_report};
use super::{Output, RuntimeOption, repo};
use crate::build::Logits;
use crate::calibrate::Calibration;
use crate::compile::{self, Compiled, Cost, KvCache, Weights, Written, compile};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::golden::Golden;
use crate::lower;
use crate::opset::{self, Target};
use crate::read::Adapter;
use crate::verify::{Options, Report, against_golden, consistency};
use crate::write::{self, Force, LinkReport, free_space};

/// Compile a repository into an ONNX directory.
///
/// The directory appears whole or not at all. With --verify it appears only if onnxruntime computes with it what the
/// reference computed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hf2onnx build golden/kjv-llama --output out/kjv --verify\n  \
    hf2onnx build REPO --output out/model --target standard --dtype f16")]
pub(super) struct Build {
    #[command(flatten)]
    model: ModelOptions,
    /// The directory to write
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Run the result against a golden: this one, or the repository's golden.safetensors; without any, against itself
    #[arg(long, value_name = "GOLDEN", num_args = 0..=1, require_equals = true)]
    #[expect(clippy::option_option, reason = "clap's form of an option whose value is optional")]
    verify: Option<Option<PathBuf>>,
    /// Replace a directory that hf2onnx wrote before
    #[arg(long)]
    force: bool,
    /// Do everything but write: say what the output takes on disk, in time and in memory
    #[arg(long, conflicts_with = "verify")]
    dry_run: bool,
    /// Say how long each stage took
    #[arg(long)]
    pub(super) timings: bool,
    #[command(flatten)]
    runtime: RuntimeOption,
}

/// What is compiled, and how: the same for every command that compiles.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelOptions {
    /// A directory with config.json and safetensors files, or a model of the Hugging Face hub: org/name[@revision]
    repo: PathBuf,
    /// Which operators the graph is made of
    #[arg(long, default_value = "ort-cpu", value_parser = target)]
    target: &'static Target,
    /// Float type that matrices are stored in; ort-cuda also computes in it, other targets in float32 [default: f16 for ort-cuda, f32 for others]
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Padding for which the graph is exact; less is a little faster
    #[arg(long, value_enum, default_value_t = Padding::Any)]
    padding: Padding,
    /// Where the graph takes the positions of new tokens from [default: mask for ort-cuda, ids for others]
    #[arg(long, value_enum)]
    positions: Option<Positions>,
    /// Positions whose logits are computed
    #[arg(long, value_enum, default_value_t = LogitsOption::All)]
    logits: LogitsOption,
    /// Longest sequence that consumers are told of [default: the model's own]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Where the graph finds its weights
    #[arg(long, value_enum, default_value_t = WeightsOption::Pack)]
    weights: WeightsOption,
    /// Split written weights into files of at most this size: 2GB, 500MB, 1GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shard_size: Option<u64>,
    /// With `--weights link`: read the linked files once, to record their sha256
    #[arg(long)]
    hash_linked: bool,
    #[command(flatten)]
    quantization: QuantizationOptions,
    /// Describe the model by this template instead of a built-in one
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Take the weights as they are where an adapter lies beside them
    #[arg(long)]
    ignore_adapter: bool,
    /// A key of config.json that may stay unread (repeatable)
    #[arg(long, value_name = "NAME")]
    allow_unused_key: Vec<String>,
    /// A tensor that may stay unread, or a pattern with `*` (repeatable)
    #[arg(long, value_name = "NAME")]
    allow_unused_tensor: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    /// float32
    F32,
    /// float16: half the size, as exact as the weights are rounded
    F16,
    /// bfloat16: half the size, and what most checkpoints hold
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WeightsOption {
    /// In files of the output's own, in `--dtype`
    Pack,
    /// In the checkpoint's own files, hard-linked into the output: no room, no time; whoever writes into those files changes the model
    Link,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Padding {
    /// Left, right and none
    Any,
    /// Right and none, as onnxruntime-genai pads
    Right,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Positions {
    /// From its input `position_ids`
    Ids,
    /// From `attention_mask`, whose ones are counted: the graph has no input `position_ids`, and attention can rotate queries and keys by itself
    Mask,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogitsOption {
    /// Every new token's
    All,
    /// Each row's last token's
    Last,
}

/// `2GB`, `500MB`, `1.5GiB` or a number of bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 7] = [
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
    ];
    let upper = text.trim().to_ascii_uppercase();
    let unit = UNITS.iter().find_map(|(name, unit)| upper.strip_suffix(name).map(|number| (number, *unit)));
    let (number, unit) = unit.unwrap_or((&upper, 1));
    let refused = || format!("`{text}` is no size such as 2GB or 500MB");
    let number: f64 = number.trim().parse().map_err(|_| refused())?;
    #[expect(clippy::cast_precision_loss, reason = "a size in whole units stays exact")]
    let bytes = number * unit as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range is checked")]
    if (1.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(refused()) }
}

fn target(name: &str) -> Result<&'static Target, String> {
    Target::named(name).map_err(|e| e.expected)
}

impl ModelOptions {
    /// What the compiler takes. A model of the hub is downloaded.
    pub(super) fn compile_options(&self, output: &Output) -> Result<compile::Options> {
        if self.max_length == Some(0) {
            return Err(Error::new(Code::UsageInvalid, "--max-length").found(0).expected("a length from 1 up"));
        }
        self.check_dtype()?;
        let cache = self.quantization.cache()?;
        Ok(compile::Options {
            repository: repo::directory(&self.repo, output)?,
            adapter: if self.ignore_adapter { Adapter::Ignore } else { Adapter::Refuse },
            template: self.template.clone(),
            target: self.target,
            element: match self.dtype {
                None => self.target.usual_dtype(),
                Some(Dtype::F32) => ElementType::F32,
                Some(Dtype::F16) => ElementType::F16,
                Some(Dtype::Bf16) => ElementType::BF16,
            },
            weights: self.weights()?,
            recipe: self.quantization.recipe()?,
            cache,
            padding: match self.padding {
                Padding::Any => lower::Padding::Any,
                Padding::Right => lower::Padding::Right,
            },
            positions: match self.positions {
                None => self.target.positions,
                Some(Positions::Ids) => opset::Positions::Ids,
                Some(Positions::Mask) => opset::Positions::Mask,
            },
            logits: match self.logits {
                LogitsOption::All => Logits::All,
                LogitsOption::Last => Logits::Last,
            },
            max_length: self.max_length,
            allowed_keys: self.allow_unused_key.clone(),
            allowed_tensors: self.allow_unused_tensor.clone(),
        })
    }
}

impl ModelOptions {
    fn weights(&self) -> Result<Weights> {
        let refused = |flag: &str, found: &str| {
            let error = Error::new(Code::UsageInvalid, flag).found(found);
            Err(error.help("leave one of the two away"))
        };
        match self.weights {
            WeightsOption::Pack if self.hash_linked => refused("--hash-linked", "no --weights link beside it"),
            WeightsOption::Link if self.shard_size.is_some() => refused("--shard-size", "--weights link beside it"),
            WeightsOption::Pack => Ok(Weights::Pack { shard_size: self.shard_size }),
            WeightsOption::Link => Ok(Weights::Link { hash: self.hash_linked }),
        }
    }

    fn check_dtype(&self) -> Result<()> {
        let other = self.dtype.is_some_and(|dtype| dtype != Dtype::F32);
        if self.weights == WeightsOption::Link && other && self.target.compute.is_some() {
            return Err(Error::new(Code::UsageInvalid, "--dtype")
                .found("--weights link beside it")
                .expected("linked weights, which keep the type that they have, or packed ones of another")
                .help("leave --dtype away, or use --weights pack"));
        }
        Ok(())
    }
}

impl Build {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let mut options = self.model.compile_options(output)?;
        let golden = self.golden(&options.repository)?;
        let mut compiled = compile(&options)?;
        if self.dry_run {
            return self.foretell(&compiled, &options, output);
        }
        let force = if self.force { Force::Yes } else { Force::No };
        let mut calibration = self.calibration(&options, output)?;
        if let (Some(kind), Some(calibration)) = (options.cache.kind(), &calibration) {
            options.cache = KvCache::Quantized(kind, Some(calibration.cache_scales(kind)?));
            compiled = compile(&options)?;
        }
        let bar = progress_bar(compiled.layout.written_bytes(), output);
        let known = calibration.as_mut().filter(|_| options.recipe.is_some()).map(|calibration| {
            let record = calibration.record.clone();
            (calibration as &mut dyn write::Calibration, record)
        });
        let mut written = compile::write_calibrated(&compiled, &options, &self.output, force, known, |n| bar.inc(n))?;
        drop(calibration);
        bar.finish_and_clear();
        let report = match &self.verify {
            Some(_) => {
                let rounded = compiled.has_integers() || options.cache != KvCache::Float;
                Some(self.verify(&options, &mut written, (golden.as_ref(), rounded), output)?)
            }
            None => None,
        };
        let notes: Vec<String> = written.notes().cloned().collect();
        let links = written.links.clone();
        written.commit()?;
        for note in &notes {
            output.say(note);
        }
        self.print(&compiled, &options, &links, report.as_ref(), output)
    }

    /// The float build that shows what matrices are multiplied with, if there is a text for it to read.
    fn calibration(&self, options: &compile::Options, output: &Output) -> Result<Option<Calibration>> {
        let Some(text) = self.model.quantization.text() else { return Ok(None) };
        self.runtime.ensure(output)?;
        Calibration::new(options, &text, &sibling(&self.output, "float")).map(Some)
    }

    /// The golden to verify against, read before anything is built.
    fn golden(&self, repository: &Path) -> Result<Option<Golden>> {
        match &self.verify {
            None => Ok(None),
            Some(Some(path)) => Golden::read(path).map(Some),
            Some(None) => {
                let own = repository.join("golden.safetensors");
                if own.symlink_metadata().is_ok() { Golden::read(&own).map(Some) } else { Ok(None) }
            }
        }
    }

    fn verify(
        &self,
        options: &compile::Options,
        written: &mut Written,
        (golden, rounded): (Option<&Golden>, bool),
        output: &mut Output,
    ) -> Result<Report> {
        self.runtime.ensure(output)?;
        let settings = Options::default();
        let mut report = if let Some(golden) = golden {
            against_golden(written.path(), golden, &settings)?
        } else if rounded {
            // No float witness: what rounding costs is measured against a golden, or by `quant-report`.
            consistency(written.path(), None, &settings)?
        } else {
            // The same specification in the plainest operators is an independent witness of the lowering.
            let other = compile::Options { target: Target::named("primitive")?, ..options.clone() };
            let plain = compile(&other)?;
            let witness = compile::write(&plain, &other, &sibling(&self.output, "primitive"), Force::Yes, |_| {})?;
            consistency(written.path(), Some(witness.path()), &settings)?
        };
        report.model.clone_from(&self.output);
        if !report.holds() {
            print_report(&report, output)?;
            judge(&report)?;
        }
        let value =
            serde_json::to_value(&report).map_err(|e| Error::new(Code::VerificationFailed, "report").found(e))?;
        written.record_verification(value)?;
        Ok(report)
    }

    fn print(
        &self,
        compiled: &Compiled,
        options: &compile::Options,
        links: &LinkReport,
        report: Option<&Report>,
        output: &mut Output,
    ) -> Result<()> {
        let (spec, cost) = (&compiled.description.spec, compiled.cost(options));
        if output.is_json() {
            let copied: Vec<&str> = links.copied.iter().map(|(name, ..)| name.as_str()).collect();
            return output.value(&json!({
                "output": self.output, "target": self.model.target.name, "model_type": spec.model_type,
                "template": spec.template, "nodes": compiled.lowered.graph.nodes.len(),
                "bytes": cost.written + cost.linked, "cost": cost, "linked": links.linked, "copied": copied,
                "verification": report,
            }));
        }
        for (name, size, reason) in &links.copied {
            output.say(&format!("{name} ({}) was copied and not linked: {reason}", HumanBytes(*size)));
        }
        if let Some(load) = load_words(&cost) {
            output.say(&load);
        }
        output.line(&format!(
            "{}: {} ({}), target {}, {}",
            self.output.display(),
            spec.model_type,
            spec.template,
            self.model.target.name,
            weight_words(&cost),
        ));
        // What the build is worth stands last.
        if let Some(report) = report {
            output.line(&report.to_string());
        }
        Ok(())
    }

    /// What the build would take.
    fn foretell(&self, compiled: &Compiled, options: &compile::Options, output: &mut Output) -> Result<()> {
        let (cost, free) = (compiled.cost(options), free_space(&self.output));
        let files = compiled.layout.written.len();
        let disk = cost.written + cost.graph;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let seconds = disk as f64 / BYTES_PER_SECOND;
        compiled.notes.iter().for_each(|note| output.say(note));
        if output.is_json() {
            return output.value(&json!({
                "output": self.output, "nodes": compiled.lowered.graph.nodes.len(), "cost": cost, "data_files": files,
                "disk_bytes": disk, "free_bytes": free, "seconds": seconds,
            }));
        }
        output.line(&format!("{}: {}", self.output.display(), weight_words(&cost)));
        output.line(&format!("  graph  {} in {} nodes", HumanBytes(cost.graph), compiled.lowered.graph.nodes.len()));
        let free = free.map_or(String::new(), |free| format!(", {} are free", HumanBytes(free)));
        output.line(&format!("  disk   {} in {files} data files{free}", HumanBytes(disk)));
        output.line(&format!("  time   about {seconds:.1} s, if the disk writes 1 GB in a second"));
        if let Some(load) = load_words(&cost) {
            output.line(&format!("  load   {load}"));
        }
        Ok(())
    }
}

/// What a disk of today and two cores come to; only an estimate hangs on it.
const BYTES_PER_SECOND: f64 = 1e9;

fn weight_words(cost: &Cost) -> String {
    match (cost.linked, cost.written) {
        (0, written) => format!("{} of weights", HumanBytes(written)),
        (linked, 0) => format!("{} of weights linked", HumanBytes(linked)),
        (linked, written) => format!("{} of weights linked, {} written", HumanBytes(linked), HumanBytes(written)),
    }
}

/// What every session pays for weights that are narrower than what is computed in.
fn load_words(cost: &Cost) -> Option<String> {
    let words = || {
        format!(
            "each session widens its matrices to {} of float32 when it loads; --weights pack --dtype f32 avoids it",
            HumanBytes(cost.widened)
        )
    };
    (cost.widened > 0).then(words)
}

/// Where a build that only serves another one is staged: never committed, so nothing appears there.
fn sibling(output: &Path, what: &str) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    // Cut, so that the longest name of an output is one of it as well.
    let end = name.char_indices().map(|(at, _)| at).chain([name.len()]).take_while(|at| *at <= 200).last();
    output.with_file_name(format!("{}.{what}", name.get(..end.unwrap_or_default()).unwrap_or_default()))
}

/// A bar over bytes; indicatif hides it where nobody watches.
pub(super) fn progress_bar(bytes: u64, output: &Output) -> ProgressBar {
    if output.is_json() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
