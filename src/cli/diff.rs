//! `hf2onnx diff`.

use std::path::PathBuf;

use clap::Args;

use super::Output;
use crate::diff::compare;
use crate::error::Result;

/// Compare two built directories: graph, weights, the files beside them, the record.
///
/// Weights are compared byte for byte wherever they lie; the same weights in another place are no difference.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hf2onnx diff out/before out/after\n\n\
    The exit code is 0 when they are equal, 1 when they differ, 2 when they can not be compared.")]
pub(super) struct Diff {
    /// A directory that `hf2onnx build` wrote
    a: PathBuf,
    /// Another one
    b: PathBuf,
    /// List every difference
    #[arg(long)]
    all: bool,
}

impl Diff {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        output.set_exit_codes(0, 2);
        let difference = compare(&self.a, &self.b)?;
        if output.is_json() {
            output.value(&difference)?;
        } else {
            output.piece(&difference.words(self.all));
        }
        output.set_exit_codes(u8::from(!difference.equal), 2);
        Ok(())
    }
}
