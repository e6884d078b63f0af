//! Tensor rules: from the names of parameters to the names in a checkpoint.
//!
//! `{layer}` stands for a layer's index, `{expert}` or `{head}` in a checkpoint's name for all of them, stacked,
//! `{beyond}` for an index behind the last layer, `*` at the end for anything, the same on both sides. `{q,k,v}`
//! writes a rule for each of its members, with the member of the same place on the other side. A pattern of `[drop]`
//! may begin with `*` too.

mod drops;

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Value as Toml;

use super::expression::Scope;
use super::limits::{LONGEST_MEMBERS, MOST_MEMBERS};
use super::template::Template;
use crate::error::{Code, Error, Result};
use crate::weight::{Split, Weight};
pub use drops::{Check, Drop};

/// A template's `[tensors]` and `[drop]`, ready to be asked.
#[derive(Debug, Clone)]
pub struct TensorRules {
    rules: Vec<Rule>,
    drops: Vec<Drop>,
    layers: usize,
    /// `base_model_prefix` with its dot.
    base: Option<String>,
}

/// The ways in which a parameter may be stored, first match first, and what they are made of.
#[derive(Debug, Clone)]
pub struct Bound {
    /// Alternatives.
    pub alternatives: Vec<Weight>,
}

/// One member of a pattern of parameter names.
#[derive(Debug, Clone)]
struct Rule {
    parameter: String,
    /// All members of its first group, itself included, for splits.
    siblings: Vec<String>,
    index: usize,
    alternatives: Vec<Recipe>,
}

/// How a parameter is made from tensors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    /// One tensor as it is.
    tensor: Option<String>,
    /// Tensors that are joined along `axis`.
    concat: Option<Vec<String>>,
    /// A tensor that holds all members of the parameter's group along `axis`.
    split: Option<String>,
    /// Blocks of the split.
    groups: Option<usize>,
    /// Axis of `concat` or `split`, after experts are stacked.
    #[serde(default)]
    axis: usize,
    /// Transforms that follow, by name.
    #[serde(default)]
    apply: Vec<Transform>,
}

/// Transforms by the names that templates use.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Transform {
    Transpose,
    AddOne,
    /// To the parameter's shape, before what follows.
    Reshape,
}

impl TensorRules {
    /// The rules of a template for a configuration.
    pub(super) fn new(scope: &Scope, layers: usize, base: Option<String>) -> Result<Self> {
        let template = scope.template();
        let mut rules = Vec::new();
        for (pattern, value) in template.tensors.iter().flatten() {
            let path = format!("tensors.{pattern}");
            let values = match value {
                Toml::Array(values) => values.clone(),
                other => vec![other.clone()],
            };
            let members =
                bounded_members(pattern).map_err(|found| template.error(Code::TemplateInvalid, &path).found(found))?;
            for (index, parameter) in members.iter().enumerate() {
                let recipe = |value: &Toml| recipe(scope, template, &path, value, index, members.len());
                let alternatives = values.iter().map(recipe).collect::<Result<_>>()?;
                rules.push(Rule { parameter: parameter.clone(), siblings: members.clone(), index, alternatives });
            }
        }
        // What names a whole module gives way to what names a parameter, and to what names a smaller module.
        rules.sort_by_key(|rule| rule.parameter.strip_suffix('*').map(|module| Reverse(module.len())));
        let drops = drops::read(template)?;
        Ok(Self { rules, drops, layers, base: base.map(|base| format!("{base}.")) })
    }

    /// How a parameter may be stored. Without a rule it has its own name in the checkpoint.
    pub fn bind(&self, parameter: &str, shapes: &BTreeMap<String, Vec<usize>>) -> Result<Bound> {
        let matched = self.rules.iter().find_map(|rule| self.matches(&rule.parameter, parameter).map(|c| (rule, c)));
        let Some((rule, captures)) = matched else {
            return Ok(Bound { alternatives: vec![Weight::source(parameter)] });
        };
        let alternatives = rule.alternatives.iter().map(|recipe| {
            let sizes = |axis: usize| {
                let size = |sibling: &String| {
                    let name = fill(sibling, &captures);
                    shapes.get(&name).and_then(|shape| shape.get(axis)).copied()
                };
                rule.siblings.iter().map(size).collect::<Option<Vec<usize>>>()
            };
            let shape = shapes.get(parameter).map(Vec::as_slice).unwrap_or_default();
            recipe
                .weight(&captures, shape, rule.index, sizes)
                .map_err(|found| Error::new(Code::TemplateInvalid, format!("tensors.{}", rule.parameter)).found(found))
        });
        Ok(Bound { alternatives: alternatives.collect::<Result<_>>()? })
    }

    /// The names under which a checkpoint may hold a tensor: with the base model's prefix, or without it where it was
    /// saved without its head. The model's own code takes each tensor either way.
    pub fn spellings(&self, tensor: &str) -> Vec<String> {
        let mut names = vec![tensor.to_owned()];
        if let Some(base) = &self.base {
            names.extend(tensor.strip_prefix(base).map(str::to_owned));
            names.push(format!("{base}{tensor}"));
        }
        names
    }

    /// The first way to store a parameter of which everything `is_there`, in the spelling that is there.
    pub fn stored(
        &self,
        parameter: &str,
        shapes: &BTreeMap<String, Vec<usize>>,
        is_there: &dyn Fn(&str) -> bool,
    ) -> Result<Option<Weight>> {
        let mut spelled =
            |name: &str| self.spellings(name).into_iter().find(|name| is_there(name)).map(Weight::Source).ok_or(());
        let alternatives = self.bind(parameter, shapes)?.alternatives;
        Ok(alternatives.iter().find_map(|weight| weight.substitute(&mut spelled).ok()))
    }

    /// The rule by which a tensor that nothing takes may be left out.
    pub fn drop_rule(&self, tensor: &str) -> Option<&Drop> {
        let names = self.spellings(tensor);
        let fits = |pattern: &str| match pattern.strip_prefix('*') {
            // Anything, then a name.
            Some(rest) if !rest.is_empty() => {
                names.iter().any(|name| name.char_indices().any(|(at, _)| self.ends(rest, name.get(at..))))
            }
            _ => names.iter().any(|name| self.matches(pattern, name).is_some()),
        };
        self.drops.iter().find(|rule| fits(&rule.pattern))
    }

    fn ends(&self, pattern: &str, name: Option<&str>) -> bool {
        name.is_some_and(|name| self.matches(pattern, name).is_some())
    }

    /// What the placeholders of a pattern stand for in a name, if it fits.
    fn matches(&self, pattern: &str, name: &str) -> Option<BTreeMap<String, String>> {
        let mut captures = BTreeMap::new();
        matches(pattern, name, &mut captures).then_some(())?;
        let index = |key: &str| captures.get(key).map(|text| text.parse::<usize>().ok());
        let fits = match (index("layer"), index("beyond")) {
            (Some(layer), _) => layer.is_some_and(|layer| layer < self.layers),
            (None, Some(beyond)) => beyond.is_some_and(|beyond| beyond >= self.layers),
            (None, None) => true,
        };
        fits.then_some(captures)
    }
}

impl Recipe {
    /// Where the axis of a split ends up in the parameter.
    fn parameter_axis(&self, rank: usize) -> usize {
        let places: Vec<usize> = (0..rank).collect();
        before(&self.apply, &places).get(self.axis).copied().unwrap_or(self.axis)
    }

    fn weight(
        &self,
        captures: &BTreeMap<String, String>,
        shape: &[usize],
        index: usize,
        sizes: impl Fn(usize) -> Option<Vec<usize>>,
    ) -> std::result::Result<Weight, String> {
        let experts = shape.first().copied().unwrap_or(0);
        // A name with {expert} or {head} stands for one tensor per expert or head, stacked.
        let source = |name: &String| {
            let name = fill(name, captures);
            let Some(many) = ["{expert}", "{head}"].into_iter().find(|many| name.contains(many)) else {
                return Weight::Source(name);
            };
            let each = |index: usize| Weight::Source(name.replace(many, &index.to_string()));
            Weight::Stack((0..experts).map(each).collect())
        };
        let mut weight = match (&self.tensor, &self.concat, &self.split) {
            (Some(name), None, None) => source(name),
            (None, Some(names), None) => Weight::Concat(self.axis, names.iter().map(source).collect()),
            (None, None, Some(name)) => {
                let sizes = sizes(self.parameter_axis(shape.len()))
                    .ok_or("a split between parameters that this model does not have")?;
                let split = Split { axis: self.axis, groups: self.groups.unwrap_or(1), sizes, index };
                Weight::Split(split, Box::new(source(name)))
            }
            _ => return Err("one of tensor, concat and split is wanted".to_owned()),
        };
        for (i, transform) in self.apply.iter().enumerate() {
            let rest = self.apply.get(i + 1..).unwrap_or_default();
            weight = match transform {
                Transform::Reshape => Weight::Reshape(before(rest, shape), Box::new(weight)),
                Transform::Transpose => Weight::Transpose(Box::new(weight)),
                Transform::AddOne => Weight::AddOne(Box::new(weight)),
            };
        }
        Ok(weight)
    }
}

/// The shape that transforms turn into another.
fn before(transforms: &[Transform], shape: &[usize]) -> Vec<usize> {
    let mut shape = shape.to_vec();
    let turns = transforms.iter().filter(|transform| matches!(transform, Transform::Transpose)).count();
    if let ([.., rows, columns], 1) = (shape.as_mut_slice(), turns % 2) {
        std::mem::swap(rows, columns);
    }
    shape
}

fn recipe(scope: &Scope, template: &Template, path: &str, value: &Toml, index: usize, count: usize) -> Result<Recipe> {
    let value = scope.evaluate(path, value)?;
    let mut recipe: Recipe = match value {
        serde_json::Value::String(name) => {
            Recipe { tensor: Some(name), concat: None, split: None, groups: None, axis: 0, apply: Vec::new() }
        }
        other => serde_json::from_value(other).map_err(|e| template.error(Code::TemplateInvalid, path).found(e))?,
    };
    let names = recipe.tensor.iter_mut().chain(recipe.concat.iter_mut().flatten()).chain(recipe.split.iter_mut());
    for name in names {
        let options =
            bounded_members(name).map_err(|found| template.error(Code::TemplateInvalid, path).found(found))?;
        let chosen =
            if options.len() == count { options.get(index) } else { options.first().filter(|_| options.len() == 1) };
        *name = chosen.cloned().ok_or_else(|| {
            template
                .error(Code::TemplateInvalid, path)
                .found(format!("{} names in {name} for {count} parameters", options.len()))
        })?;
    }
    Ok(recipe)
}

/// [`members`], refused where braces multiply: each comma can double what there is.
fn bounded_members(pattern: &str) -> std::result::Result<Vec<String>, String> {
    let choices = pattern.split('{').map(|group| group.matches(',').count() + 1);
    let most = choices.fold(1_usize, usize::saturating_mul);
    let length = most.saturating_mul(pattern.len());
    if most > MOST_MEMBERS || length > LONGEST_MEMBERS {
        return Err(format!(
            "a pattern of {most} names, {length} bytes; at most {MOST_MEMBERS} of {LONGEST_MEMBERS} are read"
        ));
    }
    Ok(members(pattern))
}

/// `a.{x,y}.b` -> `a.x.b`, `a.y.b`; placeholders such as `{layer}` are kept.
fn members(pattern: &str) -> Vec<String> {
    let groups = pattern.match_indices('{').filter_map(|(start, _)| {
        let end = start + pattern.get(start..)?.find('}')?;
        let inner = pattern.get(start + 1..end)?;
        inner.contains(',').then_some((start, end, inner))
    });
    let Some((start, end, inner)) = groups.into_iter().next() else {
        return vec![pattern.to_owned()];
    };
    let (before, after) = (pattern.get(..start).unwrap_or_default(), pattern.get(end + 1..).unwrap_or_default());
    inner.split(',').flat_map(|member| members(&format!("{before}{}{after}", member.trim()))).collect()
}

fn fill(pattern: &str, captures: &BTreeMap<String, String>) -> String {
    captures.iter().fold(pattern.to_owned(), |name, (key, value)| match key.as_str() {
        "*" => name.replace('*', value),
        key => name.replace(&format!("{{{key}}}"), value),
    })
}

fn matches(pattern: &str, name: &str, captures: &mut BTreeMap<String, String>) -> bool {
    let special = pattern.find(['{', '*']);
    let Some(at) = special else { return pattern == name };
    let (literal, rest) = pattern.split_at(at);
    let Some(name) = name.strip_prefix(literal) else { return false };
    if rest.starts_with('*') {
        captures.insert("*".to_owned(), name.to_owned());
        return true;
    }
    let Some((key, rest)) = rest.get(1..).and_then(|rest| rest.split_once('}')) else { return false };
    let digits = name.len() - name.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    if digits == 0 {
        return false;
    }
    let (value, name) = name.split_at(digits);
    captures.insert(key.to_owned(), value.to_owned());
    matches(rest, name, captures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let mut captures = BTreeMap::new();
        assert!(matches("a.{layer}.b.{expert}.c", "a.12.b.3.c", &mut captures));
        assert_eq!(captures["layer"], "12");
        assert_eq!(captures["expert"], "3");
        assert!(!matches("a.{layer}.b", "a.x.b", &mut BTreeMap::new()));
        assert!(matches("a.{beyond}.*", "a.61.anything.at.all", &mut BTreeMap::new()));
        assert_eq!(members("m.{q,k}_proj.{layer}"), ["m.q_proj.{layer}", "m.k_proj.{layer}"]);
        assert_eq!(members("plain.{layer}"), ["plain.{layer}"]);
    }

    #[test]
    fn braces_that_multiply_are_refused() {
        assert_eq!(bounded_members("m.{q,k,v}.{weight,bias}").expect("six").len(), 6);
        for pattern in
            ["{a,b}".repeat(40), format!("{{{}}}", ",".repeat(1000)), format!("{{a,b}}{}", "x".repeat(40_000))]
        {
            assert!(bounded_members(&pattern).expect_err("too many").contains("at most"));
        }
    }

    fn rules(parameter: &str, recipe: Recipe) -> TensorRules {
        let siblings = members(parameter);
        let parameter = siblings[0].clone();
        let rule = Rule { parameter, siblings, index: 0, alternatives: vec![recipe] };
        TensorRules { rules: vec![rule], drops: Vec::new(), layers: 2, base: Some("transformer.".to_owned()) }
    }

    fn recipe_of(value: serde_json::Value) -> Recipe {
        serde_json::from_value(value).expect("a recipe")
    }

    #[test]
    fn a_module_at_once_with_its_prefix_or_without_or_twice() {
        let recipe = recipe_of(serde_json::json!({ "tensor": "transformer.h.{layer}.*" }));
        let rules = rules("model.layers.{layer}.*", recipe);
        for there in ["transformer.h.1.ln_1.bias", "h.1.ln_1.bias", "transformer.transformer.h.1.ln_1.bias"] {
            let stored = rules.stored("model.layers.1.ln_1.bias", &BTreeMap::new(), &|name| name == there);
            assert_eq!(stored.expect("a rule"), Some(Weight::source(there)));
        }
        assert_eq!(rules.stored("model.layers.1.ln_1.bias", &BTreeMap::new(), &|_| false).expect("a rule"), None);
    }

    #[test]
    fn each_tensor_has_its_own_spelling() {
        let recipe = recipe_of(serde_json::json!({ "concat": ["transformer.a", "transformer.b"] }));
        let there = |name: &str| ["a", "transformer.b"].contains(&name);
        let stored = rules("ab", recipe).stored("ab", &BTreeMap::new(), &there).expect("a rule");
        assert_eq!(stored.expect("both are there").to_string(), "concat(a, transformer.b, axis 0)");
    }

    #[test]
    fn what_is_dropped_under_any_prefix() {
        let mut rules = rules("a", recipe_of(serde_json::json!({ "tensor": "b" })));
        let rule = |pattern: &str| Drop { pattern: pattern.to_owned(), reason: String::new(), check: None };
        rules.drops = vec![rule("*.inv_freq"), rule("*mtp.*"), rule("transformer.h.{layer}.attn.bias")];
        for (name, dropped) in [
            ("model.layers.9.rotary_emb.inv_freq", true),
            ("x.inv_freq", true),
            ("inv_freq", true),
            ("inv_freqs", false),
            ("model.mtp.layers.0.x", true),
            ("mtp.x", true),
            ("mtpx", false),
            ("h.1.attn.bias", true),
            ("transformer.h.1.attn.bias", true),
            ("h.2.attn.bias", false),
        ] {
            assert_eq!(rules.drop_rule(name).is_some(), dropped, "{name}");
        }
    }

    #[test]
    fn a_split_that_is_transposed_counts_the_other_axis() {
        let recipe = recipe_of(serde_json::json!({ "split": "qkv", "axis": 1, "apply": ["transpose"] }));
        let shapes = ["q", "k"].map(|name| (name.to_owned(), vec![if name == "q" { 6 } else { 2 }, 3])).into();
        let bound = rules("{q,k}", recipe).bind("q", &shapes).expect("a rule");
        assert_eq!(bound.alternatives[0].to_string(), "transpose(split(qkv, part 0 of [6, 2]))");
    }
}
