//! Python's words for values: `str`, `repr`, and what counts as space, as a line, as printable.

use super::fault::{Fault, Result};
use super::machine::Machine;
use super::value::{Held, Value};

/// Python's `str.isspace` of a letter.
pub(super) fn is_space(letter: char) -> bool {
    letter.is_whitespace() || ('\x1c'..='\x1f').contains(&letter)
}

/// Python's `str.splitlines`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    let is_end =
        |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    while let Some(at) = rest.find(is_end) {
        let behind = rest.get(at..).unwrap_or_default();
        let length = if behind.starts_with("\r\n") { 2 } else { behind.chars().next().map_or(0, char::len_utf8) };
        lines.push(rest.get(..if keep_ends { at + length } else { at }).unwrap_or_default());
        rest = rest.get(at + length..).unwrap_or_default();
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Python's `str.isprintable` of a letter. A text's debug form in Rust escapes the same letters.
pub(super) fn is_printable(letter: char) -> bool {
    if letter.is_ascii() {
        return (' '..='~').contains(&letter);
    }
    let pair: String = ['a', letter].into_iter().collect();
    pair.escape_debug().count() == 2
}

/// Python's `repr` of a float: the shortest digits that give the number again.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{number}");
        return if plain.contains('.') { plain } else { format!("{plain}.0") };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Python's `repr` of a text.
pub(super) fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut result = String::with_capacity(text.len() + 2);
    result.push(quote);
    for letter in text.chars() {
        match letter {
            '\\' => result.push_str("\\\\"),
            '\n' => result.push_str("\\n"),
            '\r' => result.push_str("\\r"),
            '\t' => result.push_str("\\t"),
            same if same == quote => result.extend(['\\', same]),
            same if is_printable(same) => result.push(same),
            other => result.push_str(&escape(other)),
        }
    }
    result.push(quote);
    result
}

/// A letter as Python escapes it.
pub(super) fn escape(letter: char) -> String {
    match u32::from(letter) {
        number @ 0..=0xff => format!("\\x{number:02x}"),
        number @ 0x100..=0xffff => format!("\\u{number:04x}"),
        number => format!("\\U{number:08x}"),
    }
}

/// Python's `ascii`.
pub(super) fn ascii(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii() { c.to_string() } else { escape(c) }).collect()
}

/// Markup's escapes.
pub(super) fn html(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('>', "&gt;").replace('<', "&lt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

impl Machine<'_> {
    /// Python's `str`.
    pub(super) fn string(&mut self, value: &Value) -> Result<String> {
        let text = match value {
            Value::Undefined(_) => String::new(),
            Value::Str(text) | Value::Markup(text) => text.to_string(),
            other => return self.repr(other),
        };
        self.budget.make(text.len())?;
        Ok(text)
    }

    /// Python's `repr`.
    pub(super) fn repr(&mut self, value: &Value) -> Result<String> {
        let mut out = String::new();
        self.write_repr(value, &mut out)?;
        Ok(out)
    }

    fn write_repr(&mut self, value: &Value, out: &mut String) -> Result<()> {
        self.budget.step()?;
        let before = out.len();
        match value {
            Value::Undefined(_) => out.push_str("Undefined"),
            Value::None => out.push_str("None"),
            Value::Bool(truth) => out.push_str(if *truth { "True" } else { "False" }),
            Value::Int(number) => out.push_str(&number.to_string()),
            Value::Float(number) => out.push_str(&float(*number)),
            Value::Str(text) => {
                self.budget.make(text.len())?;
                out.push_str(&quoted(text));
            }
            Value::Markup(text) => out.push_str(&format!("Markup({})", quoted(text))),
            Value::List(list) => return self.write_items(&list.items, ("[", "]"), out),
            Value::Tuple(list) => {
                let end = if list.items.len() == 1 { ",)" } else { ")" };
                return self.write_items(&list.items, ("(", end), out);
            }
            Value::Dict(dict) => {
                out.push('{');
                for (index, (key, value)) in dict.entries.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { ", " });
                    self.write_repr(&key.0, out)?;
                    out.push_str(": ");
                    self.write_repr(value, out)?;
                }
                out.push('}');
                return self.budget.make(2);
            }
            Value::Range(range) => {
                let tail = if range.step == 1 { String::new() } else { format!(", {}", range.step) };
                out.push_str(&format!("range({}, {}{tail})", range.start, range.stop));
            }
            Value::View(dict, kind) => {
                let items = self.items(&Value::View(dict.clone(), *kind))?;
                out.push_str(&format!("{}(", value.kind()));
                self.write_items(&items, ("[", "])"), out)?;
            }
            Value::Held(Held::Loop, index) => {
                let (at, length) = self.loop_place(*index)?;
                out.push_str(&format!("<LoopContext {at}/{length}>"));
            }
            Value::Held(Held::Namespace, index) => self.write_namespace(*index, out)?,
            Value::Held(Held::Macro, index) => {
                let name = quoted(self.macro_name(*index));
                out.push_str(&format!("<Macro {name}>"));
            }
            other => {
                let found = format!("the text of a {}: Python writes an address, another one each time", other.kind());
                return Err(Fault::refused(found));
            }
        }
        self.budget.make(out.len() - before)
    }

    fn write_items(&mut self, items: &[Value], (start, end): (&str, &str), out: &mut String) -> Result<()> {
        out.push_str(start);
        for (index, item) in items.iter().enumerate() {
            out.push_str(if index == 0 { "" } else { ", " });
            self.write_repr(item, out)?;
        }
        out.push_str(end);
        self.budget.make(2)
    }

    fn write_namespace(&mut self, index: usize, out: &mut String) -> Result<()> {
        let attributes = self.namespace(index);
        out.push_str("<Namespace {");
        // A namespace may hold itself.
        self.nested(|machine| {
            for (place, (name, value)) in attributes.iter().enumerate() {
                out.push_str(if place == 0 { "" } else { ", " });
                out.push_str(&format!("{}: ", quoted(name)));
                machine.write_repr(value, out)?;
            }
            Ok(())
        })?;
        out.push_str("}>");
        Ok(())
    }
}
