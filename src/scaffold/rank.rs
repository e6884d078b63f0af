//! Which known template is nearest: by the tensors that it would bind and the parameters that it would miss.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value};

use super::keys;
use super::patterns::generalise;
use crate::build::{self, Logits};
use crate::describe::{self, Catalogue, Template};
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Source};
use crate::read::{Checkpoint, Repository};

/// How well a template fits a repository.
#[derive(Debug, Clone, Serialize)]
pub struct Candidate {
    /// Name of the template.
    pub template: String,
    /// Part of all tensors and parameters that fit each other by name and shape, from 0 to 1. Tensors whose names
    /// differ by numbers only count once, so that layers and experts do not outvote the rest.
    pub coverage: f64,
    /// Part of all tensors and parameters that fit each other by shape alone, from 0 to 1.
    pub shapes: f64,
    /// Tensor patterns that nothing of the template takes.
    pub unexpected: Vec<String>,
    /// Parameters of the template that no tensor makes.
    pub missing: Vec<String>,
    /// Keys of config.json that the template does not know.
    pub unread_keys: Vec<String>,
    /// Why it does not describe the configuration at all.
    pub refused: Option<String>,
    /// Length of its `model_type` within the configuration's own names.
    #[serde(skip)]
    hint: usize,
    #[serde(skip)]
    depth: usize,
}

impl Candidate {
    /// A part as people read it; only all of it is 100 %.
    pub fn percent(part: f64) -> String {
        format!("{:.0} %", (part * 100.0).floor())
    }
}

/// Every built-in template, the nearest first.
pub fn nearest(config: &Map<String, Value>, checkpoint: &Checkpoint) -> Result<Vec<Candidate>> {
    let catalogue = Catalogue::built_in()?;
    let filled = keys::filled(config);
    let mut all: Vec<Candidate> =
        catalogue.templates().iter().map(|template| candidate(template, &filled, checkpoint)).collect();
    all.sort_by(|a, b| {
        let key = |c: &Candidate| (c.unread_keys.len(), c.depth, c.template.clone());
        let by_name = b.coverage.total_cmp(&a.coverage).then(b.hint.cmp(&a.hint));
        by_name.then(b.shapes.total_cmp(&a.shapes)).then_with(|| key(a).cmp(&key(b)))
    });
    Ok(all)
}

/// An unknown `model_type`'s error, with the nearest templates by the checkpoint's tensors.
#[must_use]
pub fn with_nearest(error: Error, repository: &mut Repository) -> Error {
    if error.code != Code::ModelTypeUnknown {
        return error;
    }
    // What can not be decoded is compared as it is stored: the model's type is what is wrong first.
    drop(super::decoded(repository));
    let Ok(all) = nearest(&repository.config, &repository.checkpoint) else { return error };
    let list = |measure: fn(&Candidate) -> f64| {
        let near = all.iter().filter(|candidate| measure(candidate) > 0.0).take(3);
        near.map(|c| format!("{} ({})", c.template, Candidate::percent(measure(c)))).collect::<Vec<_>>().join(", ")
    };
    let (by_name, by_shape) = (list(|c| c.coverage), list(|c| c.shapes));
    let near = match (by_name.is_empty(), by_shape.is_empty()) {
        (false, _) => format!("by tensor names and shapes the nearest are {by_name}"),
        (true, false) => format!("no tensor has a known name, by shapes alone the nearest are {by_shape}"),
        (true, true) => return error,
    };
    error.expected(format!("a model_type with a template; {near}"))
}

fn candidate(template: &Template, config: &Map<String, Value>, checkpoint: &Checkpoint) -> Candidate {
    let mut candidate = Candidate {
        template: template.name.clone(),
        coverage: 0.0,
        shapes: 0.0,
        unexpected: Vec::new(),
        missing: Vec::new(),
        unread_keys: Vec::new(),
        refused: None,
        hint: hint(template, config),
        depth: template.ancestors.len(),
    };
    if let Err(error) = cover(&mut candidate, template, config, checkpoint) {
        candidate.refused = Some(if error.found.is_empty() { error.subject } else { error.found });
    }
    candidate
}

/// `LlamaForCausalLM` speaks for `llama`.
fn hint(template: &Template, config: &Map<String, Value>) -> usize {
    let names =
        config.get("architectures").and_then(Value::as_array).into_iter().flatten().chain(config.get("model_type"));
    let plain = |name: &str| name.to_lowercase().replace(['_', '-', '.'], "");
    let names: Vec<String> = names.filter_map(Value::as_str).map(plain).collect();
    let types = template.model_types.iter().map(|name| plain(name));
    types
        .filter(|known| names.iter().any(|name| name.contains(known.as_str())))
        .map(|known| known.len())
        .max()
        .unwrap_or(0)
}

/// Parts of patterns: how many of each there are, and how many fit.
#[derive(Default)]
struct Tally(BTreeMap<String, (usize, usize)>);

impl Tally {
    fn count(&mut self, name: &str, fits: bool) {
        let (all, fit) = self.0.entry(generalise(name).0).or_default();
        *all += 1;
        *fit += usize::from(fits);
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of tensors are small")]
    fn fitting(&self) -> f64 {
        self.0.values().map(|(all, fit)| *fit as f64 / *all as f64).sum()
    }

    fn unfit(&self) -> Vec<String> {
        self.0.iter().filter(|(_, (all, fit))| fit < all).map(|(name, _)| name.clone()).collect()
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of tensors are small")]
fn cover(
    candidate: &mut Candidate,
    template: &Template,
    config: &Map<String, Value>,
    checkpoint: &Checkpoint,
) -> Result<()> {
    let every: Vec<String> = config.keys().cloned().collect();
    // It changes no shape, and few templates read it.
    let mut config = config.clone();
    config.remove("partial_rotary_factor");
    let description = describe::describe(template, &config, &every)?;
    candidate.unread_keys.clone_from(&description.accounting.allowed);
    let model = build::decoder(&description.spec, Logits::All)?;
    let literals = model.values().filter(|(_, value)| matches!(value.source, Source::Literal(_)));
    let size = |dim: &Dim| dim.value().and_then(|size| usize::try_from(size).ok()).unwrap_or(0);
    let shapes: BTreeMap<String, Vec<usize>> =
        literals.map(|(_, value)| (value.name.clone(), value.ty.shape.iter().map(size).collect())).collect();
    let (mut tensors, mut parameters) = (Tally::default(), Tally::default());
    let mut taken: BTreeSet<String> = BTreeSet::new();
    let of = |name: &str| checkpoint.get(name).map(|info| info.shape.clone());
    for (name, shape) in &shapes {
        let stored = description.rules.stored(name, &shapes, &|tensor| checkpoint.get(tensor).is_some())?;
        let fit = stored.filter(|weight| weight.shape(&of).is_ok_and(|found| found == *shape));
        parameters.count(name, fit.is_some());
        taken.extend(fit.iter().flat_map(|weight| weight.sources()).map(str::to_owned));
    }
    for tensor in checkpoint.tensors() {
        let name = tensor.name.as_str();
        tensors.count(name, taken.contains(name) || description.rules.drop_rule(name).is_some());
    }
    let missing = parameters.0.len() as f64 - parameters.fitting();
    candidate.coverage = tensors.fitting() / (tensors.0.len() as f64 + missing).max(1.0);
    candidate.shapes = by_shape(shapes.values().map(Vec::as_slice), checkpoint);
    candidate.unexpected = tensors.unfit();
    candidate.missing = parameters.unfit();
    Ok(())
}

/// Tensors and parameters that can be paired off by shape, of the more numerous of both. Stacked experts count each.
#[expect(clippy::cast_precision_loss, reason = "counts of tensors are small")]
fn by_shape<'s>(parameters: impl Iterator<Item = &'s [usize]>, checkpoint: &Checkpoint) -> f64 {
    let count = |shapes: &mut dyn Iterator<Item = &[usize]>| {
        let mut counts: BTreeMap<Vec<usize>, usize> = BTreeMap::new();
        for shape in shapes {
            match shape {
                [experts, rows, columns] => *counts.entry(vec![*rows, *columns]).or_default() += experts,
                _ => *counts.entry(shape.to_vec()).or_default() += 1,
            }
        }
        counts
    };
    let wanted = count(&mut { parameters });
    let found = count(&mut checkpoint.tensors().map(|tensor| tensor.shape.as_slice()));
    let pairs: usize = wanted.iter().map(|(shape, n)| found.get(shape).map_or(0, |m| *m.min(n))).sum();
    let all = wanted.values().sum::<usize>().max(found.values().sum());
    pairs as f64 / all.max(1) as f64
}
