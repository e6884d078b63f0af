//! `hf2onnx inspect`.

use clap::Args;
use serde_json::json;

use super::Output;
use super::build::ModelOptions;
use crate::compile::{Compiled, Options, compile};
use crate::describe;
use crate::error::{Error, Result};
use crate::inspect::{Built, Inspection, specification, trace};
use crate::read::Repository;

/// Show what a repository or a built directory holds, and how it becomes a graph.
///
/// Equal layers are described once. Nothing is written, and no weight is read: only headers are.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hf2onnx inspect golden/kjv-llama\n  hf2onnx inspect REPO --target standard\n  \
    hf2onnx inspect REPO --tensor model.layers.0.self_attn.q_proj.weight\n  hf2onnx inspect out/kjv")]
pub(super) struct Inspect {
    #[command(flatten)]
    model: ModelOptions,
    /// Follow one tensor, parameter or initializer through the whole compiler
    #[arg(long, value_name = "NAME", conflicts_with = "graph")]
    tensor: Option<String>,
    /// Print the graph of composite operations and the target's
    #[arg(long)]
    graph: bool,
}

impl Inspect {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let options = self.model.compile_options(output)?;
        // A built directory has a config.json of its own, but its weights are the graph's.
        if Built::is_built(&options.repository) {
            let built = Built::read(&options.repository)?;
            if output.is_json() {
                return output.value(&built);
            }
            output.piece(&built.to_string());
            return Ok(());
        }
        match compile(&options) {
            Ok(compiled) => self.print(&compiled, &options, output),
            Err(error) => Err(describe_anyhow(&options, error, output)),
        }
    }

    fn print(&self, compiled: &Compiled, options: &Options, output: &mut Output) -> Result<()> {
        if let Some(name) = &self.tensor {
            let way = trace(compiled, name)?;
            if output.is_json() {
                return output.value(&way);
            }
            output.piece(&way.to_string());
            return Ok(());
        }
        if self.graph {
            let (composite, lowered) = (compiled.model.to_string(), compiled.lowered.graph.to_string());
            if output.is_json() {
                return output.value(&json!({ "composite": composite, "lowered": lowered }));
            }
            output.piece(&format!("# composite operations\n{composite}\n# {}\n{lowered}", options.target.name));
            return Ok(());
        }
        let template = describe::choose(&compiled.repository.config, options.template.as_deref())?;
        let inspection = Inspection::new(compiled, &template, options);
        if output.is_json() {
            return output.value(&inspection);
        }
        output.piece(&inspection.to_string());
        Ok(())
    }
}

/// What is known of a model that does not build: its sizes are what the user needs to find out why.
fn describe_anyhow(options: &Options, error: Error, output: &mut Output) -> Error {
    let known = || {
        let config = Repository::open_with(&options.repository, options.adapter).ok()?.config;
        let template = describe::choose(&config, options.template.as_deref()).ok()?;
        let description = describe::describe(&template, &config, &options.allowed_keys).ok()?;
        serde_json::to_value(&description.spec).ok()
    };
    if let (false, Some(spec)) = (output.is_json(), known()) {
        output.line(&format!("described, but not built:\n{}", specification(&spec)));
    }
    error
}
