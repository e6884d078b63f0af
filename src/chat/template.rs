//! A repository's chat templates.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::conversation::Conversation;
use super::{HELP, invalid, object, text};
use crate::error::{Error, Result};
use crate::jinja::{self, Clock, Fault, Kind};
use crate::read::contained;

/// Longest template in bytes; the longest that is known has 30 thousand.
const LONGEST: usize = 128 * 1024;
/// The file with the default template, and the folder with others.
const FILE: &str = "chat_template.jinja";
const FOLDER: &str = "additional_chat_templates";
const CONFIG: &str = "tokenizer_config.json";

/// The chat templates of a tokenizer, with the special tokens that they may name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    /// By name; a single one is the default.
    templates: BTreeMap<String, Template>,
    tokens: Map<String, Value>,
}

#[derive(Debug, Clone)]
struct Template {
    source: String,
    /// Where it was found.
    origin: String,
}

impl ChatTemplate {
    /// Finds the templates of a directory; `None` where there are none. Files win over `tokenizer_config.json`.
    pub fn open(dir: &Path, tokens: &Map<String, Value>) -> Result<Option<Self>> {
        let mut templates = of_files(dir)?;
        if templates.is_empty() {
            templates = of_config(dir)?;
        }
        if templates.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self { templates, tokens: tokens.clone() }))
    }

    /// One template, which `origin` names in errors.
    pub fn new(source: String, tokens: Map<String, Value>, origin: &str) -> Self {
        let template = Template { source, origin: origin.to_owned() };
        Self { templates: BTreeMap::from([("default".to_owned(), template)]), tokens }
    }

    /// Renders a conversation now.
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        self.render_at(conversation, Clock::now())
    }

    /// Renders a conversation at some time.
    ///
    /// # Errors
    /// A template that does not parse, or refuses the conversation, or asks for more than templates may have.
    pub fn render_at(&self, conversation: &Conversation, clock: Clock) -> Result<String> {
        let template = self.for_tools(conversation.tools.is_some())?;
        check_length(template)?;
        let context = conversation.context(&self.tokens);
        jinja::render(&template.source, &context, clock).map_err(|fault| refused(&template.origin, &fault))
    }

    /// The template that transformers takes: the one for tools if there are some, else the default.
    fn for_tools(&self, tools: bool) -> Result<&Template> {
        let for_tools = if tools { self.templates.get("tool_use") } else { None };
        for_tools.or_else(|| self.templates.get("default")).ok_or_else(|| {
            let names: Vec<&str> = self.templates.keys().map(String::as_str).collect();
            let origin = self.templates.values().next().map_or("", |template| template.origin.as_str());
            Error::new(crate::error::Code::TokenizerInvalid, origin)
                .found(format!("chat templates called {}", names.join(", ")))
                .expected("one called default")
                .help(format!("write the one that is wanted into {FILE}"))
        })
    }

    /// What a person should know before using the templates: faults in them, and names that nothing defines.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for template in self.templates.values() {
            let names = check_length(template).and_then(|()| {
                jinja::needed_names(&template.source).map_err(|fault| refused(&template.origin, &fault))
            });
            match names {
                Err(error) => {
                    notes.push(format!("{}: the chat template does not parse: {}", error.subject, error.found));
                }
                Ok(names) => {
                    let tokens =
                        names.iter().filter(|name| name.ends_with("_token") && !self.tokens.contains_key(*name));
                    notes.extend(tokens.map(|name| {
                        format!(
                            "{}: the chat template names `{name}`, which no file of the tokenizer defines: it renders as nothing, as in \
                             transformers",
                            template.origin
                        )
                    }));
                }
            }
        }
        notes
    }
}

/// The templates that stand in files of their own.
fn of_files(dir: &Path) -> Result<BTreeMap<String, Template>> {
    let mut templates = BTreeMap::new();
    let mut files = vec![("default".to_owned(), FILE.to_owned())];
    let folder = dir.join(FOLDER);
    if folder.symlink_metadata().is_ok() && contained(dir, FOLDER)?.is_dir() {
        let entries = std::fs::read_dir(&folder).map_err(|error| Error::io(&folder, &error))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        files.extend(
            names.filter_map(|name| Some((name.strip_suffix(".jinja")?.to_owned(), format!("{FOLDER}/{name}")))),
        );
    }
    for (name, file) in files {
        if let Some(source) = text(dir, &file)? {
            templates.insert(name, Template { source, origin: place(dir, &file) });
        }
    }
    Ok(templates)
}

fn place(dir: &Path, file: &str) -> String {
    file.split('/').fold(dir.to_owned(), |path: PathBuf, part| path.join(part)).display().to_string()
}

/// The templates in `tokenizer_config.json`: one, a list of them with names, or an object of them.
fn of_config(dir: &Path) -> Result<BTreeMap<String, Template>> {
    let config = object(dir, CONFIG)?.unwrap_or_default();
    let origin = place(dir, CONFIG);
    let template = |source: &str| Template { source: source.to_owned(), origin: origin.clone() };
    let wrong = || {
        invalid(&dir.join(CONFIG))
            .found("a chat_template that is neither a text nor a list of them")
            .expected("a text, or a list of objects with name and template")
            .help(HELP)
    };
    let named = |name: Option<&str>, source: Option<&str>| {
        name.zip(source).map(|(name, source)| (name.to_owned(), template(source))).ok_or_else(wrong)
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(source)) => Ok(BTreeMap::from([("default".to_owned(), template(source))])),
        Some(Value::Array(list)) => {
            let text = |entry: &'_ Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
            list.iter().map(|entry| named(text(entry, "name").as_deref(), text(entry, "template").as_deref())).collect()
        }
        Some(Value::Object(map)) => map.iter().map(|(name, source)| named(Some(name), source.as_str())).collect(),
        Some(_) => Err(wrong()),
    }
}

fn check_length(template: &Template) -> Result<()> {
    if template.source.len() <= LONGEST {
        return Ok(());
    }
    let found = format!("a template of {} bytes, over {LONGEST}", template.source.len());
    Err(refused(&template.origin, &Fault::refused(found)))
}

fn refused(origin: &str, fault: &Fault) -> Error {
    let help = match fault.kind {
        Kind::Raised => "the template refuses this conversation: change the conversation, or leave --chat out",
        Kind::Refused => "a chat template may not do that here: mend the template, or leave --chat out",
        Kind::Syntax | Kind::Undefined | Kind::Python => {
            "transformers fails on it too: mend the template or the conversation, or leave --chat out"
        }
    };
    Error::new(crate::error::Code::TokenizerInvalid, origin).found(fault).expected("a template that renders").help(help)
}
