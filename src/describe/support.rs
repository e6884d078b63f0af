//! What is supported: a row for each template, with its mechanisms and the golden cases that it passes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::template::{Catalogue, Template};
use crate::error::{Code, Error, Result};

/// Case -> what it shows. `tests/readme.rs` checks it against the folders, the golden suite that each case passes.
const CASES: &str = include_str!("../../golden/support.toml");

/// A golden case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// `model_type` of its configuration.
    pub model_type: String,
    /// The template that describes it; `own` for a user's.
    pub template: String,
    /// The targets for which it is verified.
    pub targets: Vec<String>,
}

/// A supported architecture.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The template's name.
    pub template: String,
    /// `model_type`s that it describes.
    pub model_types: Vec<String>,
    /// What it says of itself.
    pub summary: String,
    /// Templates that it extends, nearest first.
    pub extends: Vec<String>,
    /// What distinguishes it, in words.
    pub mechanisms: Vec<String>,
    /// Targets for which all its cases are verified.
    pub targets: Vec<String>,
    /// Golden cases that it passes.
    pub cases: Vec<String>,
}

/// The golden cases by name.
pub fn cases() -> Result<BTreeMap<String, Case>> {
    toml::from_str(CASES).map_err(|error| Error::new(Code::GoldenInvalid, "golden/support.toml").found(error))
}

/// A row for each template, by name.
pub fn rows(catalogue: &Catalogue) -> Result<Vec<Row>> {
    let cases = cases()?;
    let row = |template: &Template| {
        let own: BTreeMap<&String, &Case> = cases.iter().filter(|(_, case)| case.template == template.name).collect();
        let everywhere = |target: &&String| own.values().all(|case| case.targets.contains(target));
        let first = own.values().next().map_or(&[][..], |case| case.targets.as_slice());
        Row {
            template: template.name.clone(),
            model_types: template.model_types.clone(),
            summary: template.summary.clone(),
            extends: template.ancestors.clone(),
            mechanisms: mechanisms(template.merged()),
            targets: first.iter().filter(everywhere).cloned().collect(),
            cases: own.into_keys().cloned().collect(),
        }
    };
    Ok(catalogue.templates().iter().map(row).collect())
}

/// The support table for people.
pub fn markdown(rows: &[Row]) -> String {
    let mut text =
        "| model_type | what it is | mechanisms | targets | golden cases |\n|---|---|---|---|---|\n".to_owned();
    let code = |names: &[String]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    for row in rows {
        let cells = [
            code(&row.model_types),
            row.summary.replace('|', "\\|"),
            dash(row.mechanisms.join(", ")),
            dash(code(&row.targets)),
            dash(row.cases.join(", ")),
        ];
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text
}

/// A phrase for a setting; `=` stands for any expression.
const PHRASES: &[(&str, Option<&str>, &str)] = &[
    ("attention.latent", None, "latent attention"),
    ("attention.window", None, "sliding window"),
    ("attention.scale", None, "scaled products"),
    ("attention.bias", Some("true"), "biases on query, key, value"),
    ("attention.output_bias", Some("true"), "bias on the output"),
    ("rope.layout", Some("interleaved"), "interleaved RoPE"),
    ("norm.kind", Some("!rms"), "layer norm"),
    ("norm.offset", Some("true"), "offset norms"),
    ("embedding.scale", None, "scaled embedding"),
    ("mlp.gated", Some("false"), "plain MLP"),
    ("moe.experts", None, "mixture of experts"),
    ("moe.routing.score", Some("sigmoid"), "sigmoid routing"),
    ("moe.routing.groups", None, "grouped routing"),
    ("moe.shared", None, "shared expert"),
];

/// Settings that every architecture has, or that another one's phrase speaks for.
const QUIET: &[&str] = &[
    "attention.heads",
    "attention.kv_heads",
    "attention.head_size",
    "attention.value_size",
    "rope.size",
    "rope.parameters",
    "rope.enabled",
    "norm.eps",
    "mlp.intermediate_size",
    "mlp.activation",
    "mlp.bias",
    "moe.top_k",
    "moe.intermediate_size",
    "moe.activation",
    "moe.gated",
    "moe.routing",
];

/// What a template's tables say it has; a setting without a phrase is named as it is.
pub fn mechanisms(tables: &Table) -> Vec<String> {
    let mut found: Vec<String> = PHRASES
        .iter()
        .filter(|(path, wanted, _)| lookup(tables, path).is_some_and(|value| holds(value, *wanted)))
        .map(|(_, _, phrase)| (*phrase).to_owned())
        .collect();
    for name in ["attention", "rope", "norm", "embedding", "mlp", "moe"] {
        for (key, value) in tables.get(name).and_then(Value::as_table).into_iter().flatten() {
            let path = format!("{name}.{key}");
            let known = QUIET.contains(&path.as_str()) || PHRASES.iter().any(|(known, ..)| *known == path);
            if !known && holds(value, None) {
                found.push(key.replace('_', " "));
            }
        }
    }
    found
}

fn lookup<'t>(tables: &'t Table, path: &str) -> Option<&'t Value> {
    let mut keys = path.split('.');
    let mut value = tables.get(keys.next()?)?;
    for key in keys {
        value = value.as_table()?.get(key)?;
    }
    Some(value)
}

/// True if a value is the wanted one; without one, if it is not off.
fn holds(value: &Value, wanted: Option<&str>) -> bool {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match wanted {
        None => !["false", "=none", "none", "=false"].contains(&text.as_str()),
        Some(wanted) => match wanted.strip_prefix('!') {
            Some(unwanted) => text != unwanted && !text.starts_with('='),
            // An expression that can come to the wanted text counts.
            None => text == wanted || (text.starts_with('=') && text.contains(&format!("'{wanted}'"))),
        },
    }
}
