//! Tensors that no parameter takes: dropped for a reason that was checked, or an error that names all of them.

use std::collections::{BTreeMap, BTreeSet};

use super::buffers::contradiction;
use super::head::Head;
use super::values::all;
use crate::describe::TensorRules;
use crate::error::{Code, Error, Result};
use crate::patterns::Patterns;
use crate::read::{Checkpoint, TensorInfo};
use crate::spec::ModelSpec;

/// Patterns of names that an error lists; a model has some ten.
const LISTED: usize = 40;

/// What decides over tensors that no parameter takes.
#[derive(Debug, Clone, Copy)]
pub struct Rest<'r> {
    /// The template's rules.
    pub rules: &'r TensorRules,
    /// What the model computes, for buffers that say it again.
    pub spec: &'r ModelSpec,
    /// What the checkpoint holds of a tied head.
    pub head: &'r Head,
    /// Names and patterns that the user allows.
    pub allowed: &'r [String],
}

/// Why each tensor that is not `used` is left out.
pub(super) fn left_over(
    used: &BTreeSet<&str>,
    rest: Rest<'_>,
    checkpoint: &Checkpoint,
) -> Result<BTreeMap<String, String>> {
    let allowed = Patterns::new("--allow-unused-tensor", rest.allowed)?;
    let mut dropped = BTreeMap::new();
    let mut unexpected = Vec::new();
    for tensor in checkpoint.tensors().filter(|tensor| !used.contains(tensor.name.as_str())) {
        if allowed.admits(&tensor.name) {
            dropped.insert(tensor.name.clone(), "allowed by the user".to_owned());
            continue;
        }
        match judge(tensor, used, rest, checkpoint)? {
            Ok(reason) => drop(dropped.insert(tensor.name.clone(), reason)),
            Err(why) => unexpected.push((tensor.name.as_str(), why)),
        }
    }
    let ignored = checkpoint.catalogue().map_or(&[][..], |catalogue| &catalogue.ignored);
    dropped.extend(ignored.iter().map(|tensor| (tensor.name.clone(), tensor.reason.to_owned())));
    if unexpected.is_empty() { Ok(dropped) } else { Err(refusal(&unexpected)) }
}

/// Why a tensor is left out, or what speaks against it; nothing where nobody knows it.
fn judge(
    tensor: &TensorInfo,
    used: &BTreeSet<&str>,
    rest: Rest<'_>,
    checkpoint: &Checkpoint,
) -> Result<Result<String, Option<String>>> {
    if let Head::Again(names) = rest.head
        && names.contains(&tensor.name)
    {
        return Ok(Ok("tied to the embedding, whose values it has".to_owned()));
    }
    if let Some(rule) = rest.rules.drop_rule(&tensor.name) {
        let against = match rule.check {
            Some(check) => contradiction(check, tensor, rest.spec, checkpoint)?,
            None => None,
        };
        return Ok(against.map_or_else(|| Ok(rule.reason.clone()), |against| Err(Some(against))));
    }
    // Exporters of quantised weights gave every product a bias.
    let of_used =
        tensor.name.strip_suffix(".bias").is_some_and(|module| used.contains(format!("{module}.weight").as_str()));
    if !of_used {
        return Ok(Err(None));
    }
    Ok(match all(tensor, checkpoint, |_, value| value == 0.0)? {
        Some(true) => Ok("a bias of zeros".to_owned()),
        _ => Err(Some("a bias that is not zero, of a product that has none in this architecture".to_owned())),
    })
}

/// One error for all of them, with one line to paste.
fn refusal(unexpected: &[(&str, Option<String>)]) -> Error {
    // Names that differ in numbers alone, and in what speaks against them, are one pattern.
    let mut patterns: BTreeMap<(String, &Option<String>), Vec<&str>> = BTreeMap::new();
    for (name, why) in unexpected {
        patterns.entry((pattern(name), why)).or_default().push(name);
    }
    let mut listed = Vec::new();
    let mut flags = BTreeSet::new();
    for ((pattern, why), names) in patterns.iter().take(LISTED) {
        let shown = if let [only] = names.as_slice() { (*only).to_owned() } else { pattern.clone() };
        let count = if names.len() > 1 { format!(" ({} tensors)", names.len()) } else { String::new() };
        let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        listed.push(format!("{shown}{count}{why}"));
        flags.insert(format!("--allow-unused-tensor '{}'", pasted(&shown)));
    }
    if patterns.len() > LISTED {
        listed.push(format!("and {} more patterns of names", patterns.len() - LISTED));
    }
    let first = unexpected.first().map_or("", |(name, _)| name);
    let more = if unexpected.len() > 1 { format!(" and {} more", unexpected.len() - 1) } else { String::new() };
    Error::new(Code::TensorUnexpected, format!("tensor {first}{more}"))
        .found(listed.join("; "))
        .expected("tensors that a parameter takes or that a rule drops for a reason that holds")
        .help(format!(
            "if they do not change the computation, pass {}",
            flags.into_iter().collect::<Vec<_>>().join(" ")
        ))
}

/// A pattern that a shell and a glob take as it is: `?` for what means something to one of them.
fn pasted(pattern: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '*' | ' ' | ':' | '/' | '+');
    pattern.chars().map(|c| if plain(c) { c } else { '?' }).collect()
}

/// A name with `*` for each number in it.
fn pattern(name: &str) -> String {
    let parts = name.split('.').map(|part| {
        let number = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if number { "*" } else { part }
    });
    parts.collect::<Vec<_>>().join(".")
}
