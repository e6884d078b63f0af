//! Scaffolding: a draft of a template for an architecture that nothing knows, from what lies in its repository.
//!
//! **Invariant:** a draft always parses as a template, and everything in it that is not certain says so. Nothing
//! of the repository is run: a draft comes from keys, names and shapes, and knows nothing of what code computes.

mod keys;
mod patterns;
mod rank;
mod roles;
mod sheet;
mod stranger;

pub use rank::{Candidate, nearest, with_nearest};

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::bind::{self, Head, Rest};
use crate::build::{self, Logits};
use crate::describe::{self, Template};
use crate::error::{Code, Error, Result};
use crate::lower;
use crate::opset::Target;
use crate::read::Repository;
use sheet::{Sheet, printable};

/// Below this coverage a template explains less than it hides.
const NEAR: f64 = 0.5;

/// A draft of a template.
#[derive(Debug, Serialize)]
pub struct Draft {
    /// The text.
    pub template: String,
    /// The template that it extends.
    pub extends: String,
    /// Known templates, the nearest first.
    pub nearest: Vec<Candidate>,
    /// What is probably right.
    pub guesses: Vec<String>,
    /// What must be looked up.
    pub todos: Vec<String>,
    /// Why a graph can not be built from it yet; nothing if every tensor is bound. It says nothing of the result.
    pub failure: Option<String>,
}

/// Drafts a template for a repository. Of quantised weights it sees what they are decoded to.
pub fn draft(repository: &mut Repository) -> Result<Draft> {
    let undecoded = decoded(repository).err();
    let config = &repository.config;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("unknown");
    let nearest = nearest(config, &repository.checkpoint)?;
    let patterns = patterns::patterns(&repository.checkpoint);
    let known = stranger::Known::new(config, &patterns);
    let near = nearest.first().filter(|candidate| candidate.coverage >= NEAR);
    let extends = near.map_or("llama", |candidate| candidate.template.as_str()).to_owned();
    let mut sheet = Sheet::default();
    match near {
        Some(candidate) => variant(&mut sheet, &known, candidate),
        None => stranger::fill(&mut sheet, &known),
    }
    let mut head = head(model_type, &extends, &nearest, config.contains_key("auto_map"));
    if let Some(catalogue) = repository.checkpoint.catalogue() {
        let _ = writeln!(
            head,
            "# The weights are quantised ({}): below they are what they are decoded to.",
            printable(&catalogue.method)
        );
    }
    // What is still unread is only known once the rest is read.
    let bare = Template::parse(DRAFT, &(head.clone() + &sheet.text()))?;
    unread(&mut sheet, &bare, config);
    let body = sheet.text();
    let template = Template::parse(DRAFT, &(head.clone() + &body))?;
    let failure = undecoded.or_else(|| check(&template, repository).err()).map(|error| error.to_string());
    let state = match &failure {
        None => "# Every tensor is bound and a graph can be built. Whether it computes the right thing only a golden can say.\n".to_owned(),
        Some(error) => {
            let indented = error.lines().map(|line| format!("#   {}\n", printable(line)));
            format!("# It does not build yet:\n{}", indented.collect::<String>())
        }
    };
    Ok(Draft {
        template: format!("{head}{state}{body}"),
        extends,
        nearest,
        guesses: sheet.guesses,
        todos: sheet.todos,
        failure,
    })
}

/// Has the checkpoint present quantised weights as the floats that they stand for, as far as they say their shapes
/// themselves: no architecture is known that could.
pub(crate) fn decoded(repository: &mut Repository) -> Result<()> {
    repository.decode(&|_| None)
}

/// The name of a draft in errors.
const DRAFT: &str = "draft.toml";

/// A variant of a known architecture: what it renames, and what it has besides.
fn variant(sheet: &mut Sheet, known: &stranger::Known<'_>, nearest: &Candidate) {
    stranger::renamed(sheet, known.config);
    let open = known.roles.iter().filter(|(pattern, _)| nearest.unexpected.contains(&pattern.name));
    let wanted = |role: &roles::Role| {
        // `{q,k,v}` stands for parameters that are missing one by one.
        let (before, after) =
            role.parameter.split_once("{q,").or(role.parameter.split_once("{gate,")).unwrap_or((&role.parameter, ""));
        nearest.missing.iter().any(|missing| {
            missing.starts_with(before) && missing.ends_with(after.split('}').next_back().unwrap_or_default())
        })
    };
    stranger::tensors(sheet, open.map(|(pattern, role)| (*pattern, role.as_ref().filter(|role| wanted(role)))));
    let bound: Vec<&str> =
        known.roles.iter().filter_map(|(_, role)| role.as_ref()).map(|r| r.parameter.as_str()).collect();
    for missing in nearest.missing.iter().filter(|missing| !bound.contains(&missing.as_str())) {
        sheet.ask("tensors", &format!("no tensor makes {missing:?}: is it absent here, or under another name?"));
    }
}

fn head(model_type: &str, extends: &str, nearest: &[Candidate], auto_map: bool) -> String {
    let name = toml::Value::String(model_type.to_owned());
    let mut text = format!(
        "# TODO: one line that says what this architecture is.\nextends = \"{extends}\"\nmodel_type = [{name}]\n\n"
    );
    text += "# A draft by `hf2onnx scaffold`, from config.json and the names and shapes of the tensors.\n";
    text += "# Read the modeling file, settle every guess and TODO, and then verify against a golden.\n";
    if auto_map {
        text += "# The repository has Python of its own (auto_map): it was not run, and it is what to read.\n";
    }
    text += "# Known templates: how much of the tensors and parameters fit by name and shape, and by shape alone.\n";
    for candidate in nearest.iter().take(5) {
        let why = candidate.refused.as_ref().map_or_else(String::new, |why| {
            let short: String = printable(why).chars().take(80).collect();
            format!("  ({short})")
        });
        let (by_name, by_shape) = (Candidate::percent(candidate.coverage), Candidate::percent(candidate.shapes));
        let _ = writeln!(text, "#   {by_name:>5} {by_shape:>5}  {}{why}", candidate.template);
    }
    text
}

/// Lists the keys that nothing reads as candidates for being without effect.
fn unread(sheet: &mut Sheet, bare: &Template, config: &Map<String, Value>) {
    let every: Vec<String> = config.keys().cloned().collect();
    let Ok(description) = describe::describe(bare, config, &every) else { return };
    for key in description.accounting.allowed {
        if let Some(usual) = keys::meaning(config, &key) {
            let reason = toml::Value::String(format!("{usual} again")).to_string();
            sheet.guess("without_effect", &key, &reason, "the same value under another name");
            continue;
        }
        let value: String = config.get(&key).map(Value::to_string).unwrap_or_default().chars().take(40).collect();
        let what = format!("it is {value}: does the modeling file read it?");
        sheet.todo("without_effect", &key, "\"not read by the modeling file\"", &what);
    }
}

/// Goes as far as a build goes before it writes.
fn check(template: &Template, repository: &Repository) -> Result<()> {
    let mut description = describe::describe(template, &repository.config, &[])?;
    let model = build::decoder(&description.spec, Logits::All)?;
    let (model, head) = Head::settle(model, &mut description, &repository.checkpoint, Logits::All)?;
    let target = Target::named("primitive")?;
    let options = lower::Options::plain(target);
    let lowered = lower::lower(&model, &options)?;
    let (rules, checkpoint) = (&description.rules, &repository.checkpoint);
    let parameters = bind::parameters(&model, rules, checkpoint)?;
    let rest = Rest { rules, spec: &description.spec, head: &head, allowed: &[] };
    bind::plan(parameters, &lowered.graph, rest, checkpoint).map(drop)
}

/// Writes a draft where nothing is.
pub fn write(draft: &Draft, path: &Path) -> Result<()> {
    use std::io::Write as _;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    let mut file = file.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::new(Code::OutputExists, path.display()).found("it exists").help("choose another --output")
        }
        _ => Error::io(path, &error),
    })?;
    file.write_all(draft.template.as_bytes()).map_err(|error| Error::io(path, &error))
}
