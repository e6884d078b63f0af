//! Differences of JSON values by path.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Map, Value};

/// Longest text of a value that is shown.
const SHOWN: usize = 60;

/// A place where two JSON values differ.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct ValueChange {
    /// Keys and indices, with dots; things that have a name stand by it.
    pub path: String,
    /// The first one's value, shortened; `None` where there is none.
    pub a: Option<String>,
    /// The second one's.
    pub b: Option<String>,
}

/// Appends the places where two values differ.
pub(super) fn compare(path: &str, a: Option<&Value>, b: Option<&Value>, changes: &mut Vec<ValueChange>) {
    match (a, b) {
        (Some(a), Some(b)) if a == b => {}
        (Some(Value::Object(a)), Some(Value::Object(b))) => objects(path, a, b, changes),
        (Some(Value::Array(a)), Some(Value::Array(b))) => match (by_name(a), by_name(b)) {
            (Some(a), Some(b)) => objects(path, &a, &b, changes),
            _ => {
                for index in 0..a.len().max(b.len()) {
                    compare(&format!("{path}[{index}]"), a.get(index), b.get(index), changes);
                }
            }
        },
        _ => changes.push(ValueChange { path: path.to_owned(), a: a.map(shown), b: b.map(shown) }),
    }
}

fn objects(path: &str, a: &Map<String, Value>, b: &Map<String, Value>, changes: &mut Vec<ValueChange>) {
    let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    for key in keys {
        let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        compare(&below, a.get(key), b.get(key), changes);
    }
}

/// A list of objects by their `name`, if each has one of its own: what stands elsewhere is not different.
fn by_name(list: &[Value]) -> Option<Map<String, Value>> {
    let named: Option<Map<String, Value>> =
        list.iter().map(|value| Some((value.get("name")?.as_str()?.to_owned(), value.clone()))).collect();
    named.filter(|named| named.len() == list.len())
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_lead_to_what_differs() {
        let a = json!({"x": [1, {"y": 2}], "n": [{"name": "p", "v": 1}, {"name": "q", "v": 2}], "s": "é".repeat(99)});
        let b = json!({"x": [1, {"y": 3}, 4], "n": [{"name": "q", "v": 2}, {"name": "p", "v": 5}]});
        let mut changes = Vec::new();
        compare("", Some(&a), Some(&b), &mut changes);
        let lines: Vec<_> = changes.iter().map(|c| (c.path.as_str(), c.a.as_deref(), c.b.as_deref())).collect();
        let long = format!("\"{}...", "é".repeat(59));
        assert_eq!(
            lines,
            [
                ("n.p.v", Some("1"), Some("5")),
                ("s", Some(long.as_str()), None),
                ("x[1].y", Some("2"), Some("3")),
                ("x[2]", None, Some("4")),
            ]
        );
    }
}
