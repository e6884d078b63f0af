//! Recipes: which matrices of a model are quantised, and how.
//!
//! A recipe is a name, such as `int4` or `q4-mixed`, and rules for single matrices, of which the last that matches
//! wins. Routers, norms, biases and everything that is computed in full precision stay floats.
//!
//! Without a recipe, the integers of a quantised checkpoint are kept: that is the recipe `stored`. `float` is the one
//! that keeps none.

mod stored;

use std::collections::{BTreeMap, BTreeSet};

use globset::{GlobBuilder, GlobMatcher};
use serde::Serialize;

use crate::bind::{Parameter, Plan};
use crate::build::{Composite, Kind, Model};
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Graph, Source};
use crate::lower::{Note, Part, Precision};
use crate::quantize::{Algorithm, ScaleType, Scheme};
pub use stored::Stored;

/// How the matrices of a model are quantised.
#[derive(Debug, Clone)]
pub struct Recipe {
    name: String,
    rules: Vec<Rule>,
    /// What the user asked for.
    accuracy_level: Option<i64>,
}

/// One line of a recipe: matrices of these names, as this; as they are without a scheme.
#[derive(Debug, Clone)]
struct Rule {
    pattern: String,
    matcher: GlobMatcher,
    scheme: Option<Scheme>,
}

/// What a user may change of a recipe.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Columns of a block.
    pub block_size: Option<usize>,
    /// Without zero points, or with them.
    pub symmetric: Option<bool>,
    /// How scales are found.
    pub algorithm: Option<Algorithm>,
    /// How scales are stored.
    pub scales: Option<ScaleType>,
    /// `accuracy_level` of `MatMulNBits` and `QMoE`.
    pub accuracy_level: Option<i64>,
    /// `PATTERN=SCHEME`, in order.
    pub rules: Vec<String>,
}

/// Pattern, bits, symmetric, block.
type Line = (&'static str, u8, bool, usize);

/// The names that `--quant` takes, with what they mean.
const RECIPES: [(&str, &[Line]); 7] = [
    (STORED, &[]),
    ("float", &[]),
    ("int2", &[("*", 2, false, 32), ("{embed_tokens*,lm_head}", 4, true, 32)]),
    ("int4", &[("*", 4, true, 32)]),
    ("int8", &[("*", 8, true, 32)]),
    // Large blocks are what decodes fastest: nearly all the time goes into reading weights.
    ("q4", &[("*", 4, false, 256)]),
    // The head decides every token, and as a tied table it is also what every token starts from.
    ("q4-mixed", &[("*", 4, false, 64), ("{embed_tokens*,lm_head}", 8, true, 64)]),
];

/// The recipe that keeps what a quantised checkpoint holds.
const STORED: &str = "stored";

impl Default for Recipe {
    /// What is done without being asked: `stored`.
    fn default() -> Self {
        Self { name: STORED.to_owned(), rules: Vec::new(), accuracy_level: None }
    }
}

/// 8-bit activations in products: the kernels that are fast on CPUs, twice as fast as the others for one token.
const ACCURACY: i64 = 4;
/// Float activations in experts, as the operator computes without the attribute, which releases before 1.31 refuse. 8-bit
/// ones take 0.7 to 0.8 of the time for up to 64 tokens and as much for more, and are off by 1e-2 of the largest output.
const EXPERTS_ACCURACY: i64 = 0;

impl Recipe {
    /// The names of all recipes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        RECIPES.iter().map(|(name, _)| *name)
    }

    /// A recipe by its name, with a user's changes.
    pub fn new(name: &str, changes: &Changes) -> Result<Self> {
        let invalid = |found: String| {
            let names: Vec<&str> = Self::names().collect();
            Error::new(Code::UsageInvalid, "--quant").found(found).expected(format!("one of {}", names.join(", ")))
        };
        let (_, lines) = RECIPES.iter().find(|(known, _)| *known == name).ok_or_else(|| invalid(name.to_owned()))?;
        let changed = changes.block_size.is_some() || changes.symmetric.is_some();
        if lines.is_empty() && (changed || changes.algorithm.is_some() || changes.scales.is_some()) {
            return Err(Error::new(Code::UsageInvalid, "--quant")
                .found(format!("{name}, which rounds nothing, beside options that say how to round"))
                .expected("such options beside int8, int4, int2, q4 or q4-mixed")
                .help("leave them away, or choose another scheme"));
        }
        let mut rules = Vec::new();
        for (pattern, bits, symmetric, block) in *lines {
            let algorithm = changes.algorithm.unwrap_or(default_algorithm(*bits));
            let (block, symmetric) = (changes.block_size.unwrap_or(*block), changes.symmetric.unwrap_or(*symmetric));
            let scheme = Scheme::new(*bits, symmetric, block, algorithm).map_err(invalid)?;
            let scheme = scheme.with_scales(changes.scales.unwrap_or(ScaleType::Float32));
            rules.push(Rule { pattern: (*pattern).to_owned(), matcher: glob(pattern)?, scheme: Some(scheme) });
        }
        for line in &changes.rules {
            let (pattern, words) = line.rsplit_once('=').ok_or_else(|| bad_rule(line, "no `=`"))?;
            let usual = rules.first().and_then(|rule| rule.scheme);
            let scheme = parse_scheme(words, usual, changes).map_err(|reason| bad_rule(line, &reason))?;
            rules.push(Rule { pattern: pattern.to_owned(), matcher: glob(pattern)?, scheme });
        }
        let accuracy_level = changes.accuracy_level;
        if let Some(odd) = accuracy_level.filter(|level| !(0..=4).contains(level)) {
            return Err(Error::new(Code::UsageInvalid, "--accuracy-level").found(odd).expected("0 to 4"));
        }
        Ok(Self { name: name.to_owned(), rules, accuracy_level })
    }

    /// Whether it keeps what a quantised checkpoint holds.
    pub fn is_stored(&self) -> bool {
        self.name == STORED
    }

    /// Whether it rounds matrices that are floats.
    pub fn quantises(&self) -> bool {
        self.rules.iter().any(|rule| rule.scheme.is_some())
    }

    /// The matrices of a model that this recipe quantises, or leaves quantised as `stored` says.
    pub fn precision(&self, model: &Graph<Model>, stored: Option<&Stored>) -> Precision {
        let names = matrices(model);
        let layers = names.iter().filter_map(|name| layer(name)).map(|(_, index, _)| index + 1).max().unwrap_or(0);
        let mut precision = Precision {
            accuracy_level: self.accuracy_level.unwrap_or(ACCURACY),
            experts_accuracy_level: self.accuracy_level.unwrap_or(EXPERTS_ACCURACY),
            ..Precision::default()
        };
        for name in names {
            let scheme = match (self.rule(&name, layers), stored.filter(|_| self.is_stored())) {
                (Some(rule), _) => rule.scheme,
                (None, Some(stored)) => {
                    let order = stored.orders.get(&name).cloned();
                    precision.orders.extend(order.map(|order| (name.clone(), order)));
                    stored.schemes.get(&name).copied()
                }
                (None, None) => None,
            };
            precision.schemes.extend(scheme.map(|scheme| (name, scheme)));
        }
        precision
    }

    /// The last rule that matches one of a parameter's spellings.
    fn rule(&self, name: &str, layers: usize) -> Option<&Rule> {
        let spellings = spellings(name, layers);
        let matches = |rule: &&Rule| spellings.iter().any(|spelling| rule.matcher.is_match(spelling));
        self.rules.iter().rfind(matches)
    }

    /// An error if nothing was quantised: then the target can not do what was asked for.
    pub fn check(&self, plan: &Plan, notes: &[Note], target: &str) -> Result<()> {
        if !self.quantises() || plan.initializers.iter().any(|initializer| initializer.quantized.is_some()) {
            return Ok(());
        }
        let reasons: BTreeSet<&str> = notes.iter().map(|note| note.reason.as_str()).collect();
        let reasons: Vec<&str> = reasons.into_iter().collect();
        Err(Error::new(Code::UsageInvalid, format!("--quant {} on target {target}", self.name))
            .found(format!("no matrix could be quantised: {}", reasons.join("; ")))
            .expected("a scheme that the target's operators read")
            .help("choose another scheme, another --block-size, or --target ort-cpu"))
    }

    /// What `hf2onnx.json` says of it.
    /// `refused` says why operators did not take a parameter's integers.
    pub fn record(&self, plan: &Plan, stored: Option<&Stored>, refused: &BTreeMap<String, String>) -> Quantization {
        let mut matrices: BTreeMap<String, Counted> = BTreeMap::new();
        let mut kept = BTreeSet::new();
        let mut suffixes: BTreeMap<u8, u64> = BTreeMap::new();
        for initializer in &plan.initializers {
            if let Some((scheme, Part::Data | Part::SignedData)) = initializer.quantized {
                let counted = matrices.entry(scheme.to_string()).or_default();
                // Matrices that are read as one were some.
                counted.matrices += initializer.weight.sources().len();
                counted.bytes += initializer.bytes();
                *suffixes.entry(scheme.bits()).or_default() += initializer.bytes();
                if scheme.algorithm() == Algorithm::Stored {
                    kept.extend(initializer.weight.sources());
                }
            }
        }
        let is_kept = |parameter: &Parameter| parameter.weight.sources().iter().all(|name| kept.contains(name));
        let checkpoint = stored.map(|stored| {
            let mut decoded = stored.refused.clone();
            let lost = plan.parameters.iter().filter(|p| stored.schemes.contains_key(&p.name) && !is_kept(p));
            decoded.extend(lost.map(|p| (p.name.clone(), self.reason(refused.get(&p.name)))));
            let folded = plan.parameters.iter().filter(|p| stored.folded.contains(&p.name) && is_kept(p));
            let exact = (!kept.is_empty()).then(|| folded.count() == 0);
            let reordered = plan.parameters.iter().filter(|p| stored.orders.contains_key(&p.name) && is_kept(p));
            let reordered = reordered.map(|p| p.name.clone()).collect();
            FromCheckpoint { method: stored.method.clone(), exact, reordered, decoded }
        });
        let rule = |rule: &Rule| {
            let scheme = rule.scheme.map_or("float".to_owned(), |scheme| scheme.to_string());
            format!("{}: {scheme}", rule.pattern)
        };
        let most = || suffixes.iter().max_by_key(|(_, bytes)| **bytes).map(|(bits, _)| *bits);
        let bits = self.rules.first().and_then(|rule| rule.scheme).map(|scheme| scheme.bits());
        let bits = if self.is_stored() { most() } else { bits };
        Quantization {
            scheme: self.name.clone(),
            rules: self.rules.iter().map(rule).collect(),
            accuracy_level: self.accuracy_level.unwrap_or(ACCURACY),
            experts_accuracy_level: self.accuracy_level.unwrap_or(EXPERTS_ACCURACY),
            matrices,
            checkpoint,
            suffix: match bits {
                None => "",
                Some(8) => "_int8",
                Some(2) => "_q2",
                Some(_) => "_q4",
            },
            calibration: None,
        }
    }

    /// Why integers that fit were decoded nevertheless.
    fn reason(&self, refused: Option<&String>) -> String {
        match refused {
            _ if !self.is_stored() => format!("--quant {} asks for it", self.name),
            Some(reason) => reason.clone(),
            None => "the target has no form that reads them, or a rule asks for another".to_owned(),
        }
    }
}

/// What was quantised.
#[derive(Debug, Clone, Serialize)]
pub struct Quantization {
    /// The recipe.
    pub scheme: String,
    /// Its rules, of which the last that matches wins.
    pub rules: Vec<String>,
    /// `accuracy_level` of the products.
    pub accuracy_level: i64,
    /// `accuracy_level` of the experts.
    pub experts_accuracy_level: i64,
    /// How many matrices became what.
    pub matrices: BTreeMap<String, Counted>,
    /// What became of the checkpoint's own quantisation, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<FromCheckpoint>,
    /// What consumers call such a model: the suffix of its file.
    #[serde(skip)]
    pub suffix: &'static str,
    /// What was known of the inputs of matrices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibrated>,
}

/// What became of a checkpoint's own quantisation.
#[derive(Debug, Clone, Serialize)]
pub struct FromCheckpoint {
    /// The method, as the checkpoint names it.
    pub method: String,
    /// True if all integers, scales and zero points that were kept are the checkpoint's own, bit for bit; none if none
    /// were kept.
    pub exact: Option<bool>,
    /// Of what was kept, parameters whose columns stand in the order of their groups (act-order): the graph gathers
    /// their inputs in that order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reordered: Vec<String>,
    /// Quantised parameters that were decoded to floats, and why.
    pub decoded: BTreeMap<String, String>,
}

/// The text that a model read to show the inputs of its matrices, or what it caches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Calibrated {
    /// What was made of it: `gptq` weighs errors of matrices, `largest magnitude` gives scales of caches.
    pub method: &'static str,
    /// Hash of the text's file.
    pub sha256: String,
    /// Tokens of it that were read.
    pub tokens: usize,
    /// Tokens that were read at a time.
    pub window: usize,
}

/// Matrices of one scheme.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Counted {
    /// How many.
    pub matrices: usize,
    /// Bytes of their integers.
    pub bytes: u64,
}

/// Eight bits are fine enough for the plain grid.
fn default_algorithm(bits: u8) -> Algorithm {
    if bits == 8 { Algorithm::Nearest } else { Algorithm::Search }
}

fn bad_rule(line: &str, reason: &str) -> Error {
    Error::new(Code::UsageInvalid, "--quant-rule")
        .found(format!("`{line}`: {reason}"))
        .expected("PATTERN=SCHEME, such as lm_head=int8, layers.{0,-1}.*=int8-asym:64 or *.down_proj=float")
}

/// `float`, `int8`, `int4-asym`, `int4-sym:64`. What is not said is as in the usual scheme.
fn parse_scheme(words: &str, usual: Option<Scheme>, changes: &Changes) -> Result<Option<Scheme>, String> {
    if words == "float" {
        return Ok(None);
    }
    let (words, block) = match words.split_once(':') {
        Some((words, block)) => (words, block.parse().map_err(|_| format!("`{block}` is no block size"))?),
        None => (words, usual.map_or(32, |scheme| scheme.block_size())),
    };
    let (bits, symmetry) = words.split_once('-').unwrap_or((words, ""));
    let symmetric = match symmetry {
        "" => usual.is_none_or(|scheme| scheme.is_symmetric()),
        "sym" => true,
        "asym" => false,
        other => return Err(format!("`{other}` is neither sym nor asym")),
    };
    let bits = match bits {
        "int2" => 2,
        "int4" => 4,
        "int8" => 8,
        other => return Err(format!("`{other}` is none of int2, int4, int8 and float")),
    };
    let scheme = Scheme::new(bits, symmetric, block, changes.algorithm.unwrap_or(default_algorithm(bits)))?;
    Ok(Some(scheme.with_scales(changes.scales.unwrap_or(ScaleType::Float32))))
}

fn glob(pattern: &str) -> Result<GlobMatcher> {
    let glob = GlobBuilder::new(pattern).literal_separator(false).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|error| bad_rule(pattern, &error.to_string()))
}

/// Names of the matrices that products, tables and experts read, and that are computed in the usual precision.
fn matrices(model: &Graph<Model>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for node in &model.nodes {
        let operands: Vec<_> = match node.op {
            Composite::Linear | Composite::Embed => node.inputs.iter().skip(1).take(1).flatten().collect(),
            Composite::Moe(_) => node.inputs.iter().flatten().collect(),
            _ => continue,
        };
        for id in operands {
            let value = model.value(*id);
            let shape: Vec<i64> = value.ty.shape.iter().filter_map(Dim::value).collect();
            // One row is a gate for the whole layer: small, and it decides much.
            let matrix = shape.len() >= 2 && shape.iter().rev().nth(1).is_some_and(|rows| *rows > 1);
            if matrix && value.ty.element == Kind::Real && matches!(value.source, Source::Literal(_)) {
                names.insert(value.name.clone());
            }
        }
    }
    names
}

/// `model.layers.3.mlp.up_proj.weight` in its parts around the index.
fn layer(name: &str) -> Option<(&str, usize, &str)> {
    let (before, rest) = name.split_once("layers.")?;
    let (index, after) = rest.split_once('.')?;
    Some((before, index.parse().ok()?, after))
}

/// The ways to name a parameter: with and without `model.` and `.weight`, layers counted from either end.
fn spellings(name: &str, layers: usize) -> Vec<String> {
    let mut all = vec![name.to_owned()];
    if let Some((before, index, after)) = layer(name).filter(|(_, index, _)| *index < layers) {
        all.push(format!("{before}layers.-{}.{after}", layers - index));
    }
    let shorter = |names: &[String], cut: &dyn Fn(&str) -> Option<String>| -> Vec<String> {
        names.iter().filter_map(|name| cut(name)).collect()
    };
    all.extend(shorter(&all.clone(), &|name| name.strip_prefix("model.").map(str::to_owned)));
    all.extend(shorter(&all.clone(), &|name| name.strip_suffix(".weight").map(str::to_owned)));
    all
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn bits(recipe: &Recipe, name: &str) -> Option<(u8, bool, usize)> {
        recipe.rule(name, 4)?.scheme.map(|scheme| (scheme.bits(), scheme.is_symmetric(), scheme.block_size()))
    }

    #[test]
    fn the_last_rule_that_matches_wins() {
        let rules = ["layers.{0,-1}.*=int8", "*.down_proj=float", "model.layers.2.mlp.up_proj.weight=int2-asym:16"];
        let changes = Changes { rules: rules.map(str::to_owned).into(), ..Changes::default() };
        let recipe = Recipe::new("q4", &changes).unwrap();
        assert_eq!(bits(&recipe, "model.layers.1.mlp.up_proj.weight"), Some((4, false, 256)));
        assert_eq!(bits(&recipe, "model.layers.0.mlp.up_proj.weight"), Some((8, false, 256)));
        assert_eq!(
            bits(&recipe, "model.layers.3.self_attn.q_proj.weight"),
            Some((8, false, 256)),
            "counted from the end"
        );
        assert_eq!(bits(&recipe, "model.layers.3.mlp.down_proj.weight"), None);
        assert_eq!(bits(&recipe, "model.layers.2.mlp.up_proj.weight"), Some((2, false, 16)));
    }

    #[test]
    fn presets_and_changes() {
        let mixed = Recipe::new("q4-mixed", &Changes::default()).unwrap();
        assert_eq!(bits(&mixed, "lm_head.weight"), Some((8, true, 64)));
        assert_eq!(bits(&mixed, "model.embed_tokens.weight"), Some((8, true, 64)));
        assert_eq!(bits(&mixed, "model.layers.1.mlp.up_proj.weight"), Some((4, false, 64)));
        let changes = Changes { block_size: Some(16), symmetric: Some(false), ..Changes::default() };
        assert_eq!(bits(&Recipe::new("int4", &changes).unwrap(), "lm_head.weight"), Some((4, false, 16)));
        assert_eq!(bits(&Recipe::new("float", &Changes::default()).unwrap(), "lm_head.weight"), None);
    }

    #[test]
    fn what_makes_no_sense() {
        let with = |rule: &str| Changes { rules: vec![rule.to_owned()], ..Changes::default() };
        for (name, changes, word) in [
            ("int3", Changes::default(), "q4-mixed"),
            ("int4", Changes { block_size: Some(48), ..Changes::default() }, "48"),
            ("float", Changes { block_size: Some(32), ..Changes::default() }, "rounds nothing"),
            ("int4", with("lm_head"), "no `=`"),
            ("int4", with("lm_head=int9"), "int9"),
            ("int4", with("lm_head=int8-odd"), "odd"),
            ("int4", with("lm_head=int8:x"), "block size"),
            ("int4", with("{a=int8"), "{a"),
            ("int4", Changes { accuracy_level: Some(5), ..Changes::default() }, "5"),
        ] {
            let error = Recipe::new(name, &changes).unwrap_err();
            assert_eq!(error.code, Code::UsageInvalid);
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
