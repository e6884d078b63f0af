//! `[drop]`: tensors that no parameter takes, why they may be left out, and how that reason is checked.

use serde::Deserialize;
use toml::Value as Toml;

use super::super::template::Template;
use crate::error::{Code, Result};

/// A rule of `[drop]`.
#[derive(Debug, Clone)]
pub struct Drop {
    pub(super) pattern: String,
    /// Why the tensor has no part in the computation.
    pub reason: String,
    /// What has to hold of the tensor; none where the model's own code ignores it by its name.
    pub check: Option<Check>,
}

/// How a reason is checked before a tensor is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Rotary frequencies: those of the configuration, or the ones that it scales.
    InvFreq,
    /// Ones where a query sees a key, within its layer's window, and zeros elsewhere.
    CausalMask,
    /// A number so low that softmax makes 0 of it.
    MaskedBias,
    /// 0, 1, 2, ...
    PositionIds,
    /// The table of sines and cosines that the graph computes.
    Sinusoids,
    /// A tensor of a layer for speculation, which has a projection that no other layer has.
    Speculation,
    /// Keys or values of a layer that reads another's cache.
    SharedCache,
    /// A matrix of an expert that hands its input on.
    IdentityExpert,
    /// A scale of a quantised checkpoint, or one that is 1.
    Scale,
}

/// A rule as a template writes it: a reason alone, or with its check.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Checked {
    reason: String,
    check: Check,
}

/// The rules of a template.
pub(super) fn read(template: &Template) -> Result<Vec<Drop>> {
    let rules = template.table("drop").into_iter().flatten();
    let mut rules = rules.map(|(pattern, value)| rule(template, pattern, value)).collect::<Result<Vec<_>>>()?;
    // What names a tensor goes before what names any that ends so.
    rules.sort_by_key(|rule| rule.pattern.starts_with('*'));
    Ok(rules)
}

fn rule(template: &Template, pattern: &str, value: &Toml) -> Result<Drop> {
    let pattern = pattern.to_owned();
    if let Toml::String(reason) = value {
        return Ok(Drop { pattern, reason: reason.clone(), check: None });
    }
    let Checked { reason, check } = value.clone().try_into().map_err(|error: toml::de::Error| {
        template
            .error(Code::TemplateInvalid, &format!("drop.{pattern}"))
            .found(error.message())
            .expected("a reason, or { reason = \"...\", check = \"...\" }")
            .help("mend the rule; a reason alone is for what the model's own code ignores by name")
    })?;
    Ok(Drop { pattern, reason, check: Some(check) })
}
