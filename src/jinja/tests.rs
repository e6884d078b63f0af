//! Jinja's tests: what stands behind `is`.

use super::ast::Comparison;
use super::fault::{Fault, Result};
use super::filters;
use super::machine::{Given, Machine};
use super::methods;
use super::value::{Held, Value, equal};

const NAMES: [&str; 39] = [
    "odd",
    "even",
    "divisibleby",
    "defined",
    "undefined",
    "filter",
    "test",
    "none",
    "boolean",
    "false",
    "true",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "sameas",
    "escaped",
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
];

pub(super) fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

impl Machine<'_> {
    pub(super) fn test(&mut self, name: &str, value: &Value, mut given: Given) -> Result<bool> {
        self.budget.step()?;
        if !is_known(name) {
            return Err(Fault::new(super::fault::Kind::Python, format!("No test named '{name}'.")));
        }
        let comparison = match name {
            "==" | "eq" | "equalto" => Some(Comparison::Equal),
            "!=" | "ne" => Some(Comparison::NotEqual),
            ">" | "gt" | "greaterthan" => Some(Comparison::Greater),
            ">=" | "ge" => Some(Comparison::GreaterEqual),
            "<" | "lt" | "lessthan" => Some(Comparison::Less),
            "<=" | "le" => Some(Comparison::LessEqual),
            "in" => Some(Comparison::In),
            _ => None,
        };
        if comparison.is_some() || matches!(name, "sameas" | "divisibleby") {
            let place = match name {
                "sameas" => "other",
                "divisibleby" => "num",
                _ => "seq",
            };
            let other = given.take(0, place);
            let other = other.ok_or_else(|| Fault::kind_error(format!("the test '{name}' takes one argument")))?;
            given.done(name)?;
            return match comparison {
                Some(comparison) => self.compare(comparison, value, &other),
                None if name == "sameas" => Ok(same(value, &other)),
                None => self.divides(value, &other, &Value::Int(0)),
            };
        }
        given.done(name)?;
        let one = Value::Int(1);
        match name {
            "odd" => self.divides(value, &Value::Int(2), &one),
            "even" => self.divides(value, &Value::Int(2), &Value::Int(0)),
            "filter" | "test" => {
                let known = if name == "filter" { filters::is_known } else { is_known };
                Ok(value.as_str().is_some_and(known))
            }
            "lower" | "upper" => {
                let text = self.string(value)?;
                Ok(methods::is(&text, if name == "lower" { "islower" } else { "isupper" }))
            }
            _ => Ok(kind(name, value)),
        }
    }

    /// Whether `value % by` is `rest`.
    fn divides(&mut self, value: &Value, by: &Value, rest: &Value) -> Result<bool> {
        Ok(equal(&self.binary(super::ast::Operator::Mod, value, by)?, rest))
    }
}

/// Tests that look at the type alone.
fn kind(name: &str, value: &Value) -> bool {
    match name {
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => value.as_str().is_some(),
        "escaped" => matches!(value, Value::Markup(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        // What has a length and takes an index: a text and a dictionary too.
        "sequence" => value.length().is_some() && !matches!(value, Value::View(..)),
        "iterable" => value.length().is_some() || matches!(value, Value::Held(Held::Generator | Held::Loop, _)),
        "callable" => matches!(
            value,
            Value::Function(_)
                | Value::Method(..)
                | Value::Undefined(_)
                | Value::Held(Held::Macro | Held::Joiner | Held::Loop, _)
        ),
        _ => false,
    }
}

/// Python's `is`, as far as it can be told: constants, small numbers, and one object for itself.
fn same(value: &Value, other: &Value) -> bool {
    match (value, other) {
        (Value::None, Value::None) => true,
        (Value::Str(left), Value::Str(right)) => left == right,
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            std::sync::Arc::ptr_eq(left, right)
        }
        (Value::Dict(left), Value::Dict(right)) => std::sync::Arc::ptr_eq(left, right),
        (Value::Bool(_), Value::Bool(_))
        | (Value::Int(_), Value::Int(_))
        | (Value::Held(..), Value::Held(..))
        | (Value::Function(_), Value::Function(_)) => equal(value, other),
        _ => false,
    }
}
