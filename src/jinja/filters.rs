//! Jinja's filters.

use std::cmp::Ordering;

use indexmap::IndexMap;

use super::fault::{Fault, Kind, Result};
use super::format::{percent, truncated};
use super::machine::{Given, Machine};
use super::methods;
use super::text::{html, is_space, lines};
use super::value::{Key, Value, View};

const NAMES: [&str; 54] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];
/// Filters that no chat template has use for, or whose result is another one each time.
const REFUSED: [&str; 6] = ["filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr"];

pub(super) fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

impl Machine<'_> {
    pub(super) fn filter(&mut self, name: &str, value: Value, given: Given, scope: usize) -> Result<Value> {
        self.budget.step()?;
        if REFUSED.contains(&name) {
            return Err(Fault::refused(format!("the filter '{name}', which hf2onnx does not have")));
        }
        match name {
            "map" => self.map(&value, given, scope),
            "select" => self.select(&value, given, false, true),
            "reject" => self.select(&value, given, false, false),
            "selectattr" => self.select(&value, given, true, true),
            "rejectattr" => self.select(&value, given, true, false),
            "tojson" => self.json_text(&value, given),
            "first" | "last" | "length" | "count" | "list" | "items" | "reverse" | "batch" | "slice" | "sum"
            | "min" | "max" | "join" | "unique" | "sort" | "dictsort" | "groupby" | "attr" => {
                self.filter_of_many(name, &value, given)
            }
            "default" | "d" | "safe" | "string" | "abs" | "int" | "float" | "round" => {
                self.filter_of_one(name, value, given)
            }
            _ => self.filter_of_text(name, &value, given),
        }
    }

    fn filter_of_one(&mut self, name: &str, value: Value, mut given: Given) -> Result<Value> {
        let found = match name {
            "default" | "d" => {
                let default = given.take(0, "default_value").unwrap_or_else(|| Value::text(""));
                let falsy = given.take(1, "boolean").is_some_and(|falsy| falsy.truth());
                if value.is_undefined() || falsy && !value.truth() { default } else { value }
            }
            "safe" => Value::Markup(self.string(&value)?.into()),
            "string" if matches!(value, Value::Markup(_)) => value,
            "string" => Value::text(self.string(&value)?),
            "abs" => match (&value, value.as_int()) {
                (Value::Float(number), _) => Value::Float(number.abs()),
                (_, Some(number)) => Value::Int(number.checked_abs().unwrap_or(i128::MAX)),
                (Value::Undefined(reason), _) => return Err(Fault::undefined(reason)),
                _ => return Err(Fault::kind_error(format!("bad operand type for abs(): '{}'", value.kind()))),
            },
            "int" => {
                let default = given.take(0, "default").unwrap_or(Value::Int(0));
                let base = given.take(1, "base").and_then(|base| base.as_int()).unwrap_or(10);
                integer(&value, base)?.map_or(default, Value::Int)
            }
            "float" => {
                let default = given.take(0, "default").unwrap_or(Value::Float(0.0));
                let number = match &value {
                    Value::Undefined(reason) => return Err(Fault::undefined(reason)),
                    other => other.as_str().map_or_else(|| other.as_float(), python_float),
                };
                number.map_or(default, Value::Float)
            }
            _ => {
                let precision = given.take(0, "precision").and_then(|value| value.as_int()).unwrap_or(0);
                let method = given.take(1, "method");
                round(&value, precision, method.as_ref().and_then(Value::as_str).unwrap_or("common"))?
            }
        };
        given.done(name)?;
        Ok(found)
    }

    fn filter_of_text(&mut self, name: &str, value: &Value, mut given: Given) -> Result<Value> {
        let like = |text: String| Value::text_like(text, value);
        if name == "indent" {
            return self.indent(value, given);
        }
        if name == "format" {
            return self.format(value, given);
        }
        if name == "urlencode" {
            given.done(name)?;
            return self.url(value);
        }
        let text = self.string(value)?;
        let found = match name {
            "upper" => like(text.to_uppercase()),
            "lower" => like(text.to_lowercase()),
            "capitalize" => like(methods::capitalized(&text)),
            "title" => Value::text(title(&text)),
            "trim" => {
                let letters = given.take(0, "chars").filter(|value| !matches!(value, Value::None));
                let letters = match &letters {
                    None => None,
                    Some(value) => {
                        Some(value.as_str().ok_or_else(|| Fault::kind_error("strip arg must be None or str"))?)
                    }
                };
                like(methods::stripped(&text, letters, true, true).to_owned())
            }
            "center" => {
                let width = given.take(0, "width").unwrap_or(Value::Int(80));
                given.done(name)?;
                let centered = Given { positional: vec![width], named: IndexMap::new() };
                return self.method(&like(text), "center", centered);
            }
            "replace" => {
                let (old, new) = (given.take(0, "old"), given.take(1, "new"));
                let count = given.take(2, "count").and_then(|value| value.as_int());
                let (Some(old), Some(new)) = (old, new) else {
                    return Err(Fault::kind_error("replace() takes two texts"));
                };
                let (old, new) = (self.string(&old)?, self.string(&new)?);
                let count = count.and_then(|count| usize::try_from(count).ok());
                Value::text(self.replaced(&text, &old, &new, count)?)
            }
            "escape" | "e" | "forceescape" => match value {
                Value::Markup(_) if name != "forceescape" => value.clone(),
                _ => Value::Markup(html(&text).into()),
            },
            "striptags" => Value::text(without_tags(&text)),
            "wordcount" => Value::count(words(&text)),
            "truncate" => truncate(&text, &mut given)?,
            other => return Err(Fault::new(Kind::Python, format!("No filter named '{other}'."))),
        };
        given.done(name)?;
        self.budget.make(found.as_str().map_or(0, str::len))?;
        Ok(found)
    }

    fn format(&mut self, value: &Value, given: Given) -> Result<Value> {
        let text = self.string(value)?;
        let values = if given.named.is_empty() {
            Value::tuple(given.positional)?
        } else if given.positional.is_empty() {
            let named = given.named.iter().map(|(name, value)| (Key::text(name), value.clone()));
            Value::dict(named.collect())?
        } else {
            return Err(Fault::kind_error("can't handle positional and keyword arguments at the same time"));
        };
        let formatted = percent(self, &text, &values, matches!(value, Value::Markup(_)))?;
        Ok(Value::text_like(formatted, value))
    }

    fn indent(&mut self, value: &Value, mut given: Given) -> Result<Value> {
        let width = given.take(0, "width").unwrap_or(Value::Int(4));
        let first = given.take(1, "first").is_some_and(|value| value.truth());
        let blank = given.take(2, "blank").is_some_and(|value| value.truth());
        given.done("indent")?;
        let Some(text) = value.as_str() else {
            return Err(match value {
                Value::Undefined(reason) => Fault::undefined(reason),
                other => Fault::kind_error(format!("unsupported operand type(s) for +=: '{}' and 'str'", other.kind())),
            });
        };
        let count = text.len().min(text.matches(['\n', '\r', '\x0b', '\x0c']).count() + 2);
        let indent = match (width.as_str(), width.as_int()) {
            (Some(indent), _) => {
                self.budget.copies(indent.len(), count)?;
                indent.to_owned()
            }
            (None, Some(width)) => {
                let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
                self.budget.copies(width, count)?;
                " ".repeat(width)
            }
            _ => return Err(Fault::kind_error("an indent that is neither a number nor a text")),
        };
        let mut out = String::new();
        // A line's end is added first, so a text without lines has an empty one.
        let text = text.to_owned() + "\n";
        for (index, line) in lines(&text, false).into_iter().enumerate() {
            if index > 0 {
                out.push('\n');
            }
            if index == 0 && first || index > 0 && (blank || !line.is_empty()) {
                out.push_str(&indent);
            }
            out.push_str(line);
        }
        self.budget.make(out.len())?;
        Ok(Value::text_like(out, value))
    }

    fn url(&mut self, value: &Value) -> Result<Value> {
        if value.as_str().is_some() || !matches!(value, Value::Dict(_) | Value::List(_) | Value::Tuple(_)) {
            let text = self.string(value)?;
            self.budget.copies(text.len(), 3)?;
            return Ok(Value::text(url_quoted(&text, true)));
        }
        let pairs = match value {
            Value::Dict(dict) => self.items(&Value::View(dict.clone(), View::Items))?,
            other => self.items(other)?,
        };
        let mut parts = Vec::new();
        for pair in pairs {
            let pair = self.items(&pair)?;
            let [key, value] = pair.as_slice() else { return Err(Fault::value_error("pairs expected")) };
            let (key, value) = (self.string(key)?, self.string(value)?);
            self.budget.copies(key.len() + value.len(), 3)?;
            parts.push(format!("{}={}", url_quoted(&key, false), url_quoted(&value, false)));
        }
        Ok(Value::text(parts.join("&")))
    }
}

/// Python's `float` of a text.
fn python_float(text: &str) -> Option<f64> {
    let text = methods::stripped(text, None, true, true).to_ascii_lowercase();
    let plain = text.strip_prefix(['+', '-']).unwrap_or(&text);
    if !matches!(plain, "inf" | "infinity" | "nan") && !plain.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let joined = plain.bytes().collect::<Vec<_>>();
    let underscores =
        joined.windows(3).filter(|w| matches!(w, [l, b'_', r] if l.is_ascii_digit() && r.is_ascii_digit()));
    if underscores.count() != plain.matches('_').count() {
        return None;
    }
    text.replace('_', "").parse().ok()
}

/// Jinja's `int`: of a number, of a text in some base, of a text with a fraction.
fn integer(value: &Value, base: i128) -> Result<Option<i128>> {
    if let Value::Undefined(reason) = value {
        return Err(Fault::undefined(reason));
    }
    if let Some(number) = value.as_int() {
        return Ok(Some(number));
    }
    if let Value::Float(number) = value {
        return if number.is_finite() { truncated(*number).map(Some) } else { Ok(None) };
    }
    let Some(text) = value.as_str() else { return Ok(None) };
    let trimmed = methods::stripped(text, None, true, true);
    let unsigned = trimmed.strip_prefix(['+', '-']).unwrap_or(trimmed).to_ascii_lowercase();
    let radix = u32::try_from(base).unwrap_or(10);
    let prefix = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find(|(start, _)| unsigned.starts_with(start));
    let (digits, radix) = match prefix {
        Some((start, of)) if radix == of || radix == 0 => (unsigned.get(start.len()..).unwrap_or_default(), of),
        _ => (unsigned.as_str(), if radix == 0 { 10 } else { radix }),
    };
    if (2..=36).contains(&radix) && !digits.starts_with('_') && !digits.ends_with('_') && !digits.contains("__") {
        let size = i128::from_str_radix(&digits.replace('_', ""), radix).ok();
        if let Some(size) = size.filter(|_| digits.starts_with(|c: char| c.is_ascii_alphanumeric())) {
            return Ok(Some(if trimmed.starts_with('-') { -size } else { size }));
        }
    }
    match python_float(text) {
        Some(number) if number.is_finite() => truncated(number).map(Some),
        _ => Ok(None),
    }
}

/// Python's `round`, and Jinja's two other ways.
fn round(value: &Value, precision: i128, method: &str) -> Result<Value> {
    if !matches!(method, "common" | "ceil" | "floor") {
        return Err(Fault::kind_error("method must be common, ceil or floor"));
    }
    let number = match (value, value.as_float()) {
        (Value::Undefined(reason), _) => return Err(Fault::undefined(reason)),
        (_, Some(number)) => number,
        _ => return Err(Fault::kind_error(format!("type {} doesn't define __round__ method", value.kind()))),
    };
    let places = i32::try_from(precision.clamp(-400, 400)).unwrap_or(0);
    if method != "common" {
        let power = 10_f64.powi(places);
        let scaled = if method == "ceil" { (number * power).ceil() } else { (number * power).floor() };
        return Ok(Value::Float(scaled / power));
    }
    if let Some(whole) = value.as_int() {
        return Ok(Value::Int(round_whole(whole, places)));
    }
    if !number.is_finite() {
        return Ok(Value::Float(number));
    }
    if places >= 0 {
        let digits = usize::try_from(places).unwrap_or(0);
        return Ok(Value::Float(format!("{number:.digits$}").parse().unwrap_or(number)));
    }
    // To tens and hundreds: the nearest, of two the even one.
    let power = 10_f64.powi(-places);
    Ok(Value::Float((number / power).round_ties_even() * power))
}

fn round_whole(whole: i128, places: i32) -> i128 {
    let Some(power) = u32::try_from(-places).ok().filter(|_| places < 0).map(|n| 10_i128.checked_pow(n)) else {
        return whole;
    };
    let Some(power) = power else { return 0 };
    let (quotient, rest) = (whole.div_euclid(power), whole.rem_euclid(power));
    let up = match (rest * 2).cmp(&power) {
        Ordering::Greater => true,
        Ordering::Equal => quotient % 2 != 0,
        Ordering::Less => false,
    };
    (quotient + i128::from(up)) * power
}

/// Jinja's `title`: a word begins behind space and some signs.
fn title(text: &str) -> String {
    let (mut out, mut begins) = (String::new(), true);
    for letter in text.chars() {
        let separates = is_space(letter) || matches!(letter, '-' | '(' | '{' | '[' | '<');
        if begins {
            out.extend(letter.to_uppercase());
        } else {
            out.extend(letter.to_lowercase());
        }
        begins = separates;
    }
    out
}

/// A text without comments and tags, its space joined.
fn without_tags(text: &str) -> String {
    let without = |text: &str, start: &str, end: &str| {
        let (mut out, mut rest) = (String::new(), text);
        while let Some((before, behind)) =
            rest.split_once(start).and_then(|(before, tail)| tail.split_once(end).map(|(_, behind)| (before, behind)))
        {
            out.push_str(before);
            rest = behind;
        }
        out + rest
    };
    let rest = without(&without(text, "<!--", "-->"), "<", ">");
    let plain = rest.replace("&lt;", "<").replace("&gt;", ">").replace("&#34;", "\"").replace("&#39;", "'");
    let plain = plain.replace("&quot;", "\"").replace("&amp;", "&");
    plain.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn words(text: &str) -> usize {
    let (mut count, mut inside) = (0, false);
    for letter in text.chars() {
        let is_word = letter.is_alphanumeric() || letter == '_';
        count += usize::from(is_word && !inside);
        inside = is_word;
    }
    count
}

fn truncate(text: &str, given: &mut Given) -> Result<Value> {
    let number = |value: Option<Value>, default: i128| value.and_then(|value| value.as_int()).unwrap_or(default);
    let length = number(given.take(0, "length"), 255);
    let whole_words = !given.take(1, "killwords").is_some_and(|value| value.truth());
    let end = given.take(2, "end").unwrap_or_else(|| Value::text("..."));
    let leeway = number(given.take(3, "leeway"), 5);
    let end = end.as_str().unwrap_or_default().to_owned();
    let count = i128::try_from(text.chars().count()).unwrap_or(i128::MAX);
    let room = length - i128::try_from(end.chars().count()).unwrap_or(0);
    if room < 0 || leeway < 0 {
        return Err(Fault::new(Kind::Python, "AssertionError: expected a length that has room for the end"));
    }
    if count <= length.saturating_add(leeway) {
        return Ok(Value::text(text));
    }
    let cut: String = text.chars().take(usize::try_from(room).unwrap_or(usize::MAX)).collect();
    let cut = match cut.rsplit_once(' ') {
        Some((words, _)) if whole_words => words.to_owned(),
        _ => cut,
    };
    Ok(Value::text(cut + &end))
}

fn url_quoted(text: &str, slashes: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || slashes && byte == b'/';
        match byte {
            _ if plain => out.push(char::from(byte)),
            b' ' if !slashes => out.push('+'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
