//! Description: a template, a configuration and the names of the tensors become a [`crate::spec::ModelSpec`].
//!
//! A template is data. Strings that start with `=` are Jinja expressions over the configuration's keys and
//! `layer`; everything else is itself. A template chooses, names and computes scalars; it never wires a graph.

mod accounting;
mod check;
mod expression;
mod limits;
mod particular;
mod resolve;
mod rope;
mod rules;
pub mod support;
mod tables;
mod template;
mod types;

pub use accounting::Accounting;
pub(crate) use accounting::distance;
pub use rules::{Bound, Check, Drop, TensorRules};
pub(crate) use template::TABLES;
pub(crate) use template::quoted_key;
pub use template::{Catalogue, Template};

use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use crate::patterns::Patterns;
use crate::spec::ModelSpec;

/// A model, described.
#[derive(Debug)]
pub struct Description {
    /// What it is.
    pub spec: ModelSpec,
    /// Where its weights are.
    pub rules: TensorRules,
    /// What became of its configuration's keys.
    pub accounting: Accounting,
}

impl Description {
    /// What a user should know of the configuration: a key that is not followed, because another one is.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        let passed_over = self.accounting.without_effect.get("rope_parameters");
        passed_over.map(|reason| format!("config.json: rope_parameters: {reason}")).into_iter()
    }
}

/// Describes a configuration by a template. Keys that the template does not know must be in `allowed`: names, or patterns
/// with `*`.
pub fn describe(template: &Template, config: &Map<String, Value>, allowed: &[String]) -> Result<Description> {
    let allowed = Patterns::new("--allow-unused-key", allowed)?;
    let mut accounting = accounting::account(template, config, &allowed)?;
    let (config, left_out) = without(config, &allowed);
    accounting.allowed.extend(left_out);
    types::check(template, &config, &accounting.used)?;
    let (spec, rules) = resolve::resolve(template, &config)?;
    Ok(Description { spec, rules, accounting })
}

/// The configuration without the keys of objects (`rope_parameters.odd`) that the user allowed to stay unread, and
/// those keys.
fn without(config: &Map<String, Value>, allowed: &Patterns) -> (Map<String, Value>, Vec<String>) {
    let mut config = config.clone();
    let mut left_out = Vec::new();
    for (key, value) in &mut config {
        let Some(object) = value.as_object_mut() else { continue };
        let odd = |part: &str| format!("{key}.{part}");
        let parts: Vec<String> = object.keys().filter(|part| allowed.admits(&odd(part))).cloned().collect();
        for part in parts {
            object.remove(&part);
            left_out.push(odd(&part));
        }
    }
    (config, left_out)
}

/// The template for a configuration: the user's own, or the built-in one for its `model_type`.
pub fn choose(config: &Map<String, Value>, own: Option<&std::path::Path>) -> Result<Template> {
    let model_type = config.get("model_type").and_then(Value::as_str);
    if let Some(path) = own {
        let template = Template::read(path)?;
        return match model_type {
            Some(model_type) if !template.model_types.iter().any(|known| known == model_type) => {
                Err(Error::new(Code::TemplateInvalid, path.display())
                    .found(format!("a template for {}", template.model_types.join(", ")))
                    .expected(format!("one for {model_type}, as config.json says"))
                    .help("if it describes this model too, add the name to its model_type list"))
            }
            _ => Ok(template),
        };
    }
    let Some(model_type) = model_type else {
        return Err(Error::new(Code::ConfigInvalid, "config.json: model_type")
            .found("nothing")
            .expected("the name of an architecture")
            .help("add the key, or describe the model with --template FILE"));
    };
    let catalogue = Catalogue::built_in()?;
    catalogue.for_model_type(model_type).cloned().ok_or_else(|| unknown(model_type, config, &catalogue))
}

/// No template knows the `model_type`: an error that shows where to start, never a guess that builds.
fn unknown(model_type: &str, config: &Map<String, Value>, catalogue: &Catalogue) -> Error {
    let names = catalogue.templates().iter().flat_map(|template| &template.model_types);
    let mut names: Vec<&str> = names.map(String::as_str).collect();
    names.sort_by_key(|name| distance(name, model_type));
    let near = names.iter().take(5).copied().collect::<Vec<_>>().join(", ");
    let code = if config.contains_key("auto_map") { "; the repository's own Python (auto_map) is not run" } else { "" };
    Error::new(Code::ModelTypeUnknown, format!("config.json: model_type {model_type:?}"))
        .found(format!("no template for it{code}"))
        .expected(format!("a model_type with a template; by name the nearest are {near}"))
        .help("run `hf2onnx scaffold REPO` for a draft, and build with --template FILE")
}
