//! Expressions: names, operators, attributes, items and calls, as Python and Jinja's sandbox have them.

use std::cmp::Ordering;
use std::sync::Arc;

use indexmap::IndexMap;

use super::ast::{Arguments, Comparison, Constant, Expr};
use super::fault::{Fault, Result};
use super::globals;
use super::machine::{Given, Machine};
use super::methods;
use super::operators::{negative, positive};
use super::value::{Held, Key, Value, View, equal};

impl<'t> Machine<'t> {
    pub(super) fn evaluate(&mut self, expr: &'t Expr, scope: usize) -> Result<Value> {
        self.budget.step()?;
        self.nested(|machine| machine.expression(expr, scope))
    }

    fn all(&mut self, exprs: &'t [Expr], scope: usize) -> Result<Vec<Value>> {
        self.budget.items(exprs.len())?;
        exprs.iter().map(|expr| self.evaluate(expr, scope)).collect()
    }

    fn expression(&mut self, expr: &'t Expr, scope: usize) -> Result<Value> {
        match expr {
            Expr::Constant(constant) => Ok(value_of(constant)),
            Expr::Name(name) => self.name(name, scope),
            Expr::Tuple(items) => Value::tuple(self.all(items, scope)?),
            Expr::List(items) => Value::list(self.all(items, scope)?),
            Expr::Dict(pairs) => self.dictionary_of(pairs, scope),
            Expr::If { test, yes, no } => match (self.evaluate(test, scope)?.truth(), no) {
                (true, _) => self.evaluate(yes, scope),
                (false, Some(no)) => self.evaluate(no, scope),
                (false, None) => {
                    Ok(Value::undefined("the inline if-expression evaluated to false and no else section was defined."))
                }
            },
            Expr::Or(left, right) => {
                let left = self.evaluate(left, scope)?;
                if left.truth() { Ok(left) } else { self.evaluate(right, scope) }
            }
            Expr::And(left, right) => {
                let left = self.evaluate(left, scope)?;
                if left.truth() { self.evaluate(right, scope) } else { Ok(left) }
            }
            Expr::Not(operand) => Ok(Value::Bool(!self.evaluate(operand, scope)?.truth())),
            Expr::Compare(first, others) => self.comparisons(first, others, scope),
            Expr::Binary(operator, left, right) => {
                let (left, right) = (self.evaluate(left, scope)?, self.evaluate(right, scope)?);
                self.binary(*operator, &left, &right)
            }
            Expr::Concat(parts) => self.concatenated(parts, scope),
            Expr::Negative(operand) => negative(&self.evaluate(operand, scope)?),
            Expr::Positive(operand) => positive(&self.evaluate(operand, scope)?),
            Expr::Attribute(of, name) => {
                let of = self.evaluate(of, scope)?;
                self.attribute(&of, name)
            }
            Expr::Item(of, index) => {
                let (of, index) = (self.evaluate(of, scope)?, self.evaluate(index, scope)?);
                self.item(&of, &index)
            }
            Expr::Slice(of, parts) => self.sliced(of, parts, scope),
            Expr::Call(..) => self.call_with(expr, scope, None),
            Expr::Filter(operand, name, arguments) => {
                let operand = match operand {
                    Some(operand) => self.evaluate(operand, scope)?,
                    None => Value::undefined("a filter without an operand"),
                };
                let given = self.arguments(arguments, scope)?;
                self.filter(name, operand, given, scope)
            }
            Expr::Test(operand, name, arguments) => {
                let operand = self.evaluate(operand, scope)?;
                let given = self.arguments(arguments, scope)?;
                Ok(Value::Bool(self.test(name, &operand, given)?))
            }
        }
    }

    fn dictionary_of(&mut self, pairs: &'t [(Expr, Expr)], scope: usize) -> Result<Value> {
        let mut entries = IndexMap::new();
        for (key, value) in pairs {
            self.budget.items(2)?;
            let key = Key::new(self.evaluate(key, scope)?)?;
            entries.insert(key, self.evaluate(value, scope)?);
        }
        Value::dict(entries)
    }

    fn concatenated(&mut self, parts: &'t [Expr], scope: usize) -> Result<Value> {
        let mut text = String::new();
        for part in parts {
            let value = self.evaluate(part, scope)?;
            text += &self.string(&value)?;
        }
        self.budget.make(text.len())?;
        Ok(Value::text(text))
    }

    fn sliced(&mut self, of: &'t Expr, parts: &'t [Option<Expr>; 3], scope: usize) -> Result<Value> {
        let of = self.evaluate(of, scope)?;
        let mut bounds = [None; 3];
        for (bound, part) in bounds.iter_mut().zip(parts.iter()) {
            *bound = match part {
                Some(part) => bound_of(&self.evaluate(part, scope)?)?,
                None => None,
            };
        }
        self.slice(&of, bounds)
    }

    fn name(&self, name: &str, scope: usize) -> Result<Value> {
        if let Some(value) = self.lookup(name, scope) {
            return Ok(value);
        }
        if name == "self" {
            return Err(Fault::refused("`self`: a chat template has no blocks to call"));
        }
        let global = globals::NAMES.iter().find(|global| **global == name);
        Ok(global.map_or_else(|| Value::undefined(&format!("'{name}' is undefined")), |name| Value::Function(name)))
    }

    pub(super) fn arguments(&mut self, arguments: &'t Arguments, scope: usize) -> Result<Given> {
        let mut given = Given { positional: self.all(&arguments.positional, scope)?, named: IndexMap::new() };
        if let Some(star) = &arguments.star {
            let star = self.evaluate(star, scope)?;
            given.positional.extend(self.items(&star)?);
        }
        for (name, value) in &arguments.named {
            let value = self.evaluate(value, scope)?;
            if given.named.insert(name.clone(), value).is_some() {
                return Err(Fault::syntax(format!("keyword argument repeated: {name}"), 0));
            }
        }
        if let Some(stars) = &arguments.stars {
            let stars = self.evaluate(stars, scope)?;
            let Value::Dict(dict) = &stars else {
                return Err(Fault::kind_error(format!("argument after ** must be a mapping, not {}", stars.kind())));
            };
            self.budget.items(dict.entries.len())?;
            for (key, value) in &dict.entries {
                let Some(name) = key.0.as_str() else { return Err(Fault::kind_error("keywords must be strings")) };
                if given.named.insert(name.to_owned(), value.clone()).is_some() {
                    return Err(Fault::kind_error(format!("got multiple values for keyword argument '{name}'")));
                }
            }
        }
        Ok(given)
    }

    /// A call, perhaps with the body of a call block.
    pub(super) fn call_with(&mut self, call: &'t Expr, scope: usize, caller: Option<Value>) -> Result<Value> {
        let Expr::Call(function, arguments) = call else { return Ok(Value::None) };
        let function = self.evaluate(function, scope)?;
        let mut given = self.arguments(arguments, scope)?;
        if let Some(caller) = caller {
            given.named.insert("caller".into(), caller);
        }
        match function {
            Value::Undefined(reason) => Err(Fault::undefined(&reason)),
            Value::Function(name) => self.global(name, given),
            Value::Method(of, name) => self.method(&of, name, given),
            Value::Held(Held::Macro, index) => self.call_macro(index, given),
            Value::Held(Held::Loop, index) => self.recurse(index, &given),
            Value::Held(Held::Joiner, index) => Ok(self.join_next(index)),
            other => Err(Fault::kind_error(format!("'{}' object is not callable", other.kind()))),
        }
    }

    /// What a value holds, in order; a generator is used up.
    pub(super) fn items(&mut self, value: &Value) -> Result<Vec<Value>> {
        let count = match value {
            Value::Held(Held::Generator | Held::Loop, _) => 0,
            other => other.length().unwrap_or(0),
        };
        self.budget.items(count)?;
        Ok(match value {
            Value::Undefined(_) => Vec::new(),
            Value::Str(text) => text.chars().map(|c| Value::text(String::from(c))).collect(),
            Value::Markup(text) => text.chars().map(|c| Value::Markup(String::from(c).into())).collect(),
            Value::List(list) | Value::Tuple(list) => list.items.clone(),
            Value::Dict(dict) | Value::View(dict, View::Keys) => dict.entries.keys().map(|key| key.0.clone()).collect(),
            Value::View(dict, View::Values) => dict.entries.values().cloned().collect(),
            Value::View(dict, View::Items) => {
                self.budget.items(2 * count)?;
                let pairs = dict.entries.iter().map(|(key, value)| Value::tuple(vec![key.0.clone(), value.clone()]));
                pairs.collect::<Result<_>>()?
            }
            Value::Range(range) => (0..range.count).map(|at| range.at(at)).collect(),
            Value::Held(Held::Generator, index) => self.drain(*index),
            other => return Err(Fault::kind_error(format!("'{}' object is not iterable", other.kind()))),
        })
    }

    fn comparisons(&mut self, first: &'t Expr, others: &'t [(Comparison, Expr)], scope: usize) -> Result<Value> {
        let mut left = self.evaluate(first, scope)?;
        for (comparison, right) in others {
            let right = self.evaluate(right, scope)?;
            if !self.compare(*comparison, &left, &right)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    pub(super) fn compare(&mut self, comparison: Comparison, left: &Value, right: &Value) -> Result<bool> {
        self.budget.make(left.weight().min(right.weight()))?;
        let ordered = || ordering(left, right);
        Ok(match comparison {
            Comparison::Equal => equal(left, right),
            Comparison::NotEqual => !equal(left, right),
            Comparison::Less => ordered()? == Some(Ordering::Less),
            Comparison::LessEqual => matches!(ordered()?, Some(Ordering::Less | Ordering::Equal)),
            Comparison::Greater => ordered()? == Some(Ordering::Greater),
            Comparison::GreaterEqual => matches!(ordered()?, Some(Ordering::Greater | Ordering::Equal)),
            Comparison::In => self.contains(right, left)?,
            Comparison::NotIn => !self.contains(right, left)?,
        })
    }

    /// Python's `==`, counted.
    pub(super) fn same(&mut self, left: &Value, right: &Value) -> Result<bool> {
        self.budget.make(left.weight().min(right.weight()))?;
        Ok(equal(left, right))
    }

    /// Python's `in`.
    pub(super) fn contains(&mut self, whole: &Value, part: &Value) -> Result<bool> {
        if let Some(text) = whole.as_str() {
            let Some(part) = part.as_str() else {
                let kind = part.kind();
                return Err(Fault::kind_error(format!("'in <string>' requires string as left operand, not {kind}")));
            };
            self.budget.make(text.len())?;
            return Ok(text.contains(part));
        }
        match whole {
            Value::Dict(dict) | Value::View(dict, View::Keys) => Ok(dict.get(part)?.is_some()),
            Value::Held(Held::Generator, index) => {
                while let Some(item) = self.pull(*index) {
                    if self.same(&item, part)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Value::Held(Held::Namespace | Held::Macro | Held::Cycler | Held::Joiner | Held::Loop, _)
            | Value::None
            | Value::Bool(_)
            | Value::Int(_)
            | Value::Float(_)
            | Value::Function(_)
            | Value::Method(..) => {
                Err(Fault::kind_error(format!("argument of type '{}' is not iterable", whole.kind())))
            }
            _ => {
                for item in self.items(whole)? {
                    if self.same(&item, part)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }

    /// `of.name`: an attribute of the value, else an item.
    pub(super) fn attribute(&mut self, of: &Value, name: &str) -> Result<Value> {
        if let Value::Undefined(reason) = of {
            return Err(Fault::undefined(reason));
        }
        if let Some(found) = self.own_attribute(of, name)? {
            return Ok(found);
        }
        let found = match of {
            Value::Dict(dict) => dict.get(&Value::text(name))?.cloned(),
            Value::Bool(_) | Value::Int(_) | Value::Float(_) => number_attribute(of, name),
            _ => None,
        };
        Ok(found.unwrap_or_else(|| missing(of, name)))
    }

    /// What Python's `getattr` finds, as far as the sandbox lets it be seen.
    pub(super) fn own_attribute(&mut self, of: &Value, name: &str) -> Result<Option<Value>> {
        self.budget.make(name.len())?;
        match of {
            Value::Held(Held::Namespace, index) => return Ok(self.namespace_attribute(*index, name)),
            Value::Held(Held::Loop, index) => return self.loop_attribute(*index, name),
            Value::Held(Held::Cycler, index) if name == "current" => return Ok(Some(self.cycler(*index, name))),
            Value::Held(Held::Macro, index) if name == "name" => return Ok(Some(Value::text(self.macro_name(*index)))),
            Value::Tuple(pair) if methods::GROUP.contains(&name) => {
                // `groupby` gives pairs with names.
                let place = usize::from(name == "list");
                let found = pair.items.get(place).filter(|_| pair.items.len() == 2).cloned();
                return Ok(found.filter(|_| matches!(pair.items.get(1), Some(Value::List(_)))));
            }
            _ => {}
        }
        if methods::is_mutating(of, name) {
            let (kind, name) = (of.kind(), name);
            let reason = format!("access to attribute '{name}' of '{kind}' object is unsafe.");
            return Ok(Some(Value::undefined(&reason)));
        }
        Ok(methods::find(of, name).map(|name| Value::Method(Arc::new(of.clone()), name)))
    }

    /// `of[index]`: an item of the value, else an attribute.
    pub(super) fn item(&mut self, of: &Value, index: &Value) -> Result<Value> {
        let found = match (of, index) {
            (Value::Undefined(reason), _) => return Err(Fault::undefined(reason)),
            (Value::Dict(dict), index) => Key::new(index.clone()).ok().and_then(|key| dict.entries.get(&key).cloned()),
            (Value::List(list) | Value::Tuple(list), index) => {
                let place = index.as_int().and_then(|index| place(index, list.items.len()));
                place.and_then(|place| list.items.get(place).cloned())
            }
            (Value::Str(text) | Value::Markup(text), index) => {
                self.budget.make(text.len())?;
                let place = index.as_int().and_then(|index| place(index, text.chars().count()));
                place.and_then(|place| text.chars().nth(place)).map(|c| Value::text_like(c.into(), of))
            }
            (Value::Range(range), index) => {
                index.as_int().and_then(|index| place(index, range.count)).map(|place| range.at(place))
            }
            _ => None,
        };
        if let Some(found) = found {
            return Ok(found);
        }
        if let Some(name) = index.as_str() {
            return Ok(self.own_attribute(of, name)?.unwrap_or_else(|| missing(of, name)));
        }
        let index = self.repr(index)?;
        Ok(Value::undefined(&format!("{} object has no element {index}", of.kind())))
    }

    fn slice(&mut self, of: &Value, [start, stop, step]: [Option<i128>; 3]) -> Result<Value> {
        if let Value::Undefined(reason) = of {
            return Err(Fault::undefined(reason));
        }
        let Some(length) = of.length().filter(|_| !matches!(of, Value::Dict(_) | Value::View(..))) else {
            return Err(Fault::kind_error(format!("'{}' object is not subscriptable", of.kind())));
        };
        let step = step.unwrap_or(1);
        if step == 0 {
            return Err(Fault::value_error("slice step cannot be zero"));
        }
        let count = i128::try_from(length).unwrap_or(i128::MAX);
        let clamp = |bound: i128| {
            let bound = if bound < 0 { bound.saturating_add(count) } else { bound };
            if step > 0 { bound.clamp(0, count) } else { bound.clamp(-1, count - 1) }
        };
        let start = start.map_or(if step > 0 { 0 } else { count - 1 }, clamp);
        let stop = stop.map_or(if step > 0 { count } else { -1 }, clamp);
        let mut places = Vec::new();
        let mut at = start;
        while if step > 0 { at < stop } else { at > stop } {
            places.extend(usize::try_from(at));
            at = at.saturating_add(step);
        }
        self.budget.items(places.len())?;
        if let Some(text) = of.as_str() {
            let letters: Vec<char> = text.chars().collect();
            self.budget.make(letters.len().saturating_mul(4))?;
            let text = places.iter().filter_map(|place| letters.get(*place)).collect();
            return Ok(Value::text_like(text, of));
        }
        let items = self.items(of)?;
        let items = places.iter().filter_map(|place| items.get(*place).cloned()).collect();
        if matches!(of, Value::Tuple(_)) { Value::tuple(items) } else { Value::list(items) }
    }
}

fn value_of(constant: &Constant) -> Value {
    match constant {
        Constant::None => Value::None,
        Constant::Bool(truth) => Value::Bool(*truth),
        Constant::Int(number) => Value::Int(*number),
        Constant::Float(number) => Value::Float(*number),
        Constant::Str(text) => Value::Str(Arc::clone(text)),
    }
}

/// Python's order; `None` for what is neither less nor greater, as not-a-number.
pub(super) fn ordering(left: &Value, right: &Value) -> Result<Option<Ordering>> {
    if let (Some(left), Some(right)) = (left.as_str(), right.as_str()) {
        return Ok(Some(left.cmp(right)));
    }
    if let (Some(left), Some(right)) = (left.as_int(), right.as_int()) {
        return Ok(Some(left.cmp(&right)));
    }
    if let (Some(left), Some(right)) = (left.as_float(), right.as_float()) {
        return Ok(left.partial_cmp(&right));
    }
    match (left, right) {
        (Value::Undefined(reason), _) | (_, Value::Undefined(reason)) => Err(Fault::undefined(reason)),
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            for (left, right) in left.items.iter().zip(&right.items) {
                if !equal(left, right) {
                    return ordering(left, right);
                }
            }
            Ok(Some(left.items.len().cmp(&right.items.len())))
        }
        _ => {
            let (left, right) = (left.kind(), right.kind());
            Err(Fault::kind_error(format!("'<' not supported between instances of '{left}' and '{right}'")))
        }
    }
}

fn missing(of: &Value, name: &str) -> Value {
    Value::undefined(&format!("'{} object' has no attribute '{name}'", of.kind()))
}

/// What Python's numbers have.
fn number_attribute(of: &Value, name: &str) -> Option<Value> {
    let whole = of.as_int();
    match (name, whole) {
        ("real" | "numerator", Some(number)) => Some(Value::Int(number)),
        ("imag", Some(_)) => Some(Value::Int(0)),
        ("denominator", Some(_)) => Some(Value::Int(1)),
        ("real", None) => Some(of.clone()),
        ("imag", None) => Some(Value::Float(0.0)),
        _ => None,
    }
}

/// The place of a Python index, which may count from the end.
fn place(index: i128, length: usize) -> Option<usize> {
    let index = if index < 0 { index.checked_add(i128::try_from(length).ok()?)? } else { index };
    usize::try_from(index).ok().filter(|place| *place < length)
}

fn bound_of(value: &Value) -> Result<Option<i128>> {
    match (value, value.as_int()) {
        (Value::None, _) => Ok(None),
        (_, Some(bound)) => Ok(Some(bound)),
        _ => Err(Fault::kind_error("slice indices must be integers or None")),
    }
}
