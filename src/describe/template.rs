//! Templates: reading them, what they inherit, and the catalogue of those that are built in.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use toml::{Table, Value};

use crate::error::{Code, Error, Result};

/// Name and text of every built-in template.
const BUILT_IN: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/templates.rs"));

/// The template that every other one inherits from.
const COMMON: &str = "_common";

/// Longest template in bytes; the built-in ones have a few thousand.
const LONGEST: usize = 1 << 20;

/// Tables that a template may have, in the order in which they are written.
pub(crate) const TABLES: [&str; 17] = [
    "defaults",
    "let",
    "require",
    "without_effect",
    "model",
    "embedding",
    "norm",
    "layer",
    "attention",
    "rope",
    "mlp",
    "moe",
    "head",
    "tensors",
    "drop",
    "per_layer",
    "altup",
];

/// What an architecture is: merged with all that it inherits, not yet evaluated.
#[derive(Debug, Clone)]
pub struct Template {
    /// File name without its extension.
    pub name: String,
    /// `model_type`s that it describes.
    pub model_types: Vec<String>,
    /// The comment at the head of the file.
    pub summary: String,
    /// Names of the templates that it extends, nearest first.
    pub ancestors: Vec<String>,
    /// The merged tables.
    pub(super) tables: Table,
    /// `[tensors]` of each file, the template's own first: the nearest rule for a name holds.
    pub(super) tensors: Vec<Table>,
    /// Name and text of each file that went in, the template's own first.
    sources: Vec<(String, String)>,
}

/// The templates that can be chosen.
#[derive(Debug, Clone)]
pub struct Catalogue {
    templates: Vec<Template>,
}

impl Catalogue {
    /// The templates that are compiled in.
    pub fn built_in() -> Result<Self> {
        let names = BUILT_IN.iter().filter(|(name, _)| !name.starts_with('_'));
        let templates = names.map(|(name, text)| Template::parse(name, text)).collect::<Result<Vec<_>>>()?;
        Ok(Self { templates })
    }

    /// All templates, by name.
    pub fn templates(&self) -> &[Template] {
        &self.templates
    }

    /// The template for a `model_type`.
    pub fn for_model_type(&self, model_type: &str) -> Option<&Template> {
        self.templates.iter().find(|template| template.model_types.iter().any(|known| known == model_type))
    }
}

impl Template {
    /// Reads a template from a file of the user's.
    pub fn read(path: &Path) -> Result<Self> {
        let text = crate::regular::read_text(path, crate::regular::CONFIGURATION).map_err(|e| Error::io(path, &e))?;
        let mut template = Self::parse(&path.display().to_string(), &text)?;
        // Where it lies is for errors; its name goes into what is written.
        if let Some(stem) = path.file_stem() {
            template.name = stem.to_string_lossy().into_owned();
        }
        Ok(template)
    }

    /// Parses a template and merges it with the built-in ones that it extends, at most two deep.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let mut own = parse_file(name, text)?;
        let model_types = model_types(name, &mut own)?;
        let mut sources = vec![(name.to_owned(), text.to_owned())];
        let mut chain = vec![own];
        let mut ancestors = Vec::new();
        // A user's own may extend every built-in one.
        let most = if built_in(name).is_some() { 2 } else { 3 };
        while let Some(parent) = chain.last_mut().and_then(|table| table.remove("extends")) {
            let Some((parent, text)) = parent.as_str().and_then(built_in) else {
                return Err(invalid(name, "extends", text)
                    .found(parent)
                    .expected(format!("one of {}", names().join(", "))));
            };
            if ancestors.len() == most {
                return Err(invalid(name, "extends", text)
                    .found(format!("{parent} as ancestor number {}", most + 1))
                    .expected(format!("at most {most}, so that a template can be read")));
            }
            let mut table = parse_file(parent, text)?;
            table.remove("model_type");
            chain.push(table);
            ancestors.push(parent.to_owned());
            sources.push((parent.to_owned(), text.to_owned()));
        }
        if let Some((common, text)) = built_in(COMMON) {
            chain.push(parse_file(common, text)?);
            sources.push((common.to_owned(), text.to_owned()));
        }
        let rules = chain.iter_mut().filter_map(|table| table.remove("tensors"));
        let tensors = rules.filter_map(|rules| rules.try_into().ok()).collect();
        let mut tables = Table::new();
        for table in chain.into_iter().rev() {
            merge(&mut tables, table);
        }
        let summary = text.lines().take_while(|line| line.starts_with('#'));
        let summary = summary.map(|line| line.trim_start_matches(['#', ' '])).collect::<Vec<_>>().join(" ");
        Ok(Self { name: name.to_owned(), model_types, summary, ancestors, tables, tensors, sources })
    }

    /// Its tables, merged with all that it inherits; `[tensors]` stand in [`Template::tensor_rules`].
    pub fn merged(&self) -> &Table {
        &self.tables
    }

    /// `[tensors]` of each file, the template's own first.
    pub fn tensor_rules(&self) -> &[Table] {
        &self.tensors
    }

    /// The merged template as TOML, with the file that each inherited value comes from behind it.
    pub fn annotated(&self) -> String {
        let types = self.model_types.iter().cloned().map(Value::String).collect();
        let mut text = format!("# {}\nmodel_type = {}\n", self.summary, Value::Array(types));
        let files: Vec<(&str, Table)> =
            self.sources.iter().map(|(name, text)| (name.as_str(), text.parse().unwrap_or_default())).collect();
        let origin = |table: &str, key: &str| {
            let holds = |file: &Table| file.get(table).and_then(|table| table.get(key)).is_some();
            let found = files.iter().find(|(_, file)| holds(file)).map_or("", |(name, _)| *name);
            if found == self.name { String::new() } else { format!("  # {found}") }
        };
        for name in TABLES.iter().filter(|name| **name != "tensors") {
            let Some(table) = self.table(name).filter(|table| !table.is_empty()) else { continue };
            let _ = writeln!(text, "\n[{name}]");
            for (key, value) in table {
                let _ = writeln!(text, "{} = {value}{}", quoted_key(key), origin(name, key));
            }
        }
        let mut known = BTreeSet::new();
        for (key, value) in self.tensors.iter().flatten() {
            if known.is_empty() {
                text += "\n[tensors]\n";
            }
            if known.insert(key) {
                let _ = writeln!(text, "{} = {value}{}", quoted_key(key), origin("tensors", key));
            }
        }
        text
    }

    /// A table of the template; an empty one if it is not there.
    pub(super) fn table(&self, name: &str) -> Option<&Table> {
        self.tables.get(name).and_then(Value::as_table)
    }

    /// An error about a key, with the file and line where it stands.
    pub(super) fn error(&self, code: Code, path: &str) -> Error {
        let key = path.rsplit('.').next().unwrap_or(path);
        let place = self.sources.iter().find_map(|(name, text)| line_of(text, path).map(|line| (name, line)));
        match place {
            Some((name, line)) => Error::new(code, format!("{}:{line}: {path}", file_name(name))),
            None => Error::new(code, format!("{}: {path}", self.file())).help(format!("`{key}` is missing")),
        }
    }

    /// The file that it was read from.
    fn file(&self) -> String {
        file_name(self.sources.first().map_or(&self.name, |(name, _)| name))
    }

    /// Every expression of the template.
    pub(super) fn expressions(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        collect(&Value::Table(self.tables.clone()), &mut found);
        self.tensors.iter().for_each(|rules| collect(&Value::Table(rules.clone()), &mut found));
        found
    }
}

/// A key as TOML wants it.
pub(crate) fn quoted_key(key: &str) -> String {
    let bare = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if bare { key.to_owned() } else { Value::String(key.to_owned()).to_string() }
}

fn file_name(name: &str) -> String {
    if Path::new(name).extension().is_some() { name.to_owned() } else { format!("graph_templates/{name}.toml") }
}

fn names() -> Vec<&'static str> {
    BUILT_IN.iter().map(|(name, _)| *name).filter(|name| !name.starts_with('_')).collect()
}

fn built_in(name: &str) -> Option<(&'static str, &'static str)> {
    BUILT_IN.iter().find(|(known, _)| *known == name).copied()
}

fn invalid(name: &str, path: &str, text: &str) -> Error {
    let line = line_of(text, path).map_or(String::new(), |line| format!(":{line}"));
    Error::new(Code::TemplateInvalid, format!("{}{line}: {path}", file_name(name)))
}

fn parse_file(name: &str, text: &str) -> Result<Table> {
    if text.len() > LONGEST {
        return Err(Error::new(Code::TemplateInvalid, file_name(name))
            .found(format!("{} bytes", text.len()))
            .expected(format!("at most {LONGEST}, so that a template can be read")));
    }
    let table: Table = text.parse().map_err(|e: toml::de::Error| {
        let line = e.span().map_or(1, |span| text.get(..span.start).unwrap_or_default().lines().count().max(1));
        Error::new(Code::TemplateInvalid, format!("{}:{line}", file_name(name)))
            .found(e.message())
            .expected("TOML")
            .help("mend the file; this is the line that does not parse")
    })?;
    let known = |key: &str| TABLES.contains(&key) || ["extends", "model_type"].contains(&key);
    if let Some(odd) = table.keys().find(|key| !known(key)) {
        return Err(invalid(name, odd, text)
            .found("an unknown table")
            .expected(format!("extends, model_type or one of {}", TABLES.join(", ")))
            .help("mend its name; a new mechanism is a builder, never a new table"));
    }
    match table.iter().find(|(key, value)| TABLES.contains(&key.as_str()) && !value.is_table()) {
        Some((odd, value)) => Err(invalid(name, odd, text)
            .found(value)
            .expected(format!("a table, [{odd}]"))
            .help("mend the file: what is no table would be left unread")),
        None => Ok(table),
    }
}

fn model_types(name: &str, table: &mut Table) -> Result<Vec<String>> {
    let list = match table.remove("model_type") {
        Some(Value::Array(list)) if list.iter().all(Value::is_str) => list,
        _ if name.starts_with('_') => Vec::new(),
        _ => {
            return Err(Error::new(Code::TemplateInvalid, format!("{}: model_type", file_name(name)))
                .expected("a list of the model_types that it describes, as in model_type = [\"llama\"]"));
        }
    };
    Ok(list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Puts `over` on top: tables are merged, everything else is replaced.
fn merge(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(under)), Value::Table(over)) => merge(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

fn collect(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::String(text) => {
            found.extend(text.strip_prefix('=').map(str::to_owned));
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
        Value::Table(table) => table.values().for_each(|item| collect(item, found)),
        _ => {}
    }
}

/// The line on which a dotted path's last key stands: below its table's header, or within an inline table.
fn line_of(text: &str, path: &str) -> Option<usize> {
    let key = path.rsplit('.').next()?;
    let first = path.split('.').next()?;
    let starts = |line: &str, key: &str| {
        let line = line.trim_start().trim_start_matches('"');
        line.strip_prefix(key)
            .is_some_and(|rest| rest.trim_start().trim_start_matches('"').trim_start().starts_with('='))
    };
    let mut table = String::new();
    let mut within = None;
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(header) = line.strip_prefix('[') {
            header.trim_end_matches(']').clone_into(&mut table);
            if table == path {
                return Some(number);
            }
        }
        let here = table.split('.').next() == Some(first) || path == key;
        if here && starts(line, key) {
            return Some(number);
        }
        if here && within.is_none() && line.contains(&format!("{key} =")) {
            within = Some(number);
        }
    }
    within
}
