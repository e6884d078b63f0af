//! An object whose fields are taken one by one; what nobody took is shown by its name, so that a field that these
//! words do not know yet is never hidden.

use serde_json::{Map, Value};

/// The fields of a serialised part of a specification that no phrase has spoken of yet.
#[derive(Debug, Default)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// The fields of an object; none of anything else.
    pub(super) fn of(value: Value) -> Self {
        match value {
            Value::Object(map) => Self(map),
            _ => Self::default(),
        }
    }

    /// Takes a field; `null` counts as absent.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(key).filter(|value| !value.is_null())
    }

    /// Takes an object's fields.
    pub(super) fn object(&mut self, key: &str) -> Option<Self> {
        self.take(key).map(Self::of)
    }

    /// Takes a size.
    pub(super) fn size(&mut self, key: &str) -> Option<u64> {
        self.take(key).and_then(|value| value.as_u64())
    }

    /// A size that stays among the fields.
    pub(super) fn peek_size(&self, key: &str) -> Option<u64> {
        self.0.get(key).and_then(Value::as_u64)
    }

    /// Takes a number.
    pub(super) fn number(&mut self, key: &str) -> Option<f64> {
        self.take(key).and_then(|value| value.as_f64())
    }

    /// Takes a flag; false when it is absent.
    pub(super) fn flag(&mut self, key: &str) -> bool {
        self.take(key).and_then(|value| value.as_bool()).unwrap_or(false)
    }

    /// Takes a text.
    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        self.take(key).and_then(|value| value.as_str().map(str::to_owned))
    }

    /// Takes an enum: the variant's name and its fields.
    pub(super) fn variant(&mut self, key: &str) -> Option<(String, Self)> {
        variant(self.take(key)?)
    }

    /// Takes all fields, in order.
    pub(super) fn all(self) -> impl Iterator<Item = (String, Value)> {
        self.0.into_iter()
    }

    /// Phrases for all fields that are left; false and absent ones say nothing.
    pub(super) fn rest(self) -> Vec<String> {
        self.0.into_iter().filter_map(|(key, value)| phrase(&key, &value)).collect()
    }
}

/// serde writes a variant as its name, or as an object of its name and its fields.
pub(super) fn variant(value: Value) -> Option<(String, Fields)> {
    match value {
        Value::String(name) => Some((name, Fields::default())),
        Value::Object(map) => map.into_iter().next().map(|(name, value)| (name, Fields::of(value))),
        _ => None,
    }
}

/// A field in words; nothing for one that is off.
pub(super) fn phrase(key: &str, value: &Value) -> Option<String> {
    let key = key.replace('_', " ");
    match value {
        Value::Null | Value::Bool(false) => None,
        Value::Bool(true) => Some(key),
        other => Some(format!("{key} {}", plain(other))),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Number(n) => n.as_f64().map_or_else(|| n.to_string(), number),
        Value::String(text) => text.replace('_', " "),
        Value::Object(map) => {
            let parts: Vec<String> = map.iter().filter_map(|(key, value)| phrase(key, value)).collect();
            format!("({})", parts.join(", "))
        }
        Value::Array(items) => match items.as_slice() {
            [first, second, .., last] if items.len() > 6 => {
                format!("[{}, {}, ... {}] ({} values)", plain(first), plain(second), plain(last), items.len())
            }
            _ => format!("[{}]", items.iter().map(plain).collect::<Vec<_>>().join(", ")),
        },
        other => other.to_string(),
    }
}

/// A number as a person writes it: `1e-6`, `10000`, `0.25`.
pub(super) fn number(value: f64) -> String {
    if value != 0.0 && (value.abs() < 1e-3 || value.abs() >= 1e9) { format!("{value:e}") } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_left_is_shown() {
        let mut fields = Fields::of(json!({
            "heads": 4, "sinks": true, "softcap": 50.0, "bias": false, "window": null,
            "factors": [1, 2, 3, 4, 5, 6, 7.5], "groups": {"count": 3},
        }));
        assert_eq!(fields.size("heads"), Some(4));
        assert_eq!(fields.rest(), ["sinks", "softcap 50", "factors [1, 2, ... 7.5] (7 values)", "groups (count 3)"]);
    }

    #[test]
    fn numbers() {
        assert_eq!([1e-6, 10000.0, 0.25, 1e12, 0.0].map(number), ["1e-6", "10000", "0.25", "1e12", "0"]);
    }
}
