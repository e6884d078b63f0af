//! `hf2onnx verify`.

use std::path::PathBuf;

use clap::Args;

use super::{Output, SessionOptions};
use crate::error::{Code, Error, Result};
use crate::golden::Golden;
use crate::runtime::Provider;
use crate::verify::{Options, Report, against_golden, consistency};

/// Run a built model in onnxruntime and compare it with its reference.
///
/// With a golden, every scenario (prefill, both paddings, decoding through the cache, chunks, greedy tokens) is compared
/// with what the reference computed. Without one, they are compared with the model's own full run. A quantised build is
/// held to the bar of its scheme, and the report says what it lost: in divergence, in perplexity, and in which layers. With
/// a provider other than the processor, nodes that it does not run are listed by operator.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hf2onnx verify out/kjv --golden golden/kjv-llama/golden.safetensors\n\n\
    The exit code is 1 when it does not hold.")]
pub(super) struct Verify {
    /// A directory that `hf2onnx build` wrote, or an ONNX file
    dir: PathBuf,
    /// What the reference computed: a safetensors file, or a directory with a golden.safetensors
    #[arg(long, value_name = "FILE")]
    golden: Option<PathBuf>,
    /// Also measure the perplexity over a text
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// A float build of the same model: what a quantised one is compared with on the text
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Fail when a node runs on another provider than the one that was asked for, arithmetic on shapes apart
    #[arg(long)]
    strict_provider: bool,
    #[command(flatten)]
    session: SessionOptions,
}

impl Verify {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let golden = self.golden.as_deref().map(Golden::read).transpose()?;
        self.session.ensure(output)?;
        let session = self.session.session();
        let options = Options {
            threads: session.threads,
            placement: self.strict_provider || session.provider != Provider::Cpu,
            provider: session.provider,
            provider_options: session.provider_options,
            text: self.text,
            reference: self.reference,
            ..Options::default()
        };
        let report = match &golden {
            Some(golden) => against_golden(&self.dir, golden, &options)?,
            None => consistency(&self.dir, None, &options)?,
        };
        print_report(&report, output)?;
        judge(&report)?;
        if self.strict_provider { check_placement(&report) } else { Ok(()) }
    }
}

/// An error when a node runs elsewhere, or when nobody knows.
fn check_placement(report: &Report) -> Result<()> {
    let placement = report.placement.as_ref().ok_or_else(|| {
        Error::new(Code::NodesElsewhere, report.model.display())
            .found(report.notes.join("; "))
            .expected("a record of where each node runs")
    })?;
    placement.check(&report.model)
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
