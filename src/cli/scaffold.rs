//! `hf2onnx scaffold`.

use std::path::PathBuf;

use clap::Args;

use super::{Output, repo};
use crate::error::Result;
use crate::read::{Adapter, Repository};
use crate::scaffold::{self, Draft};

/// Draft a template for an architecture that has none.
///
/// The draft comes from config.json and the names and shapes of the tensors, and extends the known template that
/// covers most of them. Nothing of the repository is run. What is not certain is marked `# guess:`, what must be
/// looked up in the modeling file `# TODO:`.
///
/// A draft that builds is not a draft that is right: activations, rotations and routing leave no trace in names and
/// shapes. Record a golden (golden/record.py) and build with --verify before you trust it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hf2onnx scaffold REPO --output my.toml\n  \
    hf2onnx build REPO --template my.toml --output out/my --verify=golden.safetensors")]
pub(super) struct Scaffold {
    /// A directory with config.json and safetensors files, or a model of the Hugging Face hub: org/name[@revision]
    repo: PathBuf,
    /// Where to write the draft [default: it is printed]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Scaffold {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        // A template is drafted from names and shapes, which no adapter changes.
        let mut repository = Repository::open_with(&repo::directory(&self.repo, output)?, Adapter::Ignore)?;
        let draft = scaffold::draft(&mut repository)?;
        if let Some(path) = &self.output {
            scaffold::write(&draft, path)?;
        }
        if output.is_json() {
            return output.value(&draft);
        }
        match &self.output {
            None => output.piece(&draft.template),
            Some(path) => output.line(&summary(&draft, &path.display().to_string())),
        }
        Ok(())
    }
}

fn summary(draft: &Draft, path: &str) -> String {
    let (guesses, todos) = (draft.guesses.len(), draft.todos.len());
    let state = match &draft.failure {
        None => "It binds every tensor; whether it is right only a golden can say.".to_owned(),
        Some(error) => format!("It does not build yet:\n{error}"),
    };
    format!("{path}: extends {}, {guesses} guesses, {todos} things to look up. {state}", draft.extends)
}
