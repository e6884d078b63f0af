//! `hf2onnx build`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::verify::{judge, print_report};
use super::{Output, RuntimeOption};
use crate::build::Logits;
use crate::compile::{self, Compiled, Written, compile};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::golden::Golden;
use crate::lower;
use crate::opset::Target;
use crate::verify::{Options, Report, against_golden, consistency};
use crate::write::Force;

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
    #[command(flatten)]
    runtime: RuntimeOption,
}

/// What is compiled, and how: the same for every command that compiles.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelOptions {
    /// A directory with config.json and safetensors files
    repo: PathBuf,
    /// Which operators the graph is made of
    #[arg(long, default_value = "ort-cpu", value_parser = target)]
    target: &'static Target,
    /// Float type that matrices are stored in; every target so far computes in float32
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Padding for which the graph is exact; less is a little faster
    #[arg(long, value_enum, default_value_t = Padding::Any)]
    padding: Padding,
    /// Positions whose logits are computed
    #[arg(long, value_enum, default_value_t = LogitsOption::All)]
    logits: LogitsOption,
    /// Longest sequence that consumers are told of [default: the model's own]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Describe the model by this template instead of a built-in one
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// A key of config.json that may stay unread (repeatable)
    #[arg(long, value_name = "NAME")]
    allow_unused_key: Vec<String>,
    /// A tensor that may stay unread (repeatable)
    #[arg(long, value_name = "NAME")]
    allow_unused_tensor: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    /// float32
    F32,
    /// float16: half the size, as exact as the weights are rounded
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Padding {
    /// Left, right and none
    Any,
    /// Right and none
    Right,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogitsOption {
    /// Every new token's
    All,
    /// Each row's last token's
    Last,
}

fn target(name: &str) -> Result<&'static Target, String> {
    Target::named(name).map_err(|e| e.expected)
}

impl ModelOptions {
    /// What the compiler takes.
    pub(super) fn compile_options(&self) -> Result<compile::Options> {
        if self.max_length == Some(0) {
            return Err(Error::new(Code::UsageInvalid, "--max-length").found(0).expected("a length from 1 up"));
        }
        Ok(compile::Options {
            repository: self.repo.clone(),
            template: self.template.clone(),
            target: self.target,
            element: match self.dtype {
                Dtype::F32 => ElementType::F32,
                Dtype::F16 => ElementType::F16,
            },
            padding: match self.padding {
                Padding::Any => lower::Padding::Any,
                Padding::Right => lower::Padding::Right,
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

impl Build {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let options = self.model.compile_options()?;
        let golden = self.golden()?;
        let compiled = compile(&options)?;
        let force = if self.force { Force::Yes } else { Force::No };
        let bytes = compiled.plan.initializers.iter().map(crate::bind::Initializer::bytes).sum();
        let bar = progress_bar(bytes, output);
        let mut written = compile::write(&compiled, &options, &self.output, force, |n| bar.inc(n))?;
        bar.finish_and_clear();
        let report = match &self.verify {
            Some(_) => Some(self.verify(&options, &mut written, golden.as_ref(), output)?),
            None => None,
        };
        let notes = written.files.notes.clone();
        written.commit()?;
        for note in &notes {
            output.say(note);
        }
        self.print(&compiled, bytes, report.as_ref(), output)
    }

    /// The golden to verify against, read before anything is built.
    fn golden(&self) -> Result<Option<Golden>> {
        match &self.verify {
            None => Ok(None),
            Some(Some(path)) => Golden::read(path).map(Some),
            Some(None) => {
                let own = self.model.repo.join("golden.safetensors");
                if own.is_file() { Golden::read(&own).map(Some) } else { Ok(None) }
            }
        }
    }

    fn verify(
        &self,
        options: &compile::Options,
        written: &mut Written,
        golden: Option<&Golden>,
        output: &mut Output,
    ) -> Result<Report> {
        self.runtime.ensure(output)?;
        let settings = Options::default();
        let mut report = if let Some(golden) = golden {
            against_golden(written.path(), golden, &settings)?
        } else {
            // The same specification in the plainest operators is an independent witness of the lowering.
            let other = compile::Options { target: Target::named("primitive")?, ..options.clone() };
            let plain = compile(&other)?;
            let witness = compile::write(&plain, &other, &sibling(&self.output), Force::Yes, |_| {})?;
            consistency(written.path(), Some(witness.path()), &settings)?
        };
        report.model.clone_from(&self.output);
        if !report.holds() {
            print_report(&report, output)?;
            judge(&report)?;
        }
        let value =
            serde_json::to_value(&report).map_err(|e| Error::new(Code::VerificationFailed, "report").found(e))?;
        written.verified(value)?;
        Ok(report)
    }

    fn print(&self, compiled: &Compiled, bytes: u64, report: Option<&Report>, output: &mut Output) -> Result<()> {
        let spec = &compiled.description.spec;
        if output.is_json() {
            return output.value(&json!({
                "output": self.output, "target": self.model.target.name, "model_type": spec.model_type,
                "template": spec.template, "nodes": compiled.lowered.graph.nodes.len(), "bytes": bytes,
                "verified": report,
            }));
        }
        if let Some(report) = report {
            output.line(&report.to_string());
        }
        let size = indicatif::HumanBytes(bytes);
        output.line(&format!(
            "{}: {} ({}), target {}, {size} of weights",
            self.output.display(),
            spec.model_type,
            spec.template,
            self.model.target.name,
        ));
        Ok(())
    }
}

/// Where the witness of a consistency check is staged: never committed, so nothing appears there.
fn sibling(output: &Path) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    output.with_file_name(format!("{name}.primitive"))
}

/// A bar over bytes; indicatif hides it where nobody watches.
fn progress_bar(bytes: u64, output: &Output) -> ProgressBar {
    if output.is_json() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
