//! What a configuration's values may be before an expression reads them, and what an expression may come to.
//!
//! A configuration is untrusted: a list of a billion, a text of a megabyte or an infinity is an error by name where an
//! expression reads it, and costs nothing where none does. What an expression makes of small values is bounded again
//! when it becomes part of a specification, because `[0] * 1000000000` is small until somebody walks through it.
//!
//! Operators have no hook in Jinja: `1 in [0] * 10**12` takes as long as it sounds. No template that is built in
//! multiplies a list, so a configuration can not ask for that; a template of the user's can only harm its user.

use minijinja::value::{Rest, ValueKind};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value};
use serde_json::{Map, Value as Json};

/// Most items of a list that an expression reads, makes or walks through: sixteen for each of the most layers.
const MOST_ITEMS: usize = 65_536;
/// Longest text in bytes that an expression reads or makes: names of activations, layers and files.
const MOST_TEXT: usize = 65_536;
/// Largest whole number that an expression reads. No size comes near it, and a list of [`MOST_ITEMS`] times it can
/// still be counted.
const LARGEST: u64 = 1 << 47;
/// Longest expression in bytes: it bounds how deep an expression is nested, and with it the stack.
const LONGEST_EXPRESSION: usize = 2000;
/// Most members of all `{a,b}` of a pattern together.
pub(super) const MOST_MEMBERS: usize = 128;
/// Longest names of a pattern's members, in bytes together.
pub(super) const LONGEST_MEMBERS: usize = 65_536;

/// Filters that make much out of little, or that stand for any other filter; no scalar needs them.
const REMOVED: [&str; 12] =
    ["batch", "chain", "format", "groupby", "indent", "join", "map", "pprint", "replace", "slice", "tojson", "zip"];
/// Filters that walk through their operands.
const WALKING: [&str; 17] = [
    "dictsort",
    "items",
    "list",
    "lower",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "select",
    "selectattr",
    "sort",
    "split",
    "string",
    "sum",
    "unique",
    "upper",
];

/// Jinja as templates have it: unknown names are errors, and nothing grows without bound.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    for name in REMOVED {
        environment.remove_filter(name);
    }
    for name in WALKING {
        environment.add_filter(name, move |operands: Rest<Value>| walk(name, &operands));
    }
    environment
}

/// Whether an expression may be given to Jinja's compiler at all, or what is wrong with it.
///
/// minijinja 2.24 takes `}}` outside of all brackets for the end of a `{{`, and panics on what follows it: a bracket
/// that closes nothing is found here first. Brackets in quotes are text.
pub(super) fn compilable(expression: &str) -> Result<(), String> {
    if expression.len() > LONGEST_EXPRESSION {
        return Err(format!("an expression of more than {LONGEST_EXPRESSION} bytes"));
    }
    let (mut open, mut quote, mut escaped) = (0_usize, None, false);
    for letter in expression.chars() {
        match (quote, letter) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(own), _) if own == letter => quote = None,
            (None, '\'' | '"') => quote = Some(letter),
            (None, '(' | '[' | '{') => open += 1,
            (None, ')' | ']' | '}') => {
                open = open.checked_sub(1).ok_or_else(|| format!("a `{letter}` that closes nothing"))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A built-in filter on operands of bounded size.
fn walk(name: &str, operands: &[Value]) -> Result<Value, minijinja::Error> {
    static BUILT_IN: std::sync::OnceLock<Environment<'static>> = std::sync::OnceLock::new();
    if operands.iter().any(is_long) {
        let found = format!("{name} of more than {MOST_ITEMS} items");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, found));
    }
    BUILT_IN.get_or_init(Environment::new).empty_state().apply_filter(name, operands)
}

/// Counted and not asked for: the length that minijinja 2.24 has for `[0, 0] * 2**63` is 0 in a release build.
fn is_long(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
            value.try_iter().is_ok_and(|items| items.take(MOST_ITEMS + 1).count() > MOST_ITEMS)
        }
        _ => value.len().is_some_and(|length| length > MOST_ITEMS),
    }
}

/// A configuration's value as expressions see it. What is out of bounds fails the expression that reads it.
pub(super) fn readable(key: &str, value: &Json) -> Value {
    match odd(key, value) {
        Some((path, found)) => {
            let found = format!("{path} is {found}");
            Value::from(minijinja::Error::new(ErrorKind::InvalidOperation, found))
        }
        None => Value::from_serialize(value),
    }
}

/// The path and the kind of the first value that no expression may read.
pub(super) fn odd(path: &str, value: &Json) -> Option<(String, String)> {
    odd_part(value, &mut MOST_ITEMS.clone()).map(|(part, found)| (format!("{path}{part}"), found))
}

fn odd_part(value: &Json, left: &mut usize) -> Option<(String, String)> {
    let found = |what: String| Some((String::new(), what));
    let Some(rest) = left.checked_sub(1) else {
        return found(format!("one of more than {MOST_ITEMS} values"));
    };
    *left = rest;
    match value {
        Json::Number(number) => {
            let size = number.as_u64().or_else(|| number.as_i64().map(i64::unsigned_abs));
            size.filter(|size| *size > LARGEST).and_then(|_| found(format!("{number}, larger than any size")))
        }
        Json::String(text) if text.len() > MOST_TEXT => found(format!("a text of {} bytes", text.len())),
        Json::Null | Json::Bool(_) | Json::String(_) => None,
        Json::Array(items) if items.len() > MOST_ITEMS => found(format!("a list of {} items", items.len())),
        Json::Array(items) => items
            .iter()
            .enumerate()
            .find_map(|(index, item)| odd_part(item, left).map(|(part, found)| (format!("[{index}]{part}"), found))),
        Json::Object(table) => match special(table) {
            Some(word) => found(format!("{word}, which is no number to compute with")),
            None => table
                .iter()
                .find_map(|(key, item)| odd_part(item, left).map(|(part, found)| (format!(".{key}{part}"), found))),
        },
    }
}

/// One of Python's numbers that JSON does not have, as [`crate::read::json_object`] spells them.
fn special(table: &Map<String, Json>) -> Option<&str> {
    table.get("__float__").filter(|_| table.len() == 1)?.as_str()
}

/// What a definition came to: no larger than what an expression may read, so that definitions can not grow by turns.
pub(super) fn defined(value: Value) -> Result<Value, minijinja::Error> {
    let most = if value.as_str().is_some() { MOST_TEXT } else { MOST_ITEMS };
    match value.len() {
        Some(length) if length > most => {
            let found = format!("a definition that comes to more than {most} items or bytes");
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, found))
        }
        _ => Ok(value),
    }
}

/// What an expression came to, as JSON, or what is wrong with it.
pub(super) fn json(value: &Value) -> Result<Json, String> {
    convert(value, &mut MOST_ITEMS.clone())
}

fn convert(value: &Value, left: &mut usize) -> Result<Json, String> {
    *left = left.checked_sub(1).ok_or_else(|| format!("more than {MOST_ITEMS} items"))?;
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => Ok(Json::Null),
        ValueKind::Bool => Ok(Json::Bool(value.is_true())),
        ValueKind::Number => number(value),
        ValueKind::String => match value.as_str() {
            Some(text) if text.len() <= MOST_TEXT => Ok(Json::from(text)),
            _ => Err(format!("a text of more than {MOST_TEXT} bytes")),
        },
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter().map_err(|e| e.to_string())?;
            items.map(|item| convert(&item, left)).collect::<Result<_, _>>().map(Json::Array)
        }
        ValueKind::Map => {
            let mut table = Map::new();
            for key in value.try_iter().map_err(|e| e.to_string())? {
                let item = value.get_item(&key).map_err(|e| e.to_string())?;
                let name = key.as_str().ok_or_else(|| format!("a key that is no text: {key}"))?;
                table.insert(name.to_owned(), convert(&item, left)?);
            }
            Ok(Json::Object(table))
        }
        ValueKind::Invalid => Err(value.to_string()),
        other => Err(format!("{other}, which is no JSON")),
    }
}

fn number(value: &Value) -> Result<Json, String> {
    if value.is_integer() {
        let signed = i64::try_from(value.clone()).ok().map(Json::from);
        return signed
            .or_else(|| u64::try_from(value.clone()).ok().map(Json::from))
            .ok_or_else(|| format!("{value}, larger than any size"));
    }
    let number = f64::try_from(value.clone()).map_err(|e| e.to_string())?;
    if number.is_finite() {
        Ok(Json::from(number))
    } else {
        Err(format!("{value}, which is no number to compute with"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_no_expression_may_read_is_named() {
        let found = |value: Json| odd("key", &value).map(|(path, found)| format!("{path} is {found}"));
        assert_eq!(found(json!({"a": [1, 2.5, "x", null, true], "b": 1_u64 << 47})), None);
        for (value, words) in [
            (json!({"a": [1, {"__float__": "NaN"}]}), "key.a[1] is NaN"),
            (json!({"__float__": "-Infinity"}), "key is -Infinity"),
            (json!(u64::MAX), "key is 18446744073709551615, larger"),
            (json!(i64::MIN), "larger"),
            (json!(vec![0; MOST_ITEMS + 1]), "a list of 65537 items"),
            (json!("x".repeat(MOST_TEXT + 1)), "a text of 65537 bytes"),
            (json!(vec![vec![0; 300]; 300]), "one of more than 65536 values"),
        ] {
            let text = found(value).unwrap();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn brackets_that_close_nothing_never_reach_the_compiler() {
        for fine in ["{'a': {'b': [1]}}", "'}}' ~ \"]'\" ~ '\\'}}'", "(1", "'"] {
            assert_eq!(compilable(fine), Ok(()), "{fine}");
            let _ = environment().compile_expression(fine);
        }
        for (odd, closing) in [("1 }} x", '}'), ("1 -}} x", '}'), ("(1)) + 1", ')'), ("'a'] ~ '['", ']'), ("}}", '}')] {
            assert_eq!(compilable(odd), Err(format!("a `{closing}` that closes nothing")), "{odd}");
        }
    }

    #[test]
    fn what_an_expression_comes_to_is_bounded() {
        let environment = environment();
        let of = |expression: &str| {
            let value = environment.compile_expression(expression).and_then(|e| e.eval(()));
            value.map_err(|e| e.to_string()).and_then(|value| json(&value))
        };
        assert_eq!(of("[1, 2.5, 'x', none, {'a': [true]}]"), Ok(json!([1, 2.5, "x", null, {"a": [true]}])));
        assert_eq!(of("[3, 1, none]|reject('none')|max"), Ok(json!(3)));
        for (expression, words) in [
            ("[0] * 10**12", "more than 65536 items"),
            ("range(10**9)", "range has too many elements"),
            ("[[0] * 300] * 300", "more than 65536 items"),
            ("'x' * 10**9", "too large"),
            ("'x' * 10**5", "a text of more than"),
            ("([0] * 10**12)|list", "list of more than 65536"),
            ("([0] * 10**12)|max", "max of more than 65536"),
            ("([0] * 10**12)|string", "string of more than"),
            ("'%1000000000d'|format(1)", "unknown filter"),
            ("'x'|indent(10**9)", "unknown filter"),
            ("10 ** 10 ** 10", "10"),
            ("1e308 * 10", "no number to compute with"),
            ("0.0 * -(1e308 * 10)", "no number to compute with"),
            ("10**30", "larger than any size"),
        ] {
            let text = of(expression).unwrap_err();
            assert!(text.contains(words), "{expression}: {text}");
        }
    }
}
