//! Expressions of templates: Jinja's, evaluated over a configuration, with unknown names as errors.
//!
//! `log`, `exp` and `last_index(list, item)` are added. Filters that make much out of little are absent, and lengths are
//! bounded: [`limits`] has the list.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use minijinja::value::{Object, ObjectRepr};
use minijinja::{Environment, Expression, Value};
use serde_json::Value as Json;
use toml::Value as Toml;

use crate::error::{Code, Error, Result};
use crate::guard::guarded;

use super::limits;
use super::template::Template;

/// What names mean while a template is evaluated.
///
/// In order: `layer`, the template's `[let]`, the configuration, the template's `[defaults]`. A default stands
/// for a key that is absent; a key that is `null` stays so.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    names: Arc<Names>,
}

#[derive(Debug)]
struct Names {
    template: Arc<Template>,
    config: Arc<Config>,
    layer: Option<usize>,
    /// What definitions came to. Each is evaluated once: definitions that mention each other twice would double the
    /// work at every step.
    known: Mutex<BTreeMap<String, Value>>,
}

/// A configuration, as JSON and as expressions see it, and the expressions that were compiled already.
#[derive(Debug)]
struct Config {
    json: serde_json::Map<String, Json>,
    values: BTreeMap<String, Value>,
    compiled: Mutex<BTreeMap<String, Arc<Expression<'static, 'static>>>>,
}

/// Definitions that refer to each other in a circle stop here.
const DEPTH: usize = 24;

thread_local! {
    static NESTING: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

impl Scope {
    pub(super) fn new(template: Arc<Template>, config: serde_json::Map<String, Json>) -> Self {
        let values = config.iter().map(|(key, value)| (key.clone(), limits::readable(key, value))).collect();
        let config = Arc::new(Config { json: config, values, compiled: Mutex::default() });
        Self { names: Arc::new(Names { template, config, layer: None, known: Mutex::default() }) }
    }

    pub(super) fn template(&self) -> &Template {
        &self.names.template
    }

    /// The length of a list in the configuration.
    pub(super) fn list(&self, key: &str) -> Option<usize> {
        self.names.config.json.get(key)?.as_array().map(Vec::len)
    }

    /// The configuration, with `RoPE` parameters in their one form.
    pub(super) fn config(&self) -> &serde_json::Map<String, Json> {
        &self.names.config.json
    }

    /// The configuration's keys that an expression reads, by itself or through definitions, with what stands there.
    pub(super) fn keys_read(&self, expression: &str) -> Vec<(String, Json)> {
        let mut open: Vec<String> = mentions(expression).into_iter().collect();
        let mut seen = BTreeSet::new();
        let mut keys = Vec::new();
        while let Some(name) = open.pop() {
            let name = name.split('.').next().unwrap_or_default().to_owned();
            if !seen.insert(name.clone()) {
                continue;
            }
            let table = |table: &str| self.names.template.table(table).and_then(|own| own.get(&name));
            let definition = table("let").or_else(|| table("defaults").filter(|_| !self.config().contains_key(&name)));
            match (definition.and_then(Toml::as_str).and_then(|text| text.strip_prefix('=')), self.config().get(&name))
            {
                (Some(expression), _) => open.extend(mentions(expression)),
                (None, Some(value)) => keys.push((name, value.clone())),
                (None, None) => {}
            }
        }
        keys.sort_by(|(a, _), (b, _)| a.cmp(b));
        keys
    }

    pub(super) fn at(&self, layer: usize) -> Self {
        let Names { template, config, .. } = &*self.names;
        let (template, config) = (template.clone(), config.clone());
        let names = Names { template, config, layer: Some(layer), known: Mutex::default() };
        Self { names: Arc::new(names) }
    }

    /// A template's value with every expression replaced by what it comes to. `path` names it in errors.
    pub(super) fn evaluate(&self, path: &str, value: &Toml) -> Result<Json> {
        Ok(match value {
            Toml::String(text) => match text.strip_prefix('=') {
                Some(expression) => self.expression(path, expression)?,
                None => Json::String(text.clone()),
            },
            Toml::Integer(number) => Json::from(*number),
            Toml::Float(number) if !number.is_finite() => {
                let error = self.names.template.error(Code::TemplateInvalid, path).found(number);
                return Err(error.expected("a number to compute with").help("mend the template"));
            }
            Toml::Float(number) => Json::from(*number),
            Toml::Boolean(flag) => Json::from(*flag),
            Toml::Datetime(time) => Json::String(time.to_string()),
            Toml::Array(items) => {
                let items = items.iter().map(|item| self.evaluate(path, item));
                Json::Array(items.collect::<Result<_>>()?)
            }
            Toml::Table(table) => {
                let entries =
                    table.iter().map(|(key, value)| Ok((key.clone(), self.evaluate(&format!("{path}.{key}"), value)?)));
                Json::Object(entries.collect::<Result<_>>()?)
            }
        })
    }

    /// Says which keys are missing or out of bounds, or what else is wrong with an expression.
    fn failed(&self, path: &str, expression: &str, error: &minijinja::Error) -> Error {
        if let Some((key, found)) = self.odd(expression) {
            return Error::new(Code::ConfigInvalid, format!("config.json: {key}"))
                .found(found)
                .expected(format!("a value that {path} can be computed from"))
                .help("mend the key");
        }
        let missing = unknown(expression, &self.names);
        let layer = self.names.layer.map_or(String::new(), |layer| format!(" for layer {layer}"));
        let describe = |code, found: String| {
            self.names.template.error(code, path).found(format!("{found} (in `={expression}`{layer})"))
        };
        if error.kind() != minijinja::ErrorKind::UndefinedError {
            return describe(Code::ExpressionFailed, error.to_string())
                .expected("an expression of Jinja that has a value")
                .help("mend the expression, or the value in config.json that it reads");
        }
        let found = match missing.as_slice() {
            [] => error.to_string(),
            keys => format!("config.json has no {}", keys.join(", ")),
        };
        describe(Code::ConfigMissingKey, found)
            .expected("every key that the expression reads")
            .help("add the key to config.json, or a default for it to the template")
    }

    /// A key of the configuration that the expression mentions and that no expression may read.
    fn odd(&self, expression: &str) -> Option<(String, String)> {
        mentions(expression).into_iter().filter(|name| !name.contains('.')).find_map(|name| {
            // The one form of RoPE's parameters goes by the name that most files have.
            let shown = if name == "rope" { "rope_parameters" } else { &name };
            limits::odd(shown, self.names.config.json.get(&name)?)
        })
    }

    fn expression(&self, path: &str, expression: &str) -> Result<Json> {
        let value = evaluate(expression, &self.names).map_err(|e| self.failed(path, expression, &e))?;
        limits::json(&value).map_err(|found| {
            self.names
                .template
                .error(Code::ExpressionFailed, path)
                .found(format!("{found} (from `={expression}`)"))
                .expected("a value of a size that a model has")
                .help("mend the expression, or the value in config.json that it reads")
        })
    }
}

fn environment() -> &'static Environment<'static> {
    static ENVIRONMENT: OnceLock<Environment<'static>> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let mut environment = limits::environment();
        environment.add_function("log", f64::ln);
        environment.add_function("exp", f64::exp);
        environment
            .add_function("last_index", |list: Vec<String>, item: String| list.iter().rposition(|own| *own == item));
        environment
    })
}

fn compile(expression: &str) -> Result<Expression<'static, 'static>, minijinja::Error> {
    limits::compilable(expression).map_err(|found| minijinja::Error::new(minijinja::ErrorKind::SyntaxError, found))?;
    environment().compile_expression_owned(expression.to_owned())
}

/// The expression, compiled the first time that it is asked for.
fn compiled(expression: &str, config: &Config) -> Result<Arc<Expression<'static, 'static>>, minijinja::Error> {
    let mut all = config.compiled.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = all.get(expression) {
        return Ok(known.clone());
    }
    let fresh = Arc::new(compile(expression)?);
    all.insert(expression.to_owned(), fresh.clone());
    Ok(fresh)
}

fn evaluate(expression: &str, names: &Arc<Names>) -> Result<Value, minijinja::Error> {
    let compiled = compiled(expression, &names.config)?;
    // minijinja 2.24 multiplies the length of a list unchecked: `[0, 0] * 2**63` overflows.
    let value = guarded(|| compiled.eval(Value::from_dyn_object(names.clone()))).unwrap_or_else(|| {
        Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, "Jinja itself fails on it"))
    })?;
    // A name alone is not looked into, so Jinja lets it pass undefined: here a misspelt key would become null.
    if value.is_undefined() {
        return Err(minijinja::Error::new(minijinja::ErrorKind::UndefinedError, "it has no value"));
    }
    Ok(value)
}

/// Names in an expression that mean nothing.
fn unknown(expression: &str, names: &Arc<Names>) -> Vec<String> {
    let mentioned = mentions(expression);
    let is_unknown = |name: &String| !name.contains('.') && names.get_value(&Value::from(name.as_str())).is_none();
    mentioned.into_iter().filter(is_unknown).collect()
}

/// Names that an expression mentions, with the attributes it takes of them: `rope_scaling.factor`.
pub(super) fn mentions(expression: &str) -> BTreeSet<String> {
    let Ok(compiled) = compile(expression) else {
        return BTreeSet::new();
    };
    let mut names: BTreeSet<String> = compiled.undeclared_variables(false).into_iter().collect();
    names.extend(compiled.undeclared_variables(true));
    names
}

impl Object for Names {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        if key == "layer" {
            return self.layer.map(Value::from);
        }
        let table = |name: &str| self.template.table(name).and_then(|table| table.get(key));
        if let Some(definition) = table("let") {
            return Some(self.definition(key, definition));
        }
        if let Some(value) = self.config.values.get(key) {
            return Some(value.clone());
        }
        table("defaults").map(|default| self.definition(key, default))
    }
}

impl Names {
    fn definition(self: &Arc<Self>, key: &str, value: &Toml) -> Value {
        let Some(expression) = value.as_str().and_then(|text| text.strip_prefix('=')) else {
            return Value::from_serialize(value);
        };
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = known().get(key) {
            return value.clone();
        }
        let depth = NESTING.get();
        if depth >= DEPTH {
            let circle = minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, "definitions form a circle");
            return Value::from(circle);
        }
        NESTING.set(depth + 1);
        let value = evaluate(expression, self).and_then(limits::defined);
        NESTING.set(depth);
        let value = value.unwrap_or_else(Value::from);
        known().insert(key.to_owned(), value.clone());
        value
    }
}
