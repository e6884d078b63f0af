//! Python's two ways to format: `'%s' % value` and `'{}'.format(value)`.

use super::fault::{Fault, Result};
use super::machine::{Given, Machine};
use super::text::{ascii, html};
use super::value::{Key, Value};

/// Widest field, and most digits.
const WIDEST: usize = 10_000;

/// A field's format.
#[derive(Debug, Default, Clone)]
struct Field {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// `text % values`; Markup escapes what it takes in.
pub(super) fn percent(machine: &mut Machine<'_>, text: &str, values: &Value, markup: bool) -> Result<String> {
    machine.budget.make(text.len())?;
    let mut list = match values {
        Value::Tuple(list) => list.items.clone(),
        other => vec![other.clone()],
    }
    .into_iter();
    let mut out = String::new();
    let mut used_names = false;
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let mut named = None;
        if letters.next_if_eq(&'(').is_some() {
            named = Some(parenthesized(&mut letters)?);
        }
        let mut next = || list.next().ok_or_else(|| Fault::kind_error("not enough arguments for format string"));
        let (field, kind) = percent_field(&mut letters, &mut next)?;
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            None => next()?,
            Some(name) => {
                used_names = true;
                let Value::Dict(dict) = values else { return Err(Fault::kind_error("format requires a mapping")) };
                let found = dict.entries.get(&Key::text(&name)).cloned();
                found.ok_or_else(|| Fault::kind_error(format!("KeyError: '{name}'")))?
            }
        };
        let done = percent_value(machine, &field, kind, &value, markup)?;
        machine.budget.make(done.len())?;
        out.push_str(&done);
    }
    // A mapping or a list may stay unused.
    let spare = !matches!(values, Value::Dict(_) | Value::List(_) | Value::Undefined(_));
    if list.next().is_some() && !used_names && (spare || matches!(values, Value::Undefined(_))) {
        return Err(Fault::kind_error("not all arguments converted during string formatting"));
    }
    Ok(out)
}

type Letters<'t> = std::iter::Peekable<std::str::Chars<'t>>;

fn parenthesized(letters: &mut Letters<'_>) -> Result<String> {
    let (mut name, mut depth) = (String::new(), 1);
    for letter in letters {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Ok(name);
        }
        name.push(letter);
    }
    Err(Fault::value_error("incomplete format key"))
}

fn percent_field(letters: &mut Letters<'_>, next: &mut dyn FnMut() -> Result<Value>) -> Result<(Field, char)> {
    let mut field = Field::default();
    while let Some(flag) = letters.next_if(|c| matches!(c, '#' | '0' | '-' | ' ' | '+')) {
        match flag {
            '#' => field.alternate = true,
            '0' => field.zero = true,
            '-' => field.align = Some('<'),
            '+' => field.sign = Some('+'),
            _ => field.sign = field.sign.or(Some(' ')),
        }
    }
    let mut star = |letters: &mut Letters<'_>| -> Result<Option<i128>> {
        if letters.next_if_eq(&'*').is_none() {
            return Ok(None);
        }
        next()?.as_int().map(Some).ok_or_else(|| Fault::kind_error("* wants int"))
    };
    match star(letters)? {
        Some(width) => {
            if width < 0 {
                field.align = Some('<');
            }
            field.width = bounded(usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX))?;
        }
        None => field.width = number(letters)?.unwrap_or(0),
    }
    if letters.next_if_eq(&'.').is_some() {
        field.precision = Some(match star(letters)? {
            Some(precision) => bounded(usize::try_from(precision).unwrap_or(0))?,
            None => number(letters)?.unwrap_or(0),
        });
    }
    letters.next_if(|c| matches!(c, 'h' | 'l' | 'L'));
    let kind = letters.next().ok_or_else(|| Fault::value_error("incomplete format"))?;
    Ok((field, kind))
}

fn number(letters: &mut Letters<'_>) -> Result<Option<usize>> {
    let mut found = None;
    while let Some(digit) = letters.next_if(char::is_ascii_digit).and_then(|c| c.to_digit(10)) {
        found = Some(bounded(found.unwrap_or(0_usize).saturating_mul(10).saturating_add(digit as usize))?);
    }
    Ok(found)
}

fn bounded(width: usize) -> Result<usize> {
    if width <= WIDEST { Ok(width) } else { Err(Fault::refused(format!("a field wider than {WIDEST}"))) }
}

fn percent_value(machine: &mut Machine<'_>, field: &Field, kind: char, value: &Value, markup: bool) -> Result<String> {
    let cut = |text: String| match field.precision {
        Some(precision) => text.chars().take(precision).collect(),
        None => text,
    };
    let right = Field { align: field.align.or(Some('>')), zero: false, ..field.clone() };
    match kind {
        's' | 'r' | 'a' => {
            let text = match kind {
                's' => machine.string(value)?,
                'r' => machine.repr(value)?,
                _ => ascii(&machine.repr(value)?),
            };
            let text = if markup && !matches!(value, Value::Markup(_)) { html(&text) } else { text };
            Ok(pad(&right, &cut(text), '>'))
        }
        'c' => Ok(pad(&right, &letter(value)?, '>')),
        'd' | 'i' | 'u' => {
            let whole = match (value, value.as_int()) {
                (_, Some(whole)) => whole,
                (Value::Float(number), _) => truncated(*number)?,
                (Value::Undefined(reason), _) => return Err(Fault::undefined(reason)),
                _ => {
                    let fault = format!("%{kind} format: a real number is required, not {}", value.kind());
                    return Err(Fault::kind_error(fault));
                }
            };
            let mut digits = whole.unsigned_abs().to_string();
            if let Some(precision) = field.precision {
                digits = format!("{digits:0>precision$}");
            }
            Ok(signed(field, whole < 0, &digits, "", '>'))
        }
        'x' | 'X' | 'o' => {
            let Some(whole) = value.as_int() else {
                let fault = format!("%{kind} format: an integer is required, not {}", value.kind());
                return Err(Fault::kind_error(fault));
            };
            let (digits, prefix) = radix(whole, kind);
            Ok(signed(field, whole < 0, &digits, if field.alternate { prefix } else { "" }, '>'))
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let Some(number) = value.as_float() else {
                return Err(match value {
                    Value::Undefined(reason) => Fault::undefined(reason),
                    _ => Fault::kind_error(format!("must be real number, not {}", value.kind())),
                });
            };
            let text = real(number.abs(), kind, field.precision.unwrap_or(6), field.alternate);
            Ok(signed(field, number.is_sign_negative() && !number.is_nan(), &text, "", '>'))
        }
        other => Err(Fault::value_error(format!("unsupported format character '{other}'"))),
    }
}

/// One letter, or the letter of a number.
fn letter(value: &Value) -> Result<String> {
    match (value.as_str(), value.as_int()) {
        (Some(text), _) if text.chars().count() == 1 => Ok(text.to_owned()),
        (None, Some(code)) => {
            let letter = u32::try_from(code).ok().and_then(char::from_u32);
            Ok(letter.ok_or_else(|| Fault::value_error("%c arg not in range"))?.into())
        }
        _ => Err(Fault::kind_error("%c requires int or char")),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the value is in range")]
pub(super) fn truncated(number: f64) -> Result<i128> {
    if number.is_finite() && number.abs() < 1e38 {
        Ok(number.trunc() as i128)
    } else if number.is_finite() {
        Err(Fault::refused("a whole number beyond 128 bits"))
    } else {
        Err(Fault::value_error("cannot convert float infinity or NaN to integer"))
    }
}

fn radix(whole: i128, kind: char) -> (String, &'static str) {
    let size = whole.unsigned_abs();
    match kind {
        'x' => (format!("{size:x}"), "0x"),
        'X' => (format!("{size:X}"), "0X"),
        'o' => (format!("{size:o}"), "0o"),
        _ => (format!("{size:b}"), "0b"),
    }
}

/// A number that is not negative, by one of C's formats.
fn real(number: f64, kind: char, precision: usize, alternate: bool) -> String {
    let upper = kind.is_ascii_uppercase();
    let text = if number.is_nan() {
        "nan".into()
    } else if number.is_infinite() {
        "inf".into()
    } else {
        match kind.to_ascii_lowercase() {
            'f' => format!("{number:.precision$}"),
            'e' => scientific(number, precision),
            _ => general(number, precision.max(1), alternate),
        }
    };
    if upper { text.to_uppercase() } else { text }
}

fn scientific(number: f64, precision: usize) -> String {
    let text = format!("{number:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn general(number: f64, precision: usize, alternate: bool) -> String {
    let text = scientific(number, precision - 1);
    let exponent: i32 = text.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    let digits = i32::try_from(precision).unwrap_or(i32::MAX);
    let trim = |text: &str| {
        if alternate || !text.contains('.') {
            return text.to_owned();
        }
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    if exponent < -4 || exponent >= digits {
        let (mantissa, tail) = text.split_once('e').unwrap_or((&text, "+00"));
        return format!("{}e{tail}", trim(mantissa));
    }
    let places = usize::try_from(digits - 1 - exponent).unwrap_or(0);
    trim(&format!("{number:.places$}"))
}

/// A number with its sign and padding.
fn signed(field: &Field, negative: bool, digits: &str, prefix: &str, default: char) -> String {
    let sign = match (negative, field.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let head = format!("{sign}{prefix}");
    let zeros = field.zero && field.align.is_none() || field.align == Some('=');
    if zeros {
        let fill = if field.zero && field.fill.is_none() { '0' } else { field.fill.unwrap_or(' ') };
        let missing = field.width.saturating_sub(head.chars().count() + digits.chars().count());
        let padding: String = std::iter::repeat_n(fill, missing).collect();
        return format!("{head}{padding}{digits}");
    }
    pad(field, &format!("{head}{digits}"), default)
}

fn pad(field: &Field, text: &str, default: char) -> String {
    let missing = field.width.saturating_sub(text.chars().count());
    let fill = field.fill.unwrap_or(' ');
    let spaces = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
    match field.align.unwrap_or(default) {
        '<' => format!("{text}{}", spaces(missing)),
        '^' => format!("{}{text}{}", spaces(missing / 2), spaces(missing - missing / 2)),
        _ => format!("{}{text}", spaces(missing)),
    }
}

/// `text.format(...)`.
pub(super) fn braces(machine: &mut Machine<'_>, text: &str, given: &Given, depth: usize) -> Result<String> {
    let mut counter = Counter { next: 0, manual: None };
    expand(machine, text, given, &mut counter, depth)
}

/// Fields are counted, or have numbers.
struct Counter {
    next: usize,
    manual: Option<bool>,
}

fn expand(machine: &mut Machine<'_>, text: &str, given: &Given, counter: &mut Counter, depth: usize) -> Result<String> {
    machine.budget.make(text.len())?;
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(rest.get(..at).unwrap_or_default());
        let tail = rest.get(at..).unwrap_or_default();
        if let Some(after) = tail.strip_prefix("{{").or_else(|| tail.strip_prefix("}}")) {
            out.push_str(tail.get(..1).unwrap_or_default());
            rest = after;
            continue;
        }
        let Some(inner) = tail.strip_prefix('{') else {
            return Err(Fault::value_error("Single '}' encountered in format string"));
        };
        if depth == 0 {
            return Err(Fault::value_error("Max string recursion exceeded"));
        }
        let end = closing(inner).ok_or_else(|| Fault::value_error("Single '{' encountered in format string"))?;
        let done = one_field(machine, inner.get(..end).unwrap_or_default(), given, counter, depth)?;
        machine.budget.make(done.len())?;
        out.push_str(&done);
        rest = inner.get(end + 1..).unwrap_or_default();
    }
    out.push_str(rest);
    Ok(out)
}

fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (at, letter) in text.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

fn one_field(
    machine: &mut Machine<'_>,
    field: &str,
    given: &Given,
    counter: &mut Counter,
    depth: usize,
) -> Result<String> {
    let (head, spec) = field.split_once(':').unwrap_or((field, ""));
    let (path, conversion) = match head.rsplit_once('!') {
        Some((path, conversion)) => (path, Some(conversion)),
        None => (head, None),
    };
    let value = field_value(machine, path, given, counter)?;
    let spec = expand(machine, spec, given, counter, depth - 1)?;
    let value = match conversion {
        None => value,
        Some("s") => Value::text(machine.string(&value)?),
        Some("r") => Value::text(machine.repr(&value)?),
        Some("a") => Value::text(ascii(&machine.repr(&value)?)),
        Some(other) => return Err(Fault::value_error(format!("Unknown conversion specifier {other}"))),
    };
    formatted(machine, &value, &spec)
}

fn field_value(machine: &mut Machine<'_>, path: &str, given: &Given, counter: &mut Counter) -> Result<Value> {
    let end = path.find(['.', '[']).unwrap_or(path.len());
    let (first, mut rest) = path.split_at(end);
    let mode = |counter: &mut Counter, manual: bool| match counter.manual.replace(manual) {
        Some(before) if before != manual => {
            Err(Fault::value_error("cannot switch from manual field specification to automatic field numbering"))
        }
        _ => Ok(()),
    };
    let missing = || Fault::new(super::fault::Kind::Python, format!("a format field without a value: {first:?}"));
    let mut value = if first.is_empty() {
        mode(counter, false)?;
        counter.next += 1;
        given.positional.get(counter.next - 1).cloned().ok_or_else(missing)?
    } else if first.chars().all(|c| c.is_ascii_digit()) {
        mode(counter, true)?;
        let place: usize = first.parse().unwrap_or(usize::MAX);
        given.positional.get(place).cloned().ok_or_else(missing)?
    } else {
        given.named.get(first).cloned().ok_or_else(missing)?
    };
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            value = machine.attribute(&value, after.get(..end).unwrap_or_default())?;
            rest = after.get(end..).unwrap_or_default();
        } else {
            let inner = rest.get(1..).unwrap_or_default();
            let (index, after) = inner.split_once(']').ok_or_else(|| Fault::value_error("Missing ']'"))?;
            let index = index.parse().map_or_else(|_| Value::text(index), Value::Int);
            value = machine.item(&value, &index)?;
            rest = after;
        }
    }
    Ok(value)
}

/// Python's `format(value, spec)`.
fn formatted(machine: &mut Machine<'_>, value: &Value, spec: &str) -> Result<String> {
    if spec.is_empty() {
        return machine.string(value);
    }
    let field = parsed(spec)?;
    match value {
        Value::Str(text) | Value::Markup(text) => {
            if !matches!(field.kind, None | Some('s')) || field.sign.is_some() || field.align == Some('=') {
                return Err(Fault::value_error(format!("a format {spec:?} that is not for a text")));
            }
            machine.budget.make(text.len())?;
            let text: String = text.chars().take(field.precision.unwrap_or(usize::MAX)).collect();
            let fill = field.fill.or(field.zero.then_some('0'));
            Ok(pad(&Field { fill, ..field }, &text, '<'))
        }
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => numeric(value, &field, spec),
        other => Err(Fault::kind_error(format!("unsupported format string passed to {}.__format__", other.kind()))),
    }
}

fn parsed(spec: &str) -> Result<Field> {
    let mut field = Field::default();
    let mut letters = spec.chars().peekable();
    let is_align = |c: char| matches!(c, '<' | '>' | '^' | '=');
    let mut two = spec.chars();
    let (first, second) = (two.next(), two.next());
    if second.is_some_and(is_align) {
        (field.fill, field.align) = (first, second);
        letters.nth(1);
    } else if first.is_some_and(is_align) {
        field.align = first;
        letters.next();
    }
    field.sign = letters.next_if(|c| matches!(c, '+' | '-' | ' '));
    field.alternate = letters.next_if_eq(&'#').is_some();
    field.zero = letters.next_if_eq(&'0').is_some();
    field.width = number(&mut letters)?.unwrap_or(0);
    field.grouping = letters.next_if(|c| matches!(c, ',' | '_'));
    if letters.next_if_eq(&'.').is_some() {
        field.precision =
            Some(number(&mut letters)?.ok_or_else(|| Fault::value_error("Format specifier missing precision"))?);
    }
    field.kind = letters.next();
    if letters.next().is_some() {
        return Err(Fault::value_error(format!("Invalid format specifier {spec:?}")));
    }
    Ok(field)
}

fn numeric(value: &Value, field: &Field, spec: &str) -> Result<String> {
    let wrong = || Fault::value_error(format!("a format {spec:?} that is not for a {}", value.kind()));
    let whole = match value {
        Value::Float(_) => None,
        other => other.as_int(),
    };
    let is_real = matches!(field.kind, Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%'));
    if let (Some(whole), false) = (whole, is_real) {
        if field.precision.is_some() {
            return Err(wrong());
        }
        let (digits, prefix) = match field.kind {
            None | Some('d' | 'n') => (whole.unsigned_abs().to_string(), ""),
            Some(kind @ ('x' | 'X' | 'o' | 'b')) => radix(whole, kind),
            Some('c') => {
                let letter = u32::try_from(whole).ok().and_then(char::from_u32).ok_or_else(wrong)?;
                return Ok(pad(field, &letter.to_string(), '<'));
            }
            _ => return Err(wrong()),
        };
        let prefix = if field.alternate { prefix } else { "" };
        return Ok(signed(field, whole < 0, &grouped(field, &digits, prefix, whole < 0), prefix, '>'));
    }
    let number = value.as_float().ok_or_else(wrong)?;
    let size = number.abs();
    let text = match (field.kind, field.precision) {
        (None, None) => super::text::float(size),
        (None, Some(precision)) => {
            let text = general(size, precision.max(1), field.alternate);
            if text.contains(['.', 'e', 'n']) { text } else { format!("{text}.0") }
        }
        (Some('%'), precision) => format!("{}%", real(size * 100.0, 'f', precision.unwrap_or(6), false)),
        (Some('n'), precision) => real(size, 'g', precision.unwrap_or(6), field.alternate),
        (Some(kind @ ('e' | 'E' | 'f' | 'F' | 'g' | 'G')), precision) => {
            real(size, kind, precision.unwrap_or(6), field.alternate)
        }
        _ => return Err(wrong()),
    };
    let negative = number.is_sign_negative() && !number.is_nan();
    Ok(signed(field, negative, &grouped(field, &text, "", negative), "", '>'))
}

/// Digits with a separator before each third.
fn grouped(field: &Field, text: &str, prefix: &str, negative: bool) -> String {
    let Some(separator) = field.grouping else { return text.to_owned() };
    let end = text.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(end);
    let size = if matches!(field.kind, Some('x' | 'X' | 'o' | 'b')) { 4 } else { 3 };
    let mut digits: Vec<char> = whole.chars().collect();
    if field.zero && field.align.is_none() {
        // Zeros are grouped too.
        let signs = usize::from(negative || matches!(field.sign, Some('+' | ' '))) + prefix.len() + rest.len();
        let room = field.width.saturating_sub(signs);
        while digits.len() + (digits.len().max(1) - 1) / size < room {
            digits.insert(0, '0');
        }
    }
    let count = digits.len();
    let mut out = String::new();
    for (index, digit) in digits.into_iter().enumerate() {
        if index > 0 && (count - index).is_multiple_of(size) {
            out.push(separator);
        }
        out.push(digit);
    }
    out + rest
}
