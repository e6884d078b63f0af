//! The functions that transformers gives to chat templates.

use indexmap::IndexMap;

use super::clock::{WIDEST, strftime};
use super::fault::{Fault, Kind, Result};
use super::machine::{Given, Machine};
use super::value::{Key, Range, Value};

/// Names that are defined without being given.
pub(super) const NAMES: [&str; 8] =
    ["raise_exception", "strftime_now", "range", "dict", "namespace", "cycler", "joiner", "lipsum"];

/// Jinja's sandbox has no longer ranges.
const LONGEST_RANGE: usize = 100_000;

impl Machine<'_> {
    pub(super) fn global(&mut self, name: &'static str, mut given: Given) -> Result<Value> {
        match name {
            "raise_exception" => {
                let message = given.take(0, "message").unwrap_or(Value::None);
                given.done(name)?;
                let message = self.string(&message)?;
                Err(Fault::new(Kind::Raised, message))
            }
            "strftime_now" => {
                let format = given.take(0, "format").unwrap_or(Value::None);
                given.done(name)?;
                let Some(text) = format.as_str() else {
                    return Err(Fault::kind_error(format!("strftime() argument 1 must be str, not {}", format.kind())));
                };
                self.budget.copies(text.matches('%').count(), WIDEST)?;
                self.budget.make(text.len())?;
                Ok(Value::text(strftime(text, &self.clock)?))
            }
            "range" => range(&given),
            "dict" => self.dictionary(&given),
            "namespace" => {
                let Value::Dict(dict) = self.dictionary(&given)? else { return Ok(Value::None) };
                let mut attributes = IndexMap::new();
                for (key, value) in &dict.entries {
                    let name = self.string(&key.0)?;
                    attributes.insert(name, value.clone());
                }
                self.new_namespace(attributes)
            }
            "cycler" => self.new_cycler(given.positional),
            "joiner" => {
                let separator = given.take(0, "sep").unwrap_or_else(|| Value::text(", "));
                given.done(name)?;
                let separator = self.string(&separator)?;
                self.new_joiner(separator)
            }
            other => Err(Fault::refused(format!("{other}(), whose result is another one each time"))),
        }
    }

    /// Python's `dict`: of a dictionary or of pairs, with names.
    fn dictionary(&mut self, given: &Given) -> Result<Value> {
        let mut entries = IndexMap::new();
        match given.positional.as_slice() {
            [] => {}
            [Value::Dict(dict)] => {
                self.budget.items(2 * dict.entries.len())?;
                entries.clone_from(&dict.entries);
            }
            [pairs] => {
                for pair in self.items(pairs)? {
                    let pair = self.items(&pair)?;
                    let [key, value] = pair.as_slice() else {
                        let fault = "dictionary update sequence element has another length than 2";
                        return Err(Fault::value_error(fault));
                    };
                    entries.insert(Key::new(key.clone())?, value.clone());
                }
            }
            more => return Err(Fault::kind_error(format!("dict expected at most 1 argument, got {}", more.len()))),
        }
        self.budget.items(2 * given.named.len())?;
        entries.extend(given.named.iter().map(|(name, value)| (Key::text(name), value.clone())));
        Value::dict(entries)
    }
}

fn range(given: &Given) -> Result<Value> {
    let numbers: Vec<i128> = given.positional.iter().map(whole).collect::<Result<_>>()?;
    let (start, stop, step) = match (numbers.as_slice(), given.named.is_empty()) {
        ([stop], true) => (0, *stop, 1),
        ([start, stop], true) => (*start, *stop, 1),
        ([start, stop, step], true) => (*start, *stop, *step),
        _ => return Err(Fault::kind_error("range expected 1 to 3 arguments")),
    };
    if step == 0 {
        return Err(Fault::value_error("range() arg 3 must not be zero"));
    }
    let distance = if step > 0 { stop.saturating_sub(start) } else { start.saturating_sub(stop) };
    let stride = step.unsigned_abs();
    let count = u128::try_from(distance).map_or(0, |distance| distance.div_ceil(stride));
    let too_big = || {
        let fault = "OverflowError: Range too big. The sandbox blocks ranges larger than MAX_RANGE";
        Fault::new(Kind::Python, format!("{fault} ({LONGEST_RANGE})."))
    };
    let count = usize::try_from(count).ok().filter(|count| *count <= LONGEST_RANGE).ok_or_else(too_big)?;
    let small = |number: i128| i64::try_from(number).map_err(|_| too_big());
    Ok(Value::Range(Range { start: small(start)?, stop: small(stop)?, step: small(step)?, count }))
}

fn whole(value: &Value) -> Result<i128> {
    if let Value::Undefined(reason) = value {
        return Err(Fault::undefined(reason));
    }
    value
        .as_int()
        .ok_or_else(|| Fault::kind_error(format!("'{}' object cannot be interpreted as an integer", value.kind())))
}

impl Given {
    /// An argument by place or by name.
    pub(super) fn take(&mut self, place: usize, name: &str) -> Option<Value> {
        let found = self.positional.get_mut(place).map(|value| std::mem::replace(value, Value::Function("taken")));
        found.or_else(|| self.named.shift_remove(name))
    }

    /// No argument is left.
    pub(super) fn done(&self, function: &str) -> Result<()> {
        let taken = |value: &Value| matches!(value, Value::Function("taken"));
        if let Some(name) = self.named.keys().next() {
            return Err(Fault::kind_error(format!("{function}() got an unexpected keyword argument '{name}'")));
        }
        if !self.positional.iter().all(taken) {
            return Err(Fault::kind_error(format!("{function}() takes fewer arguments")));
        }
        Ok(())
    }
}
