//! A template's tokens, cut and trimmed as Jinja 3.1 does with `trim_blocks` and `lstrip_blocks`.

use super::fault::{Fault, Result};
use super::text::is_space;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
    End,
}

/// Longest first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

/// The tokens with their lines; the last one is `End`.
pub(super) fn tokens(source: &str) -> Result<Vec<(Token, usize)>> {
    let source = newlines(source);
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer { source, at: 0, line: 1, line_starts: true, found: Vec::new() };
    lexer.root()?;
    lexer.push(Token::End);
    Ok(lexer.found)
}

/// One kind of line end: what Python's text files and Jinja make of them.
fn newlines(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

struct Lexer<'s> {
    source: &'s str,
    at: usize,
    line: usize,
    /// What was read last ends a line, or nothing was read.
    line_starts: bool,
    found: Vec<(Token, usize)>,
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        self.source.get(self.at..).unwrap_or_default()
    }

    fn push(&mut self, token: Token) {
        self.found.push((token, self.line));
    }

    /// Goes on behind so many bytes.
    fn skip(&mut self, bytes: usize) {
        let skipped = self.rest().get(..bytes).unwrap_or_default();
        self.line += skipped.matches('\n').count();
        self.line_starts = skipped.ends_with('\n');
        self.at += bytes;
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.skip(rest.len() - rest.trim_start_matches(is_space).len());
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Fault::syntax(message, self.line))
    }

    /// Text and what it surrounds.
    fn root(&mut self) -> Result<()> {
        while !self.rest().is_empty() {
            let Some((start, open)) = opening(self.rest()) else {
                let text = self.rest();
                self.data(text);
                return Ok(());
            };
            let rest = self.rest();
            let (text, tag) = (rest.get(..start).unwrap_or_default(), rest.get(start + 2..).unwrap_or_default());
            let raw = if open == "{%" { raw_begin(tag) } else { None };
            let sign = tag.chars().next().filter(|c| matches!(c, '-' | '+'));
            self.data_before(text, sign, open != "{{");
            if let Some(length) = raw {
                self.skip(2 + length);
                self.raw()?;
                continue;
            }
            self.skip(2 + usize::from(sign.is_some()));
            match open {
                "{#" => self.comment()?,
                "{%" => self.inside(Token::BlockBegin)?,
                _ => self.inside(Token::VariableBegin)?,
            }
        }
        Ok(())
    }

    fn data(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Data(text.to_owned()));
        }
        self.skip(text.len());
    }

    /// The text in front of a tag, without the space that the tag takes.
    fn data_before(&mut self, text: &'s str, sign: Option<char>, is_block: bool) {
        let kept = match sign {
            Some('-') => text.trim_end_matches(is_space),
            None if is_block => {
                let start = text.rfind('\n').map_or(0, |at| at + 1);
                let indent = text.get(start..).unwrap_or_default();
                let starts = start > 0 || self.line_starts;
                if starts && indent.chars().all(is_space) { text.get(..start).unwrap_or_default() } else { text }
            }
            _ => text,
        };
        if !kept.is_empty() {
            self.push(Token::Data(kept.to_owned()));
        }
        self.skip(text.len());
    }

    fn comment(&mut self) -> Result<()> {
        let rest = self.rest();
        let Some(end) = rest.find("#}") else { return self.fail("Missing end of comment tag") };
        let sign = rest.get(..end).and_then(|text| text.chars().next_back());
        self.skip(end + 2);
        self.behind_block(sign);
        Ok(())
    }

    /// Behind a block or comment: `-` takes all space, no sign takes a line's end.
    fn behind_block(&mut self, sign: Option<char>) {
        match sign {
            Some('-') => self.skip_space(),
            Some('+') => {}
            _ if self.rest().starts_with('\n') => self.skip(1),
            _ => {}
        }
    }

    fn raw(&mut self) -> Result<()> {
        let rest = self.rest();
        let mut from = 0;
        while let Some(found) = rest.get(from..).and_then(|rest| rest.find("{%")) {
            let start = from + found;
            let tag = rest.get(start + 2..).unwrap_or_default();
            let begin = tag.chars().next().filter(|c| matches!(c, '-' | '+'));
            let inner = tag.get(usize::from(begin.is_some())..).unwrap_or_default();
            if let Some(after) = inner.trim_start_matches(is_space).strip_prefix("endraw") {
                let after = after.trim_start_matches(is_space);
                let end = after.chars().next().filter(|c| matches!(c, '-' | '+'));
                if let Some(behind) = after.get(usize::from(end.is_some())..).and_then(|a| a.strip_prefix("%}")) {
                    let text = rest.get(..start).unwrap_or_default();
                    self.data_before(text, begin, true);
                    self.skip(rest.len() - text.len() - behind.len());
                    self.behind_block(end);
                    return Ok(());
                }
            }
            from = start + 2;
        }
        self.fail("Missing end of raw directive")
    }

    /// The inside of a block or an expression.
    fn inside(&mut self, begin: Token) -> Result<()> {
        let is_block = begin == Token::BlockBegin;
        self.push(begin);
        let mut open: Vec<char> = Vec::new();
        loop {
            if open.is_empty() && self.end_of_tag(is_block) {
                return Ok(());
            }
            let rest = self.rest();
            let Some(first) = rest.chars().next() else {
                return Ok(());
            };
            if is_space(first) {
                self.skip_space();
            } else if first.is_ascii_digit() {
                self.number()?;
            } else if first.is_alphanumeric() || first == '_' {
                let length = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
                let name = rest.get(..length).unwrap_or_default();
                if !(first.is_alphabetic() || first == '_') {
                    return self.fail("Invalid character in identifier");
                }
                self.push(Token::Name(name.to_owned()));
                self.skip(length);
            } else if first == '\'' || first == '"' {
                self.string(first)?;
            } else {
                self.operator(&mut open)?;
            }
        }
    }

    /// True at the tag's end, which is skipped.
    fn end_of_tag(&mut self, is_block: bool) -> bool {
        let close = if is_block { "%}" } else { "}}" };
        let rest = self.rest();
        let sign = rest.chars().next().filter(|c| *c == '-' || *c == '+' && is_block);
        let tag = rest.get(usize::from(sign.is_some())..).unwrap_or_default();
        if !tag.starts_with(close) {
            return false;
        }
        self.push(if is_block { Token::BlockEnd } else { Token::VariableEnd });
        self.skip(2 + usize::from(sign.is_some()));
        if is_block {
            self.behind_block(sign);
        } else if sign.is_some() {
            self.skip_space();
        }
        true
    }

    fn operator(&mut self, open: &mut Vec<char>) -> Result<()> {
        let rest = self.rest();
        let Some(operator) = OPERATORS.iter().find(|operator| rest.starts_with(**operator)) else {
            let odd = rest.chars().next().unwrap_or_default();
            return self.fail(format!("unexpected char {odd:?} at {}", self.at));
        };
        match *operator {
            "{" => open.push('}'),
            "(" => open.push(')'),
            "[" => open.push(']'),
            "}" | ")" | "]" => match open.pop() {
                None => return self.fail(format!("unexpected '{operator}'")),
                Some(expected) if !operator.starts_with(expected) => {
                    return self.fail(format!("unexpected '{operator}', expected '{expected}'"));
                }
                Some(_) => {}
            },
            _ => {}
        }
        self.push(Token::Op(operator));
        self.skip(operator.len());
        Ok(())
    }

    fn number(&mut self) -> Result<()> {
        let rest = self.rest();
        let after_dot = self.source.get(..self.at).is_some_and(|before| before.ends_with('.'));
        let whole = digits(rest, |c| c.is_ascii_digit());
        if !after_dot && let Some(length) = float_end(rest, whole) {
            let text: String = rest.get(..length).unwrap_or_default().replace('_', "");
            self.push(Token::Float(text.parse().unwrap_or(f64::INFINITY)));
            self.skip(length);
            return Ok(());
        }
        let prefix = rest.get(..2).unwrap_or_default().to_ascii_lowercase();
        let radix = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find(|(start, _)| prefix == *start);
        let (skip, radix) = radix.map_or((0, 10), |(_, radix)| (2, radix));
        let body = rest.get(skip..).unwrap_or_default();
        let mut length = digits(body.trim_start_matches('_'), |c| c.is_digit(radix));
        length += body.len() - body.trim_start_matches('_').len();
        if radix == 10 && rest.starts_with('0') {
            length = digits(rest, |c| c == '0');
        }
        let text = body.get(..length).unwrap_or_default().replace('_', "");
        match i128::from_str_radix(&text, radix) {
            Ok(number) => self.push(Token::Int(number)),
            Err(_) => return self.fail(format!("a number that is too large: {text}")),
        }
        self.skip(skip + length);
        Ok(())
    }

    fn string(&mut self, quote: char) -> Result<()> {
        let rest = self.rest();
        let mut letters = rest.char_indices().skip(1);
        let end = loop {
            match letters.next() {
                None => return self.fail(format!("unexpected char {quote:?} at {}", self.at)),
                Some((_, '\\')) => drop(letters.next()),
                Some((at, letter)) if letter == quote => break at,
                Some(_) => {}
            }
        };
        let text = unescaped(rest.get(1..end).unwrap_or_default()).map_err(|e| Fault::syntax(e, self.line))?;
        self.push(Token::Str(text));
        self.skip(end + 1);
        Ok(())
    }
}

/// The first tag in a text.
fn opening(text: &str) -> Option<(usize, &'static str)> {
    text.match_indices('{').find_map(|(at, _)| {
        let behind = text.get(at..)?;
        let open = ["{%", "{{", "{#"].into_iter().find(|open| behind.starts_with(open))?;
        Some((at, open))
    })
}

/// The length of a tag that begins raw text, behind its `{%`.
fn raw_begin(tag: &str) -> Option<usize> {
    let signed = tag.chars().next().is_some_and(|c| matches!(c, '-' | '+'));
    let inner = tag.get(usize::from(signed)..)?.trim_start_matches(is_space).strip_prefix("raw")?;
    let inner = inner.trim_start_matches(is_space);
    if let Some(rest) = inner.strip_prefix("-%}") {
        return Some(tag.len() - rest.trim_start_matches(is_space).len());
    }
    inner.strip_prefix("%}").map(|rest| tag.len() - rest.len())
}

/// Length of digits with single underscores between them.
fn digits(text: &str, is_digit: impl Fn(char) -> bool) -> usize {
    let mut length = 0;
    let mut letters = text.char_indices().peekable();
    while let Some((at, letter)) = letters.next() {
        let joins = letter == '_' && at > 0 && letters.peek().is_some_and(|(_, next)| is_digit(*next));
        if !(is_digit(letter) || joins) {
            break;
        }
        length = at + letter.len_utf8();
    }
    length
}

/// The end of a number with a fraction or an exponent, behind its whole part.
fn float_end(text: &str, whole: usize) -> Option<usize> {
    let rest = text.get(whole..)?;
    let fraction = rest.strip_prefix('.').map_or(0, |rest| digits(rest, |c| c.is_ascii_digit()));
    let mut end = whole + if fraction > 0 { fraction + 1 } else { 0 };
    let exponent = text.get(end..).and_then(|rest| rest.strip_prefix(['e', 'E'])).and_then(|rest| {
        let unsigned = rest.strip_prefix(['+', '-']).unwrap_or(rest);
        let length = digits(unsigned, |c| c.is_ascii_digit());
        (length > 0).then_some(1 + rest.len() - unsigned.len() + length)
    });
    end += exponent.unwrap_or(0);
    (fraction > 0 || exponent.is_some()).then_some(end)
}

/// A text in quotes, with Python's escapes.
fn unescaped(text: &str) -> Result<String, String> {
    let mut result = String::with_capacity(text.len());
    let text = newlines(text);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        if letter != '\\' {
            result.push(letter);
            continue;
        }
        match letters.next() {
            None => return Err("\\ at end of string".into()),
            Some('\n') => {}
            Some('n') => result.push('\n'),
            Some('t') => result.push('\t'),
            Some('r') => result.push('\r'),
            Some('a') => result.push('\x07'),
            Some('b') => result.push('\x08'),
            Some('f') => result.push('\x0c'),
            Some('v') => result.push('\x0b'),
            Some(same @ ('\\' | '\'' | '"')) => result.push(same),
            Some('x') => result.push(code(&mut letters, 2)?),
            Some('u') => result.push(code(&mut letters, 4)?),
            Some('U') => result.push(code(&mut letters, 8)?),
            Some('N') => return Err("names of characters (\\N) are not known here".into()),
            Some(digit) if digit.is_digit(8) => result.push(octal(digit, &mut letters)),
            Some(other) => {
                result.push('\\');
                result.push_str(&spelled(other));
            }
        }
    }
    Ok(result)
}

/// A letter behind a backslash that means nothing. Jinja writes letters outside of ASCII as escapes first.
fn spelled(letter: char) -> String {
    match u32::from(letter) {
        0..=0x7f => letter.to_string(),
        number @ 0x80..=0xff => format!("x{number:02x}"),
        number @ 0x100..=0xffff => format!("u{number:04x}"),
        number => format!("U{number:08x}"),
    }
}

fn code(letters: &mut std::str::Chars<'_>, length: usize) -> Result<char, String> {
    let digits: String = letters.clone().take(length).collect();
    let wrong = || format!("an escape that is no character: {digits:?}");
    if digits.chars().count() < length {
        return Err(wrong());
    }
    let letter = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32).ok_or_else(wrong)?;
    letters.nth(length - 1);
    Ok(letter)
}

fn octal(first: char, letters: &mut std::str::Chars<'_>) -> char {
    let mut number = first.to_digit(8).unwrap_or(0);
    for _ in 0..2 {
        let Some(digit) = letters.clone().next().and_then(|c| c.to_digit(8)) else { break };
        letters.next();
        number = number * 8 + digit;
    }
    char::from_u32(number).unwrap_or_default()
}
