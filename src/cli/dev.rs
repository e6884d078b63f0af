//! `hf2onnx dev`: commands for those who work on hf2onnx itself.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use super::Output;
use super::build::{progress_bar, size};
use crate::element::ElementType;
use crate::error::Result;
use crate::synth::{self, Layout};

/// Commands for work on hf2onnx itself: benches and tests.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hf2onnx dev synth benches/configs/llama-3.2-1b.json --output checkpoints/1b")]
pub(super) struct Dev {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Synth(Synth),
}

/// Make a random checkpoint of a model's shapes from its config.json.
///
/// The values mean nothing; names, shapes, types and files are those of a published checkpoint. The same config and
/// seed give the same bytes on every machine.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hf2onnx dev synth benches/configs/llama-3.2-1b.json --output checkpoints/1b\n  \
    hf2onnx dev synth benches/configs/deepseek-v3.json --output checkpoints/671b --sparse")]
struct Synth {
    /// A model's config.json
    config: PathBuf,
    /// The directory to write
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Leave out the data: it reads as zeros, and takes no disk where the file system has holes (Windows needs the room)
    #[arg(long)]
    sparse: bool,
    /// Float type of every tensor
    #[arg(long, value_enum, default_value_t = Stored::Bf16)]
    dtype: Stored,
    /// Chooses the values
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Most bytes in one safetensors file: 5GB, 500MB, 1GiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    shard_size: u64,
    /// Describe the model by this template instead of a built-in one
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// A key of config.json that may stay unread (repeatable)
    #[arg(long, value_name = "NAME")]
    allow_unused_key: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stored {
    /// bfloat16
    Bf16,
    /// float16
    F16,
    /// float32
    F32,
}

impl Dev {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        match self.action {
            Action::Synth(command) => command.run(output),
        }
    }
}

impl Synth {
    fn run(self, output: &mut Output) -> Result<()> {
        let layout = Layout {
            element: match self.dtype {
                Stored::Bf16 => ElementType::BF16,
                Stored::F16 => ElementType::F16,
                Stored::F32 => ElementType::F32,
            },
            seed: self.seed,
            shard_size: self.shard_size,
            sparse: self.sparse,
        };
        let checkpoint = synth::plan(&self.config, self.template.as_deref(), &self.allow_unused_key)?;
        let bar = progress_bar(checkpoint.bytes(&layout)?, output);
        let summary = synth::write(&checkpoint, &layout, &self.output, |n| bar.inc(n))?;
        bar.finish_and_clear();
        if output.is_json() {
            return output.value(&json!({
                "output": self.output, "tensors": summary.tensors, "bytes": summary.bytes, "files": summary.files,
                "sparse": self.sparse,
            }));
        }
        let size = indicatif::HumanBytes(summary.bytes);
        let (tensors, files) = (summary.tensors, summary.files.len());
        let kind = if self.sparse { "holes" } else { "random weights" };
        output.line(&format!("{}: {tensors} tensors, {size} of {kind} in {files} files", self.output.display()));
        Ok(())
    }
}
