//! Inspection: what a repository or a built directory holds, in words that a person reads and as data.

mod built;
mod fields;
mod trace;
mod words;

pub use built::Built;
pub use trace::{NodeStep, Trace, trace};
pub use words::{Section, describe};

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use crate::compile::{Compiled, Options};
use crate::describe::{Accounting, Template};
use crate::element::CacheType;
use crate::graph::{Dim, Symbol};
use crate::lower::Note;
use crate::recipe::Quantization;

/// A repository as a target would have it.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// `model_type` of the configuration.
    pub model_type: String,
    /// The template that describes it.
    pub template: TemplateWords,
    /// The specification in words.
    pub sections: Vec<Section>,
    /// Counts and bytes.
    pub sizes: Sizes,
    /// Tensors that are left out, and why.
    pub dropped: BTreeMap<String, String>,
    /// Where the repository's files contradict each other, and which was believed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What is quantised as built, and what became of the checkpoint's own quantisation.
    pub quantization: Option<Quantization>,
    /// What became of config.json's keys.
    pub config_keys: Accounting,
    /// Composite operations that did not get the target's best form, and why.
    pub lowering: Vec<Note>,
    /// The specification itself.
    pub spec: Value,
}

/// Which template, and what it says of itself.
#[derive(Debug, Clone, Serialize)]
pub struct TemplateWords {
    /// Its name.
    pub name: String,
    /// What it extends, nearest first.
    pub extends: Vec<String>,
    /// The comment at its head.
    pub summary: String,
}

/// Counts and bytes of a model.
#[derive(Debug, Clone, Serialize)]
pub struct Sizes {
    /// Learned numbers.
    pub parameters: u64,
    /// Tensors that are bound.
    pub tensors: usize,
    /// Bytes of the repository's weight files.
    pub stored_bytes: u64,
    /// Element types of the repository's tensors, and formats of the quantised ones.
    pub stored_types: Vec<String>,
    /// Bytes of the weights as built.
    pub built_bytes: u64,
    /// Element type as built.
    pub dtype: String,
    /// Bytes of the caches for each token.
    pub cache_bytes_per_token: u64,
    /// What the caches hold, if they are not float.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_type: Option<&'static str>,
    /// Bytes of state that does not grow with the sequence.
    pub state_bytes: u64,
    /// Target.
    pub target: String,
    /// Nodes of its graph.
    pub nodes: usize,
}

impl Sizes {
    fn cache_words(&self) -> String {
        self.cache_type.map(|kind| format!(", in {kind}")).unwrap_or_default()
    }
}

impl From<&Template> for TemplateWords {
    fn from(template: &Template) -> Self {
        Self { name: template.name.clone(), extends: template.ancestors.clone(), summary: template.summary.clone() }
    }
}

impl Inspection {
    /// Inspects a compiled model.
    pub fn new(compiled: &Compiled, template: &Template, options: &Options) -> Self {
        let spec = serde_json::to_value(&compiled.description.spec).unwrap_or_default();
        Self {
            model_type: compiled.description.spec.model_type.clone(),
            template: template.into(),
            sections: describe(&spec),
            sizes: sizes(compiled, options),
            dropped: compiled.plan.dropped.clone(),
            notes: compiled.notes.clone(),
            quantization: compiled.quantization.clone(),
            config_keys: compiled.description.accounting.clone(),
            lowering: compiled.lowered.notes.clone(),
            spec,
        }
    }
}

fn product(shape: &[usize]) -> u64 {
    shape.iter().fold(1, |product: u64, size| product.saturating_mul(*size as u64))
}

fn sizes(compiled: &Compiled, options: &Options) -> Sizes {
    let checkpoint = &compiled.repository.checkpoint;
    let bound: std::collections::BTreeSet<&str> =
        compiled.plan.parameters.iter().flat_map(|parameter| parameter.weight.sources()).collect();
    let types: std::collections::BTreeSet<String> =
        checkpoint.tensors().map(|tensor| checkpoint.storage(tensor)).collect();
    let (mut per_token, mut state) = (0, 0);
    let graph = &compiled.lowered.graph;
    for input in graph.inputs.iter().map(|id| graph.value(*id)).filter(|input| input.name.starts_with("past_")) {
        let fixed = input.ty.shape.iter().filter_map(Dim::value).filter_map(|size| u64::try_from(size).ok());
        let bytes = fixed.fold(input.ty.element.size() as u64, u64::saturating_mul);
        let grows = input.ty.shape.iter().any(|dim| *dim == Symbol::Past.into());
        *if grows { &mut per_token } else { &mut state } += bytes;
    }
    Sizes {
        parameters: compiled.plan.parameters.iter().map(|parameter| product(&parameter.shape)).sum(),
        tensors: bound.len(),
        stored_bytes: checkpoint.files().iter().map(|file| file.size).sum(),
        stored_types: types.into_iter().collect(),
        built_bytes: compiled.plan.initializers.iter().map(crate::bind::Initializer::bytes).sum(),
        dtype: options.element.to_string(),
        cache_bytes_per_token: per_token,
        cache_type: options.cache.kind().map(CacheType::as_str),
        state_bytes: state,
        target: options.target.name.clone(),
        nodes: graph.nodes.len(),
    }
}

pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extends = match self.template.extends.as_slice() {
            [] => String::new(),
            names => format!(", which extends {}", names.join(", which extends ")),
        };
        writeln!(f, "{}, by the template {}{extends}", self.model_type, self.template.name)?;
        writeln!(f, "  {}", self.template.summary)?;
        write_sections(f, &self.sections)?;
        let s = &self.sizes;
        let count = indicatif::HumanCount(s.parameters);
        let mut lines = vec![
            ("parameters", format!("{count} in {} tensors", s.tensors)),
            ("stored", format!("{} of {}", bytes(s.stored_bytes), s.stored_types.join(", "))),
            ("as built", format!("{} of {}", bytes(s.built_bytes), s.dtype)),
            ("cache", format!("{} for each token{}", bytes(s.cache_bytes_per_token), s.cache_words())),
        ];
        if s.state_bytes > 0 {
            lines.push(("state", format!("{} for each row, whatever its length", bytes(s.state_bytes))));
        }
        lines.push(("graph", format!("{} nodes for {}", s.nodes, s.target)));
        write_lines(f, "size", &lines)?;
        write_quantization(f, self.quantization.as_ref())?;
        write_dropped(f, &self.dropped)?;
        write_contradictions(f, &self.notes)?;
        write_keys(f, &self.config_keys)?;
        write_notes(f, &self.lowering)
    }
}

/// A title and its lines, aligned.
fn write_lines<A: AsRef<str>>(f: &mut fmt::Formatter<'_>, title: &str, lines: &[(A, String)]) -> fmt::Result {
    writeln!(f, "\n{title}")?;
    lines.iter().try_for_each(|(about, words)| writeln!(f, "  {:<14}{words}", about.as_ref()))
}

fn write_sections(f: &mut fmt::Formatter<'_>, sections: &[Section]) -> fmt::Result {
    sections.iter().try_for_each(|section| write_lines(f, &section.title, &section.lines))
}

/// What integers there are, and which of the checkpoint's became floats.
fn write_quantization(f: &mut fmt::Formatter<'_>, quantization: Option<&Quantization>) -> fmt::Result {
    let Some(quantization) = quantization else { return Ok(()) };
    let mut lines = vec![("scheme".to_owned(), quantization.scheme.clone())];
    for (scheme, counted) in &quantization.matrices {
        lines.push((format!("{} matrices", counted.matrices), scheme.clone()));
    }
    if let Some(from) = &quantization.checkpoint {
        lines.push(("checkpoint".to_owned(), from.method.clone()));
        if !from.reordered.is_empty() {
            let words = "inputs gathered in the order of the checkpoint's groups";
            lines.push((format!("{} matrices", from.reordered.len()), words.to_owned()));
        }
    }
    write_lines(f, "quantisation", &lines)?;
    write_reasons(f, "decoded to floats", quantization.checkpoint.iter().flat_map(|from| &from.decoded))
}

/// Dropped tensors by reason.
fn write_dropped(f: &mut fmt::Formatter<'_>, dropped: &BTreeMap<String, String>) -> fmt::Result {
    write_reasons(f, "tensors left out", dropped.iter())
}

fn write_contradictions(f: &mut fmt::Formatter<'_>, notes: &[String]) -> fmt::Result {
    if notes.is_empty() {
        return Ok(());
    }
    writeln!(f, "\nfiles that contradict each other")?;
    notes.iter().try_for_each(|note| writeln!(f, "  {note}"))
}

/// Names by reason: one name and how many more.
fn write_reasons<'n>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    names: impl Iterator<Item = (&'n String, &'n String)>,
) -> fmt::Result {
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, reason) in names {
        reasons.entry(reason).or_default().push(name);
    }
    if reasons.is_empty() {
        return Ok(());
    }
    writeln!(f, "\n{title}")?;
    for (reason, names) in reasons {
        let first = names.first().copied().unwrap_or_default();
        let more = if names.len() > 1 { format!(" and {} more", names.len() - 1) } else { String::new() };
        writeln!(f, "  {first}{more}: {reason}")?;
    }
    Ok(())
}

fn write_keys(f: &mut fmt::Formatter<'_>, keys: &Accounting) -> fmt::Result {
    writeln!(f, "\nconfig.json")?;
    writeln!(f, "  used: {}", keys.used.join(", "))?;
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (key, reason) in &keys.without_effect {
        reasons.entry(reason).or_default().push(key);
    }
    for (reason, keys) in reasons {
        writeln!(f, "  without effect: {} ({reason})", keys.join(", "))?;
    }
    if !keys.allowed.is_empty() {
        writeln!(f, "  unread, as you allowed: {}", keys.allowed.join(", "))?;
    }
    Ok(())
}

fn write_notes(f: &mut fmt::Formatter<'_>, notes: &[Note]) -> fmt::Result {
    if notes.is_empty() {
        return Ok(());
    }
    writeln!(f, "\nnot in the target's best form")?;
    for note in notes {
        writeln!(
            f,
            "  {}: {} is not used, because {} (first in {})",
            note.composite, note.form, note.reason, note.scope
        )?;
    }
    Ok(())
}

/// The words of a specification alone, for a model that can be described but not built. Whether a head is tied only the
/// weights can say.
pub fn specification(spec: &Value) -> String {
    struct Words(Vec<Section>);
    impl fmt::Display for Words {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_sections(f, &self.0)
        }
    }
    let mut sections = describe(spec);
    if spec.pointer("/head/tied") == Some(&Value::Bool(true)) {
        let lines = sections.iter_mut().flat_map(|section| &mut section.lines);
        for (_, words) in lines.filter(|(about, _)| about == "head") {
            words.push_str("; undecided, as the weights may hold another head");
        }
    }
    Words(sections).to_string()
}
