//! JSON files of a repository.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use crate::regular;

/// Reads a JSON file that has to be an object. Its keys keep their order.
///
/// Python also writes the numbers `Infinity`, `-Infinity` and `NaN`, which are not JSON. They are
/// read as transformers 5 spells them, `{"__float__": "Infinity"}`.
pub fn json_file(path: &Path) -> Result<Map<String, Value>> {
    json_object(&text_file(path, regular::CONFIGURATION)?, path)
}

/// The object that a JSON text holds, as [`json_file`] reads it; `path` names it in errors.
pub fn json_object(text: &str, path: &Path) -> Result<Map<String, Value>> {
    let value = parse(text).map_err(|error| invalid(path).found(error).expected("JSON").help(HELP))?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(invalid(path).found(kind(&other)).expected("a JSON object").help(HELP)),
    }
}

const HELP: &str = "repair the file, or download it again";

fn invalid(path: &Path) -> Error {
    Error::new(Code::ConfigInvalid, path.display())
}

/// Reads a text file of at most so many bytes.
pub(crate) fn text_file(path: &Path, most: u64) -> Result<String> {
    regular::read_text(path, most).map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidData => {
            invalid(path).found(error).expected(format!("a text in UTF-8 of at most {most} bytes")).help(HELP)
        }
        _ => Error::io(path, &error),
    })
}

/// Parses JSON, and Python's three special numbers.
fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|error| {
        let spelled = spell_special_floats(text);
        if spelled == text { Err(error) } else { serde_json::from_str(&spelled) }
    })
}

fn spell_special_floats(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(character) = rest.chars().next() {
        let special = ["Infinity", "-Infinity", "NaN"].into_iter().find(|word| rest.starts_with(word));
        if let (false, Some(word)) = (in_string, special) {
            out.push_str(r#"{"__float__": ""#);
            out.push_str(word);
            out.push_str("\"}");
            rest = rest.strip_prefix(word).unwrap_or_default();
            continue;
        }
        // A backslash and what it escapes go together, so that `\"` ends no string.
        let escaped = in_string && character == '\\';
        in_string ^= character == '"';
        for character in rest.chars().take(1 + usize::from(escaped)) {
            out.push(character);
            rest = rest.strip_prefix(character).unwrap_or_default();
        }
    }
    out
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn python_numbers() {
        let text = r#"{"a": [0.0, Infinity], "b": -Infinity, "c": "NaN \" Infinity", "d": NaN, "é\\": 1}"#;
        let expected = json!({
            "a": [0.0, {"__float__": "Infinity"}], "b": {"__float__": "-Infinity"},
            "c": "NaN \" Infinity", "d": {"__float__": "NaN"}, "é\\": 1,
        });
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn a_broken_file_stays_broken() {
        for text in ["", "{", "{\"a\": Infinit}", "{\"a\": 1e999}", "nul", "{\"a\": \"\\"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn rewriting_is_total(text in ".*") {
            let _ = parse(&text);
        }
    }
}
