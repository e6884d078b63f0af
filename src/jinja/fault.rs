//! Why a template does not render.

use std::fmt;

pub(crate) type Result<T, E = Fault> = std::result::Result<T, E>;

/// What went wrong, in Jinja's words where it has some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) message: String,
    /// Line of the template, from 1; 0 where it is not known.
    pub(crate) line: usize,
}

/// Kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is no template.
    Syntax,
    /// `raise_exception` was called.
    Raised,
    /// Something was used that is not defined.
    Undefined,
    /// An operation that Python refuses.
    Python,
    /// It asks for more than a template may have, or for what is not offered here.
    Refused,
}

impl Fault {
    pub(super) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), line: 0 }
    }

    pub(super) fn syntax(message: impl Into<String>, line: usize) -> Self {
        Self { kind: Kind::Syntax, message: message.into(), line }
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(Kind::Refused, message)
    }

    /// Python's `TypeError`, the usual one.
    pub(super) fn kind_error(message: impl Into<String>) -> Self {
        Self::new(Kind::Python, format!("TypeError: {}", message.into()))
    }

    pub(super) fn value_error(message: impl Into<String>) -> Self {
        Self::new(Kind::Python, format!("ValueError: {}", message.into()))
    }

    pub(super) fn undefined(reason: &str) -> Self {
        Self::new(Kind::Undefined, reason)
    }

    /// The line, where none is known yet.
    pub(super) fn at(mut self, line: usize) -> Self {
        if self.line == 0 {
            self.line = line;
        }
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)?;
        if self.line > 0 { write!(out, " (line {} of the template)", self.line) } else { Ok(()) }
    }
}
