//! Python's arithmetic.

use super::ast::Operator;
use super::fault::{Fault, Kind, Result};
use super::format;
use super::machine::Machine;
use super::text::html;
use super::value::Value;

impl Machine<'_> {
    pub(super) fn binary(&mut self, operator: Operator, left: &Value, right: &Value) -> Result<Value> {
        if let (Operator::Mod, Some(text)) = (operator, left.as_str()) {
            let formatted = format::percent(self, text, right, matches!(left, Value::Markup(_)))?;
            return Ok(Value::text_like(formatted, left));
        }
        if let Value::Undefined(reason) = left {
            return Err(Fault::undefined(reason));
        }
        if let Value::Undefined(reason) = right {
            return Err(Fault::undefined(reason));
        }
        if let (Some(left), Some(right)) = (left.as_int(), right.as_int()) {
            return integers(operator, left, right);
        }
        if let (Some(left), Some(right)) = (left.as_float(), right.as_float()) {
            return floats(operator, left, right);
        }
        match operator {
            Operator::Add => self.add(left, right),
            Operator::Mul => match (left.as_int(), right.as_int()) {
                (None, Some(count)) => self.repeat(left, count),
                (Some(count), None) => self.repeat(right, count),
                _ => Err(unsupported(operator, left, right)),
            },
            _ => Err(unsupported(operator, left, right)),
        }
    }

    fn add(&mut self, left: &Value, right: &Value) -> Result<Value> {
        if let (Some(first), Some(second)) = (left.as_str(), right.as_str()) {
            self.budget.make(first.len() + second.len())?;
            return Ok(match (left, right) {
                (Value::Str(_), Value::Str(_)) => Value::text([first, second].concat()),
                (Value::Markup(_), Value::Str(_)) => Value::Markup([first, &html(second)].concat().into()),
                (Value::Str(_), _) => Value::Markup([&html(first), second].concat().into()),
                _ => Value::Markup([first, second].concat().into()),
            });
        }
        match (left, right) {
            (Value::List(first), Value::List(second)) | (Value::Tuple(first), Value::Tuple(second)) => {
                self.budget.items(first.items.len() + second.items.len())?;
                let items = first.items.iter().chain(&second.items).cloned().collect();
                if matches!(left, Value::List(_)) { Value::list(items) } else { Value::tuple(items) }
            }
            _ => Err(unsupported(Operator::Add, left, right)),
        }
    }

    fn repeat(&mut self, value: &Value, count: i128) -> Result<Value> {
        let count = if count <= 0 { 0 } else { usize::try_from(count).unwrap_or(usize::MAX) };
        if let Some(text) = value.as_str() {
            self.budget.copies(text.len(), count)?;
            return Ok(Value::text_like(text.repeat(count), value));
        }
        match value {
            Value::List(list) | Value::Tuple(list) => {
                self.budget.items(list.items.len().saturating_mul(count))?;
                let length = list.items.len().saturating_mul(count);
                let items = list.items.iter().cycle().take(length).cloned().collect();
                if matches!(value, Value::List(_)) { Value::list(items) } else { Value::tuple(items) }
            }
            other => Err(unsupported(Operator::Mul, other, &Value::Int(0))),
        }
    }
}

pub(super) fn negative(value: &Value) -> Result<Value> {
    match (value, value.as_int()) {
        (Value::Undefined(reason), _) => Err(Fault::undefined(reason)),
        (Value::Float(number), _) => Ok(Value::Float(-number)),
        (_, Some(number)) => number.checked_neg().map(Value::Int).ok_or_else(too_large),
        _ => Err(Fault::kind_error(format!("bad operand type for unary -: '{}'", value.kind()))),
    }
}

pub(super) fn positive(value: &Value) -> Result<Value> {
    match (value, value.as_int()) {
        (Value::Undefined(reason), _) => Err(Fault::undefined(reason)),
        (Value::Float(number), _) => Ok(Value::Float(*number)),
        (_, Some(number)) => Ok(Value::Int(number)),
        _ => Err(Fault::kind_error(format!("bad operand type for unary +: '{}'", value.kind()))),
    }
}

fn symbol(operator: Operator) -> &'static str {
    match operator {
        Operator::Add => "+",
        Operator::Sub => "-",
        Operator::Mul => "*",
        Operator::Div => "/",
        Operator::FloorDiv => "//",
        Operator::Mod => "%",
        Operator::Pow => "**",
    }
}

fn unsupported(operator: Operator, left: &Value, right: &Value) -> Fault {
    let (operator, left, right) = (symbol(operator), left.kind(), right.kind());
    Fault::kind_error(format!("unsupported operand type(s) for {operator}: '{left}' and '{right}'"))
}

fn too_large() -> Fault {
    Fault::refused("a whole number beyond 128 bits")
}

fn by_zero() -> Fault {
    Fault::new(Kind::Python, "ZeroDivisionError: division by zero")
}

#[expect(clippy::cast_precision_loss, reason = "as Python divides")]
fn integers(operator: Operator, left: i128, right: i128) -> Result<Value> {
    let whole = |result: Option<i128>| result.map(Value::Int).ok_or_else(too_large);
    match operator {
        Operator::Add => whole(left.checked_add(right)),
        Operator::Sub => whole(left.checked_sub(right)),
        Operator::Mul => whole(left.checked_mul(right)),
        Operator::Div | Operator::FloorDiv | Operator::Mod if right == 0 => Err(by_zero()),
        Operator::Div => Ok(Value::Float(left as f64 / right as f64)),
        Operator::FloorDiv => {
            let quotient = left.checked_div(right).ok_or_else(too_large)?;
            let exact = quotient.checked_mul(right) == Some(left);
            whole(if exact || (left < 0) == (right < 0) { Some(quotient) } else { quotient.checked_sub(1) })
        }
        Operator::Mod => {
            let rest = left.checked_rem(right).unwrap_or(0);
            whole(if rest != 0 && (rest < 0) != (right < 0) { rest.checked_add(right) } else { Some(rest) })
        }
        Operator::Pow => match u32::try_from(right) {
            Ok(power) => whole(left.checked_pow(power)),
            Err(_) if right < 0 => floats(operator, left as f64, right as f64),
            Err(_) => whole(match left {
                0 | 1 => Some(left),
                -1 => Some(if right % 2 == 0 { 1 } else { -1 }),
                _ => None,
            }),
        },
    }
}

fn floats(operator: Operator, left: f64, right: f64) -> Result<Value> {
    let number = match operator {
        Operator::Add => left + right,
        Operator::Sub => left - right,
        Operator::Mul => left * right,
        Operator::Div | Operator::FloorDiv | Operator::Mod if right == 0.0 => return Err(by_zero()),
        Operator::Div => left / right,
        Operator::FloorDiv => ((left - modulo(left, right)) / right).round(),
        Operator::Mod => modulo(left, right),
        Operator::Pow if left == 0.0 && right < 0.0 => return Err(by_zero()),
        Operator::Pow => {
            let power = left.powf(right);
            if power.is_infinite() && left.is_finite() && right.is_finite() {
                return Err(Fault::new(Kind::Python, "OverflowError: result too large"));
            }
            if power.is_nan() && !left.is_nan() && !right.is_nan() {
                return Err(Fault::refused("a complex number"));
            }
            power
        }
    };
    Ok(Value::Float(number))
}

fn modulo(left: f64, right: f64) -> f64 {
    let rest = left % right;
    if rest != 0.0 && (rest < 0.0) != (right < 0.0) { rest + right } else { rest }
}
