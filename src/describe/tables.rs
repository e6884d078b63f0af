//! Tables of a template, evaluated and read as their types; what does not fit is an error that names who is at fault.

use serde::de::DeserializeOwned;
use serde_json::Value;
use toml::Value as Toml;

use super::expression::Scope;
use super::template::Template;
use crate::error::{Code, Error, Result};

/// Evaluates a table and reads it as its type; what does not fit is an error with file, line and key.
pub(super) fn table<T: DeserializeOwned>(scope: &Scope, name: &str) -> Result<T> {
    let template = scope.template();
    let raw = template.table(name).ok_or_else(|| template.error(Code::TemplateInvalid, name).found("no such table"))?;
    let value = whole(scope.evaluate(name, &Toml::Table(raw.clone()))?);
    serde_path_to_error::deserialize(&value).map_err(|e| {
        let mut path = format!("{name}.{}", e.path()).trim_end_matches(".?").trim_end_matches('.').to_owned();
        let message = e.inner().to_string();
        if let Some(field) = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next())
            && !path.ends_with(field)
        {
            path = format!("{path}.{field}");
        }
        // A field that deserialised itself away is named by its own path already.
        let found = pointer(&value, path.strip_prefix(name).unwrap_or_default());
        let found = found.map_or(message.clone(), |value| format!("{value}: {message}"));
        // serde says both in one sentence.
        let (found, expected) = found.split_once(", expected ").unwrap_or((&found, "a value that fits the key"));
        odd(scope, &path, found, expected)
    })
}

/// A value that does not fit. At fault are the keys of config.json that it was computed from, or else the template.
pub(super) fn odd(scope: &Scope, path: &str, found: &str, expected: &str) -> Error {
    let template = scope.template();
    let expected = match expected {
        "usize" => "a whole number that is not negative",
        "f64" => "a number",
        "a boolean" => "true or false",
        other => other,
    };
    let keys = raw(template, path).map_or_else(Vec::new, |expression| scope.keys_read(expression));
    let (here, help) = (template.error(Code::TemplateInvalid, path), "mend the template");
    if keys.is_empty() {
        return here.found(found).expected(expected).help(help);
    }
    // The one form of RoPE's parameters goes by the name that most files have.
    let shown = |key: String| if key == "rope" { "rope_parameters".to_owned() } else { key };
    let keys = keys.into_iter().map(|(key, value)| (shown(key), value));
    let (names, values): (Vec<_>, Vec<_>) = keys.map(|(key, v)| (key.clone(), format!("{key}: {v}"))).unzip();
    Error::new(Code::ConfigInvalid, format!("config.json: {}", names.join(", ")))
        .found(format!("{found}, from {}", values.join(", ")))
        .expected(expected)
        .help(format!("mend the key; it is read at {}", here.subject))
}

/// The expression at a path of the template, without its `=`; of a path into what it results in, its own.
fn raw<'t>(template: &'t Template, path: &str) -> Option<&'t str> {
    let mut parts = path.split('.');
    let mut table = template.table(parts.next()?)?;
    for part in parts {
        match table.get(part)? {
            Toml::Table(inner) => table = inner,
            other => return other.as_str()?.strip_prefix('='),
        }
    }
    None
}

/// Numbers without a fraction as whole ones: files hold `32.0` for lengths.
fn whole(value: Value) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "checked to be whole and small")]
    match value {
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(float) if float.fract() == 0.0 && float.abs() < 9e15 => Value::from(float as i64),
            _ => Value::Number(number),
        },
        Value::Array(items) => items.into_iter().map(whole).collect(),
        Value::Object(table) => Value::Object(table.into_iter().map(|(key, value)| (key, whole(value))).collect()),
        other => other,
    }
}

fn pointer<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    value.pointer(&path.replace('.', "/")).filter(|value| !value.is_object())
}
