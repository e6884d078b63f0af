//! The methods of Python's texts, lists and dictionaries.

use super::fault::{Fault, Kind, Result};
use super::format::braces;
use super::machine::{Given, Machine};
use super::text::{is_printable, is_space, lines};
use super::value::{Held, Value, View};

const OF_TEXT: [&str; 42] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
];
const OF_TEXT_TOO: [&str; 4] = ["upper", "zfill", "encode", "translate"];
const OF_DICT: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
const OF_LIST: [&str; 3] = ["copy", "count", "index"];
/// Names of what `groupby` gives.
pub(super) const GROUP: [&str; 2] = ["grouper", "list"];
const LIST_CHANGES: [&str; 8] = ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
const DICT_CHANGES: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];

/// Whether the sandbox keeps a method away because it changes its value.
pub(super) fn is_mutating(of: &Value, name: &str) -> bool {
    match of {
        Value::List(_) => LIST_CHANGES.contains(&name),
        Value::Dict(_) => DICT_CHANGES.contains(&name),
        _ => false,
    }
}

/// The method of a value with this name.
pub(super) fn find(of: &Value, name: &str) -> Option<&'static str> {
    let names: &[&'static str] = match of {
        Value::Str(_) | Value::Markup(_) => {
            let found = OF_TEXT.iter().chain(&OF_TEXT_TOO).find(|known| **known == name);
            return found.copied();
        }
        Value::Dict(_) => &OF_DICT,
        Value::List(_) => &OF_LIST,
        Value::Tuple(_) | Value::Range(_) => &["count", "index"],
        Value::Float(_) => &["is_integer"],
        Value::Int(_) | Value::Bool(_) => &["bit_length"],
        Value::Function("dict") => &["fromkeys"],
        Value::Held(Held::Cycler, _) => &["next", "reset"],
        _ => &[],
    };
    names.iter().find(|known| **known == name).copied()
}

impl Machine<'_> {
    pub(super) fn method(&mut self, of: &Value, name: &'static str, given: Given) -> Result<Value> {
        match of {
            Value::Str(text) | Value::Markup(text) => self.text_method(of, text, name, given),
            Value::Dict(_) | Value::Function("dict") => self.dict_method(of, name, given),
            Value::List(_) | Value::Tuple(_) | Value::Range(_) => self.list_method(of, name, given),
            Value::Held(Held::Cycler, index) => {
                given.done(name)?;
                Ok(self.cycler(*index, name))
            }
            Value::Held(Held::Loop, index) => self.loop_method(*index, name, given),
            Value::Float(number) => Ok(Value::Bool(number.fract() == 0.0)),
            Value::Int(number) => Ok(Value::Int((128 - number.unsigned_abs().leading_zeros()).into())),
            other => Err(Fault::kind_error(format!("'{}' object has no method {name}", other.kind()))),
        }
    }

    fn dict_method(&mut self, of: &Value, name: &str, mut given: Given) -> Result<Value> {
        let Value::Dict(dict) = of else { return dict_of_keys(self, given) };
        match name {
            "get" => {
                let key = given.take(0, "").ok_or_else(|| Fault::kind_error("get expected at least 1 argument"))?;
                let default = given.take(1, "").unwrap_or(Value::None);
                given.done(name)?;
                Ok(dict.get(&key)?.cloned().unwrap_or(default))
            }
            "fromkeys" => dict_of_keys(self, given),
            _ => {
                given.done(name)?;
                Ok(match name {
                    "keys" => Value::View(dict.clone(), View::Keys),
                    "values" => Value::View(dict.clone(), View::Values),
                    "items" => Value::View(dict.clone(), View::Items),
                    _ => of.clone(),
                })
            }
        }
    }

    fn list_method(&mut self, of: &Value, name: &str, mut given: Given) -> Result<Value> {
        if name == "copy" {
            given.done(name)?;
            return Ok(of.clone());
        }
        let wanted = given.take(0, "").ok_or_else(|| Fault::kind_error(format!("{name}() takes one argument")))?;
        let items = self.items(of)?;
        if name == "count" {
            given.done(name)?;
            let mut count = 0;
            for item in &items {
                count += usize::from(self.same(item, &wanted)?);
            }
            return Ok(Value::count(count));
        }
        let (start, stop) = (given.take(1, ""), given.take(2, ""));
        given.done(name)?;
        let (start, stop) = window(start.as_ref(), stop.as_ref(), items.len())?;
        for (place, item) in items.iter().enumerate().take(stop).skip(start) {
            if self.same(item, &wanted)? {
                return Ok(Value::count(place));
            }
        }
        Err(Fault::value_error("the value is not in the list"))
    }

    fn text_method(&mut self, of: &Value, text: &str, name: &'static str, mut given: Given) -> Result<Value> {
        self.budget.make(text.len())?;
        let like = |text: String| Value::text_like(text, of);
        let found = match name {
            "format" => return Ok(like(braces(self, text, &given, 2)?)),
            "format_map" => {
                let Some(Value::Dict(dict)) = given.take(0, "") else {
                    return Err(Fault::kind_error("format_map() takes a mapping"));
                };
                let named = dict.entries.iter().filter_map(|(k, v)| Some((k.0.as_str()?.to_owned(), v.clone())));
                return Ok(like(braces(self, text, &Given { positional: vec![], named: named.collect() }, 2)?));
            }
            "join" => {
                let list = given.take(0, "").ok_or_else(|| Fault::kind_error("join() takes exactly one argument"))?;
                let parts = self.items(&list)?;
                self.join(text, &parts, true)?
            }
            "split" | "rsplit" | "splitlines" | "partition" | "rpartition" => {
                return self.split(of, text, name, given);
            }
            "replace" => self.replace(text, &mut given)?,
            "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => {
                return search(text, name, given);
            }
            "center" | "ljust" | "rjust" | "zfill" | "expandtabs" => self.justify(text, name, &mut given)?,
            "strip" | "lstrip" | "rstrip" => {
                let letters = given.take(0, "").filter(|value| !matches!(value, Value::None));
                let letters = match &letters {
                    None => None,
                    Some(value) => Some(value.as_str().ok_or_else(|| {
                        Fault::kind_error(format!("{name} arg must be None or str, not {}", value.kind()))
                    })?),
                };
                stripped(text, letters, name != "rstrip", name != "lstrip").to_owned()
            }
            "removeprefix" | "removesuffix" => {
                let part = part(&mut given, name)?;
                let rest = if name == "removeprefix" { text.strip_prefix(&*part) } else { text.strip_suffix(&*part) };
                rest.unwrap_or(text).to_owned()
            }
            "encode" | "translate" => return Err(Fault::refused(format!("str.{name}"))),
            _ => {
                let Some(text) = changed(text, name) else {
                    given.done(name)?;
                    return Ok(Value::Bool(is(text, name)));
                };
                text
            }
        };
        given.done(name)?;
        self.budget.make(found.len())?;
        Ok(like(found))
    }

    /// Texts with a separator between them.
    pub(super) fn join(&mut self, separator: &str, parts: &[Value], strict: bool) -> Result<String> {
        let mut out = String::new();
        for (index, part) in parts.iter().enumerate() {
            if strict && part.as_str().is_none() {
                let kind = part.kind();
                return Err(Fault::kind_error(format!("sequence item {index}: expected str instance, {kind} found")));
            }
            self.budget.make(separator.len())?;
            if index > 0 {
                out.push_str(separator);
            }
            out.push_str(&self.string(part)?);
        }
        Ok(out)
    }

    fn replace(&mut self, text: &str, given: &mut Given) -> Result<String> {
        let (old, new) = (given.take(0, ""), given.take(1, ""));
        let count = given.take(2, "count").as_ref().map(count_of).transpose()?;
        let (Some(old), Some(new)) = (old.as_ref().and_then(Value::as_str), new.as_ref().and_then(Value::as_str))
        else {
            return Err(Fault::kind_error("replace() takes two texts"));
        };
        self.replaced(text, old, new, count.flatten())
    }

    /// Python's `str.replace`.
    pub(super) fn replaced(&mut self, text: &str, old: &str, new: &str, count: Option<usize>) -> Result<String> {
        let found = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() };
        self.budget.copies(new.len(), found)?;
        self.budget.make(text.len())?;
        Ok(text.replacen(old, new, count.unwrap_or(usize::MAX)))
    }

    fn justify(&mut self, text: &str, name: &str, given: &mut Given) -> Result<String> {
        let width = match given.take(0, "tabsize") {
            Some(width) => width.as_int().ok_or_else(|| Fault::kind_error("a width that is no integer"))?,
            None if name == "expandtabs" => 8,
            None => return Err(Fault::kind_error(format!("{name} expected at least 1 argument, got 0"))),
        };
        let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
        let fill = match given.take(1, "") {
            None => ' ',
            Some(value) => {
                let mut letters = value.as_str().unwrap_or_default().chars();
                match (letters.next(), letters.next()) {
                    (Some(fill), None) => fill,
                    _ => return Err(Fault::kind_error("The fill character must be exactly one character long")),
                }
            }
        };
        if name == "expandtabs" {
            self.budget.copies(width, text.matches('\t').count())?;
            return Ok(expanded(text, width));
        }
        let length = text.chars().count();
        let missing = width.saturating_sub(length);
        self.budget.make(missing.saturating_mul(fill.len_utf8()))?;
        let filled = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
        Ok(match name {
            "ljust" => text.to_owned() + &filled(missing),
            "rjust" => filled(missing) + text,
            "center" => {
                // As CPython has it: the odd one goes left where the width is odd.
                let left = missing / 2 + (missing & width & 1);
                filled(left) + text + &filled(missing - left)
            }
            _ => {
                let sign = text.chars().next().filter(|c| matches!(c, '+' | '-'));
                let digits = text.get(sign.map_or(0, char::len_utf8)..).unwrap_or_default();
                let zeros: String = std::iter::repeat_n('0', missing).collect();
                sign.map_or_else(String::new, String::from) + &zeros + digits
            }
        })
    }

    fn split(&mut self, of: &Value, text: &str, name: &str, mut given: Given) -> Result<Value> {
        let like = |text: &str| Value::text_like(text.to_owned(), of);
        if name == "splitlines" {
            let keep = given.take(0, "keepends").is_some_and(|value| value.truth());
            given.done(name)?;
            let found = lines(text, keep);
            self.budget.items(found.len())?;
            return Value::list(found.into_iter().map(like).collect());
        }
        if name.ends_with("partition") {
            let separator = part(&mut given, name)?;
            given.done(name)?;
            if separator.is_empty() {
                return Err(Fault::value_error("empty separator"));
            }
            let found = if name == "partition" { text.split_once(&*separator) } else { text.rsplit_once(&*separator) };
            let parts = match found {
                Some((before, after)) => [before, &*separator, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            return Value::tuple(parts.into_iter().map(like).collect());
        }
        let separator = given.take(0, "sep").filter(|value| !matches!(value, Value::None));
        let most = given.take(1, "maxsplit").as_ref().map(count_of).transpose()?.flatten();
        given.done(name)?;
        let parts = match &separator {
            None => by_space(text, most, name == "rsplit"),
            Some(value) => match value.as_str() {
                Some("") => return Err(Fault::value_error("empty separator")),
                Some(separator) => by_text(text, separator, most, name == "rsplit"),
                None => return Err(Fault::kind_error(format!("must be str or None, not {}", value.kind()))),
            },
        };
        self.budget.items(parts.len())?;
        Value::list(parts.into_iter().map(like).collect())
    }
}

fn dict_of_keys(machine: &mut Machine<'_>, mut given: Given) -> Result<Value> {
    let keys = given.take(0, "").ok_or_else(|| Fault::kind_error("fromkeys expected at least 1 argument"))?;
    let value = given.take(1, "").unwrap_or(Value::None);
    given.done("fromkeys")?;
    let keys = machine.items(&keys)?;
    let entries = keys.into_iter().map(|key| Ok((super::value::Key::new(key)?, value.clone())));
    Value::dict(entries.collect::<Result<_>>()?)
}

/// An argument that is a text.
fn part(given: &mut Given, name: &str) -> Result<std::sync::Arc<str>> {
    match given.take(0, "") {
        Some(Value::Str(text) | Value::Markup(text)) => Ok(text),
        Some(other) => Err(Fault::kind_error(format!("{name}: must be str, not {}", other.kind()))),
        None => Err(Fault::kind_error(format!("{name}() takes at least 1 argument"))),
    }
}

fn search(text: &str, name: &str, mut given: Given) -> Result<Value> {
    let wanted = given.take(0, "").ok_or_else(|| Fault::kind_error(format!("{name}() takes at least 1 argument")))?;
    let (start, stop) = (given.take(1, ""), given.take(2, ""));
    given.done(name)?;
    let letters = text.chars().count();
    let beyond = start.as_ref().and_then(Value::as_int).is_some_and(|start| start > letters as i128);
    let (start, stop) = window(start.as_ref(), stop.as_ref(), letters)?;
    let byte = |place: usize| text.char_indices().nth(place).map_or(text.len(), |(at, _)| at);
    let part = if beyond || start > stop { None } else { text.get(byte(start)..byte(stop)) };
    if matches!(name, "startswith" | "endswith") {
        let wanted = match &wanted {
            Value::Tuple(list) => list.items.clone(),
            other => vec![other.clone()],
        };
        let mut found = false;
        for wanted in &wanted {
            let Some(wanted) = wanted.as_str() else {
                let kind = wanted.kind();
                return Err(Fault::kind_error(format!("{name} first arg must be str or a tuple of str, not {kind}")));
            };
            found |=
                part.is_some_and(
                    |part| {
                        if name == "startswith" { part.starts_with(wanted) } else { part.ends_with(wanted) }
                    },
                );
        }
        return Ok(Value::Bool(found));
    }
    let Some(wanted) = wanted.as_str() else {
        return Err(Fault::kind_error(format!("must be str, not {}", wanted.kind())));
    };
    if name == "count" {
        let count = part
            .map_or(0, |part| if wanted.is_empty() { part.chars().count() + 1 } else { part.matches(wanted).count() });
        return Ok(Value::count(count));
    }
    let found = part.and_then(|part| {
        let at = if name.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) }?;
        Some(start + part.get(..at)?.chars().count())
    });
    match found {
        Some(place) => Ok(Value::count(place)),
        None if name.ends_with("index") => Err(Fault::value_error("substring not found")),
        None => Ok(Value::Int(-1)),
    }
}

/// `None` for as many as there are.
fn count_of(value: &Value) -> Result<Option<usize>> {
    let count = value.as_int().ok_or_else(|| {
        Fault::new(Kind::Python, format!("TypeError: '{}' object cannot be interpreted as an integer", value.kind()))
    })?;
    Ok(usize::try_from(count).ok())
}

/// Python's optional start and stop.
fn window(start: Option<&Value>, stop: Option<&Value>, length: usize) -> Result<(usize, usize)> {
    let place = |value: Option<&Value>, default: usize| match value {
        None | Some(Value::None) => Ok(default),
        Some(value) => {
            let place = value.as_int().ok_or_else(|| Fault::kind_error("slice indices must be integers or None"))?;
            let place = if place < 0 { place.saturating_add(length as i128).max(0) } else { place };
            Ok(usize::try_from(place).unwrap_or(usize::MAX).min(length))
        }
    };
    Ok((place(start, 0)?, place(stop, length)?))
}

/// Python's `strip` and its halves.
pub(super) fn stripped<'s>(text: &'s str, letters: Option<&str>, left: bool, right: bool) -> &'s str {
    let goes = |c: char| letters.map_or_else(|| is_space(c), |letters| letters.contains(c));
    let text = if left { text.trim_start_matches(goes) } else { text };
    if right { text.trim_end_matches(goes) } else { text }
}

fn by_space(text: &str, most: Option<usize>, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = stripped(text, None, true, true);
    while !rest.is_empty() {
        if most.is_some_and(|most| parts.len() >= most) {
            // What is left stays whole, with the space at its far end.
            parts.push(if from_right { before_parts(text, rest) } else { behind_parts(text, rest) });
            break;
        }
        let cut = if from_right {
            rest.char_indices().rev().find(|(_, c)| is_space(*c)).map(|(at, c)| (at, at + c.len_utf8()))
        } else {
            rest.char_indices().find(|(_, c)| is_space(*c)).map(|(at, c)| (at, at + c.len_utf8()))
        };
        let Some((start, end)) = cut else {
            parts.push(rest);
            break;
        };
        let (before, after) = (rest.get(..start).unwrap_or_default(), rest.get(end..).unwrap_or_default());
        if from_right {
            parts.push(after);
            rest = stripped(before, None, false, true);
        } else {
            parts.push(before);
            rest = stripped(after, None, true, false);
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// The text from where `rest` starts.
fn behind_parts<'s>(text: &'s str, rest: &str) -> &'s str {
    // `rest` has lost the space at the text's end.
    let tail = text.len() - stripped(text, None, false, true).len();
    text.get(text.len() - tail - rest.len()..).unwrap_or_default()
}

/// The text to where `rest` ends.
fn before_parts<'s>(text: &'s str, rest: &str) -> &'s str {
    let head = text.len() - stripped(text, None, true, false).len();
    text.get(..head + rest.len()).unwrap_or_default()
}

fn by_text<'s>(text: &'s str, separator: &str, most: Option<usize>, from_right: bool) -> Vec<&'s str> {
    let pieces = most.map_or(usize::MAX, |most| most.saturating_add(1));
    if from_right {
        let mut parts: Vec<&str> = text.rsplitn(pieces, separator).collect();
        parts.reverse();
        parts
    } else {
        text.splitn(pieces, separator).collect()
    }
}

fn expanded(text: &str, size: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for letter in text.chars() {
        if letter == '\t' {
            let count = if size == 0 { 0 } else { size - column % size };
            out.extend(std::iter::repeat_n(' ', count));
            column += count;
        } else {
            out.push(letter);
            column = if matches!(letter, '\n' | '\r') { 0 } else { column + 1 };
        }
    }
    out
}

/// A letter as the first one of a title.
pub(super) fn title_letter(letter: char) -> String {
    match letter {
        'ß' => "Ss".into(),
        'ǆ' | 'Ǆ' | 'ǅ' => "ǅ".into(),
        'ǉ' | 'Ǉ' | 'ǈ' => "ǈ".into(),
        'ǌ' | 'Ǌ' | 'ǋ' => "ǋ".into(),
        'ǳ' | 'Ǳ' | 'ǲ' => "ǲ".into(),
        'ﬀ' => "Ff".into(),
        'ﬁ' => "Fi".into(),
        'ﬂ' => "Fl".into(),
        other => other.to_uppercase().collect(),
    }
}

/// Python's `str.capitalize`.
pub(super) fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(title_letter).unwrap_or_default();
    first + &letters.as_str().to_lowercase()
}

/// The methods that give another text; `None` for those that ask.
fn changed(text: &str, name: &str) -> Option<String> {
    Some(match name {
        "lower" => text.to_lowercase(),
        "upper" => text.to_uppercase(),
        "capitalize" => capitalized(text),
        "casefold" => text.replace(['ß', 'ẞ'], "ss").replace('ς', "σ").to_lowercase(),
        "swapcase" => text
            .chars()
            .map(|c| if c.is_uppercase() { c.to_lowercase().collect::<String>() } else { c.to_uppercase().collect() })
            .collect(),
        "title" => {
            let (mut out, mut inside) = (String::new(), false);
            for letter in text.chars() {
                if inside {
                    out.extend(letter.to_lowercase());
                } else {
                    out.push_str(&title_letter(letter));
                }
                inside = letter.is_lowercase() || letter.is_uppercase();
            }
            out
        }
        _ => return None,
    })
}

/// The methods that ask what a text is.
pub(super) fn is(text: &str, name: &str) -> bool {
    let all = |test: &dyn Fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    match name {
        "isalnum" => all(&char::is_alphanumeric),
        "isalpha" => all(&char::is_alphabetic),
        "isascii" => text.is_ascii(),
        "isdecimal" => all(&|c| c.is_ascii_digit() || c.is_numeric() && !c.is_ascii() && is_decimal(c)),
        "isdigit" => all(&|c| {
            c.is_ascii_digit()
                || is_decimal(c)
                || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨')
        }),
        "isnumeric" => all(&char::is_numeric),
        "isidentifier" => {
            text.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_')
                && text.chars().all(|c| c.is_alphanumeric() || c == '_')
        }
        "islower" => text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase),
        "isupper" => text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase),
        "isprintable" => text.chars().all(is_printable),
        "isspace" => all(&is_space),
        _ => {
            let (mut inside, mut any) = (false, false);
            for letter in text.chars() {
                if letter.is_uppercase() && inside || letter.is_lowercase() && !inside {
                    return false;
                }
                inside = letter.is_lowercase() || letter.is_uppercase();
                any |= inside;
            }
            any
        }
    }
}

/// Digits of other scripts come in runs of ten that begin at a multiple of 10 from these.
fn is_decimal(letter: char) -> bool {
    const ZEROS: [u32; 20] = [
        0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xe50, 0xed0, 0xf20,
        0x1040, 0x17e0, 0x1810, 0xff10, 0x1d7ce,
    ];
    ZEROS.iter().any(|zero| (*zero..zero + 10).contains(&u32::from(letter)))
}
