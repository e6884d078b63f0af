//! `hf2onnx templates`.

use clap::Args;
use serde_json::json;

use super::Output;
use crate::describe::{Catalogue, Template, support};
use crate::error::{Code, Error, Result};

/// List the architectures that are supported, or print one's template with all that it inherits.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hf2onnx templates\n  hf2onnx templates deepseek_v3\n\n\
    A printed template says behind each value which file it comes from.")]
pub(super) struct Templates {
    /// A template's name or a `model_type`
    name: Option<String>,
    /// Print the support table as Markdown
    #[arg(long, conflicts_with = "name")]
    markdown: bool,
}

impl Templates {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let catalogue = Catalogue::built_in()?;
        if let Some(name) = &self.name {
            let template = named(&catalogue, name)?;
            if output.is_json() {
                return output.value(&json!({
                    "template": template.name, "model_types": template.model_types, "summary": template.summary,
                    "extends": template.ancestors, "tables": template.merged(), "tensors": template.tensor_rules(),
                }));
            }
            output.piece(&template.annotated());
            return Ok(());
        }
        let rows = support::rows(&catalogue)?;
        if output.is_json() {
            return output.value(&rows);
        }
        if self.markdown {
            output.piece(&support::markdown(&rows));
            return Ok(());
        }
        let width = rows.iter().map(|row| row.template.len()).max().unwrap_or(0);
        for row in &rows {
            let extends = row.extends.first().map_or_else(String::new, |parent| format!(" (extends {parent})"));
            output.line(&format!("{:<width$}  {}{extends}", row.template, row.summary));
            let others: Vec<&str> =
                row.model_types.iter().filter(|name| **name != row.template).map(String::as_str).collect();
            if !others.is_empty() {
                output.line(&format!("{:<width$}  model_type {}", "", others.join(", ")));
            }
        }
        output.say("\nAnything else: `hf2onnx scaffold REPO` drafts a template, `build --template FILE` takes it.");
        Ok(())
    }
}

fn named<'c>(catalogue: &'c Catalogue, name: &str) -> Result<&'c Template> {
    let by_name = catalogue.templates().iter().find(|template| template.name == name);
    by_name.or_else(|| catalogue.for_model_type(name)).ok_or_else(|| {
        let names: Vec<&str> = catalogue.templates().iter().map(|template| template.name.as_str()).collect();
        Error::new(Code::UsageInvalid, format!("templates {name}"))
            .found("no such template or model_type")
            .expected(format!("one of {}", names.join(", ")))
    })
}
