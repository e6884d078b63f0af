//! Python's `json.dumps`, as transformers' `tojson` calls it.

use super::fault::{Fault, Result};
use super::machine::{Given, Machine};
use super::text::float;
use super::value::{Key, Value};

/// Widest indent.
const WIDEST: usize = 256;

/// How JSON is written.
struct Style {
    ascii: bool,
    indent: Option<String>,
    between: String,
    colon: String,
    sort: bool,
}

impl Machine<'_> {
    /// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
    pub(super) fn json_text(&mut self, value: &Value, mut given: Given) -> Result<Value> {
        let ascii = given.take(0, "ensure_ascii").is_some_and(|value| value.truth());
        let indent = indent(given.take(1, "indent"))?;
        let separators = given.take(2, "separators").filter(|value| !matches!(value, Value::None));
        let sort = given.take(3, "sort_keys").is_some_and(|value| value.truth());
        given.done("tojson")?;
        let mut style = Style {
            ascii,
            between: if indent.is_some() { ",".into() } else { ", ".into() },
            indent,
            colon: ": ".into(),
            sort,
        };
        if let Some(separators) = separators {
            let parts = self.items(&separators)?;
            let [between, colon] = parts.as_slice() else {
                return Err(Fault::value_error("separators: two values to unpack expected"));
            };
            let (Some(between), Some(colon)) = (between.as_str(), colon.as_str()) else {
                return Err(Fault::kind_error("separators that are no texts"));
            };
            (style.between, style.colon) = (between.into(), colon.into());
        }
        let mut out = String::new();
        self.write_json(value, &style, 0, &mut out)?;
        Ok(Value::text(out))
    }

    fn write_json(&mut self, value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<()> {
        self.budget.step()?;
        match value {
            Value::List(list) | Value::Tuple(list) => {
                if list.items.is_empty() {
                    out.push_str("[]");
                    return Ok(());
                }
                out.push('[');
                for (index, item) in list.items.iter().enumerate() {
                    self.separate(index, style, depth + 1, out)?;
                    self.write_json(item, style, depth + 1, out)?;
                }
                self.line(style, depth, out)?;
                out.push(']');
            }
            Value::Dict(dict) => {
                if dict.entries.is_empty() {
                    out.push_str("{}");
                    return Ok(());
                }
                let mut entries: Vec<(&Key, &Value)> = dict.entries.iter().collect();
                if style.sort {
                    let keys: Vec<Value> = entries.iter().map(|(key, _)| key.0.clone()).collect();
                    let order = self.sorted(&keys, false)?;
                    entries = order.into_iter().filter_map(|place| entries.get(place).copied()).collect();
                }
                out.push('{');
                for (index, (key, value)) in entries.into_iter().enumerate() {
                    self.separate(index, style, depth + 1, out)?;
                    let key = key_text(&key.0)?;
                    self.budget.make(key.len())?;
                    out.push_str(&quoted(&key, style.ascii));
                    out.push_str(&style.colon);
                    self.write_json(value, style, depth + 1, out)?;
                }
                self.line(style, depth, out)?;
                out.push('}');
            }
            other => {
                let text = scalar(other, style.ascii)?;
                self.budget.make(text.len())?;
                out.push_str(&text);
            }
        }
        Ok(())
    }

    fn separate(&mut self, index: usize, style: &Style, depth: usize, out: &mut String) -> Result<()> {
        if index > 0 {
            self.budget.make(style.between.len())?;
            out.push_str(&style.between);
        }
        self.line(style, depth, out)
    }

    /// A new line, where JSON is indented.
    fn line(&mut self, style: &Style, depth: usize, out: &mut String) -> Result<()> {
        if let Some(indent) = &style.indent {
            self.budget.copies(indent.len(), depth + 1)?;
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
        Ok(())
    }
}

/// An indent is a number of spaces, or a text.
fn indent(value: Option<Value>) -> Result<Option<String>> {
    let Some(value) = value.filter(|value| !matches!(value, Value::None)) else { return Ok(None) };
    if let Some(text) = value.as_str() {
        return if text.len() <= WIDEST { Ok(Some(text.to_owned())) } else { Err(too_wide()) };
    }
    let Some(width) = value.as_int() else {
        return Err(Fault::kind_error(format!("an indent that is a {}", value.kind())));
    };
    let width = usize::try_from(width.max(0)).ok().filter(|width| *width <= WIDEST).ok_or_else(too_wide)?;
    Ok(Some(" ".repeat(width)))
}

fn too_wide() -> Fault {
    Fault::refused(format!("an indent over {WIDEST}"))
}

fn key_text(key: &Value) -> Result<String> {
    Ok(match key {
        Value::Str(text) | Value::Markup(text) => text.to_string(),
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => scalar(key, false)?,
        other => {
            let fault = format!("keys must be str, int, float, bool or None, not {}", other.kind());
            return Err(Fault::kind_error(fault));
        }
    })
}

fn scalar(value: &Value, ascii: bool) -> Result<String> {
    Ok(match value {
        Value::None => "null".into(),
        Value::Bool(truth) => truth.to_string(),
        Value::Int(number) => number.to_string(),
        Value::Float(number) if number.is_nan() => "NaN".into(),
        Value::Float(number) if number.is_infinite() => {
            if *number > 0.0 {
                "Infinity".into()
            } else {
                "-Infinity".into()
            }
        }
        Value::Float(number) => float(*number),
        Value::Str(text) | Value::Markup(text) => quoted(text, ascii),
        other => return Err(Fault::kind_error(format!("Object of type {} is not JSON serializable", other.kind()))),
    })
}

fn quoted(text: &str, ascii: bool) -> String {
    let mut result = String::with_capacity(text.len() + 2);
    result.push('"');
    for letter in text.chars() {
        match letter {
            '"' => result.push_str("\\\""),
            '\\' => result.push_str("\\\\"),
            '\n' => result.push_str("\\n"),
            '\r' => result.push_str("\\r"),
            '\t' => result.push_str("\\t"),
            '\x08' => result.push_str("\\b"),
            '\x0c' => result.push_str("\\f"),
            control if control < ' ' => result.push_str(&format!("\\u{:04x}", u32::from(control))),
            other if ascii && !(other.is_ascii() && other != '\x7f') => {
                let mut units = [0; 2];
                for unit in other.encode_utf16(&mut units) {
                    result.push_str(&format!("\\u{unit:04x}"));
                }
            }
            other => result.push(other),
        }
    }
    result.push('"');
    result
}
