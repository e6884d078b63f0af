//! `hf2onnx verify`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Output, RuntimeOption};
use crate::error::{Code, Error, Result};
use crate::golden::Golden;
use crate::verify::{Options, Report, against_golden, consistency};

/// Run a built model in onnxruntime and compare it with its reference.
///
/// With a golden, every scenario (prefill, both paddings, decoding through the cache, chunks, greedy tokens) is compared
/// with what the reference computed. Without one, they are compared with the model's own full run. A quantised build is
/// held to the bar of its scheme, and the report says what it lost: in divergence, in perplexity, and in which layers.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hf2onnx verify out/kjv --golden golden/kjv-llama/golden.safetensors\n\n\
    The exit code is 1 when it does not hold.")]
pub(super) struct Verify {
    /// A directory that `hf2onnx build` wrote, or an ONNX file
    dir: PathBuf,
    /// What the reference computed: a safetensors file, or a directory with a golden.safetensors
    #[arg(long, value_name = "FILE")]
    golden: Option<PathBuf>,
    /// Where onnxruntime runs the model
    #[arg(long, value_enum, default_value_t = Provider::Cpu)]
    provider: Provider,
    /// Also measure the perplexity over a text
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// A float build of the same model: what a quantised one is compared with on the text
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Threads within an operator [default: as many as cores]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    #[command(flatten)]
    runtime: RuntimeOption,
}

/// An execution provider of onnxruntime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Provider {
    /// The processor.
    Cpu,
}

impl Verify {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let Provider::Cpu = self.provider;
        let golden = self.golden.as_deref().map(Golden::read).transpose()?;
        self.runtime.ensure(output)?;
        let options =
            Options { threads: self.threads, text: self.text, reference: self.reference, ..Options::default() };
        let report = match &golden {
            Some(golden) => against_golden(&self.dir, golden, &options)?,
            None => consistency(&self.dir, None, &options)?,
        };
        print_report(&report, output)?;
        judge(&report)
    }
}

/// Prints a report as the user wants it.
pub(super) fn print_report(report: &Report, output: &mut Output) -> Result<()> {
    if output.is_json() {
        return output.value(report);
    }
    output.line(&report.to_string());
    Ok(())
}

/// An error when the report does not hold.
pub(super) fn judge(report: &Report) -> Result<()> {
    if report.holds() {
        return Ok(());
    }
    let error =
        Error::new(Code::VerificationFailed, report.model.display()).found(match report.failures().as_slice() {
            [] => "nothing could be compared".to_owned(),
            failed => format!("{} do not hold", failed.join(", ")),
        });
    if let Some(cost) = &report.cost {
        let layers = cost.layers.iter().take(3).map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let help = if layers.is_empty() { layers } else { format!("what costs most: {layers}") };
        return Err(error.expected(format!("at most {}", cost.bar)).help(help));
    }
    let layer = report.divergence.as_ref().map(|d| d.message.as_str());
    let derived = report.scenarios.iter().any(|outcome| outcome.allowed.is_some());
    Err(error
        .expected(if derived {
            "differences within those that the reference in half precision allows".to_owned()
        } else {
            format!("differences within {:.0e} of the largest logit", report.tolerance)
        })
        .help(layer.unwrap_or_default()))
}
