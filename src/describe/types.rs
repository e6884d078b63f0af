//! Values of a type that a key cannot have. An expression would take `"false"` for true, as Jinja does.

use serde_json::{Map, Value};
use toml::Value as Toml;

use super::rope;
use super::template::Template;
use crate::error::{Code, Error, Result};

/// Checks the keys that a template reads: all that are wrong come in one error.
pub(super) fn check(template: &Template, config: &Map<String, Value>, used: &[String]) -> Result<()> {
    let defaults = template.table("defaults");
    let mut wrong: Vec<(String, &Value, String)> = Vec::new();
    // Keys of RoPE are objects and numbers, and are checked where they are read.
    let used = used.iter().filter(|key| !rope::KEYS.contains(&key.as_str()));
    for (key, value) in used.filter_map(|key| Some((key, config.get(key)?))) {
        if let Some(meant) = literal(value) {
            wrong.push((key.clone(), value, format!("{meant} without quotes")));
        } else if let Some(expected) =
            defaults.and_then(|table| table.get(key)).and_then(|own| contradiction(own, value))
        {
            wrong.push((key.clone(), value, expected.to_owned()));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let all =
        |part: &dyn Fn(&(String, &Value, String)) -> String| wrong.iter().map(part).collect::<Vec<_>>().join(", ");
    Err(Error::new(Code::ConfigInvalid, format!("config.json: {}", all(&|(key, ..)| key.clone())))
        .found(all(&|(_, value, _)| value.to_string()))
        .expected(all(&|(.., expected)| expected.clone()))
        .help("mend the key"))
}

/// What a text stands for that is a number, a boolean or null in quotes.
fn literal(value: &Value) -> Option<String> {
    let text = value.as_str()?.trim();
    match text.to_ascii_lowercase().as_str() {
        "true" | "false" | "null" => Some(text.to_ascii_lowercase()),
        "none" => Some("null".to_owned()),
        _ => text.parse::<f64>().ok().map(|_| text.to_owned()),
    }
}

/// What a key has to be, by its default, if a value is of another type. Lists and objects may say it layer by layer.
fn contradiction(default: &Toml, value: &Value) -> Option<&'static str> {
    let number = default.is_integer() || default.is_float();
    match value {
        Value::Bool(_) | Value::String(_) if number => Some("a number"),
        Value::Number(_) | Value::String(_) if default.is_bool() => Some("true or false"),
        Value::Bool(_) | Value::Number(_) if default.as_str().is_some_and(|text| !text.starts_with('=')) => {
            Some("a name")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_in_quotes_are_told_from_names() {
        for (value, meant) in [("false", "false"), ("True", "true"), ("None", "null"), ("1e-5", "1e-5"), (" 64 ", "64")]
        {
            assert_eq!(literal(&json!(value)).as_deref(), Some(meant));
        }
        for name in ["silu", "", "default", "gelu_pytorch_tanh", "layer_norm"] {
            assert_eq!(literal(&json!(name)), None);
        }
        assert_eq!(literal(&json!(["1"])), None);
    }

    #[test]
    fn a_default_says_the_type() {
        let of = |default: Toml, value: Value| contradiction(&default, &value);
        assert_eq!(of(Toml::Boolean(true), json!(1)), Some("true or false"));
        assert_eq!(of(Toml::Integer(2), json!(true)), Some("a number"));
        assert_eq!(of(Toml::String("silu".into()), json!(false)), Some("a name"));
        for (default, value) in [
            (Toml::Boolean(true), json!(null)),
            (Toml::Integer(2), json!(2.0)),
            (Toml::Integer(2), json!([2, 3])),
            (Toml::String("=none".into()), json!(3)),
        ] {
            assert_eq!(of(default, value), None);
        }
    }
}
