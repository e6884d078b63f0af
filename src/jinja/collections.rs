//! Jinja's filters of lists and dictionaries.

use std::cmp::Ordering;

use super::evaluate::ordering;
use super::fault::{Fault, Kind, Result};
use super::machine::{Given, Machine};
use super::value::{Held, Key, Value, View};

/// The steps to an attribute: `a.0.b`.
type Path = Vec<Value>;

impl Machine<'_> {
    pub(super) fn filter_of_many(&mut self, name: &str, value: &Value, mut given: Given) -> Result<Value> {
        let found = match name {
            "length" | "count" => match value {
                Value::Str(text) | Value::Markup(text) => {
                    self.budget.make(text.len())?;
                    Value::count(text.chars().count())
                }
                Value::Held(Held::Loop, index) => Value::count(self.loop_place(*index)?.1),
                _ => match value.length() {
                    Some(length) => Value::count(length),
                    None => return Err(Fault::kind_error(format!("object of type '{}' has no len()", value.kind()))),
                },
            },
            "list" => Value::list(self.items(value)?)?,
            "first" => self.first(value)?,
            "last" => self.last(value)?,
            "items" => match value {
                Value::Undefined(_) => self.generator(Vec::new())?,
                Value::Dict(dict) => {
                    let pairs = self.items(&Value::View(dict.clone(), View::Items))?;
                    self.generator(pairs)?
                }
                _ => return Err(Fault::kind_error("Can only get item pairs from a mapping.")),
            },
            "reverse" => self.reversed(value)?,
            "batch" | "slice" => self.portions(name, value, &mut given)?,
            "sum" => self.sum(value, &mut given)?,
            "min" | "max" => self.extreme(value, &mut given, name == "max")?,
            "join" => {
                let separator = given.take(0, "d").unwrap_or_else(|| Value::text(""));
                let attribute = given.take(1, "attribute");
                let separator = self.string(&separator)?;
                let mut items = self.items(value)?;
                if let Some(path) = path(attribute.as_ref())? {
                    items = items.iter().map(|item| self.walk(item, &path, None)).collect::<Result<_>>()?;
                }
                Value::text(self.join(&separator, &items, false)?)
            }
            "unique" => self.unique(value, &mut given)?,
            "sort" => self.sort(value, &mut given)?,
            "dictsort" => self.sort_dict(value, &mut given)?,
            "groupby" => self.group(value, &mut given)?,
            _ => {
                let attribute = given.take(0, "name").unwrap_or(Value::None);
                let attribute = self.string(&attribute)?;
                let found = if value.is_undefined() { None } else { self.own_attribute(value, &attribute)? };
                found.unwrap_or_else(|| Value::undefined(&format!("no attribute '{attribute}'")))
            }
        };
        given.done(name)?;
        Ok(found)
    }

    fn reversed(&mut self, value: &Value) -> Result<Value> {
        if let Some(text) = value.as_str() {
            return Ok(Value::text_like(text.chars().rev().collect(), value));
        }
        let is_read_once = matches!(value, Value::Held(Held::Generator, _));
        let mut items = self.items(value)?;
        items.reverse();
        // Of a generator Jinja makes a list, of a list an iterator.
        if is_read_once { Value::list(items) } else { self.generator(items) }
    }

    fn first(&mut self, value: &Value) -> Result<Value> {
        let found = match value {
            Value::Held(Held::Generator, index) => self.pull(*index),
            _ => self.items(value)?.into_iter().next(),
        };
        Ok(found.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
    }

    fn last(&mut self, value: &Value) -> Result<Value> {
        if matches!(value, Value::Held(Held::Generator, _)) {
            return Err(Fault::kind_error("'generator' object is not reversible"));
        }
        Ok(self.items(value)?.pop().unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
    }

    pub(super) fn map(&mut self, value: &Value, mut given: Given, scope: usize) -> Result<Value> {
        if !value.truth() {
            return self.generator(Vec::new());
        }
        let items = self.items(value)?;
        let mut found = Vec::with_capacity(items.len());
        if given.positional.is_empty() && given.named.contains_key("attribute") {
            let attribute = given.named.shift_remove("attribute");
            let default = given.named.shift_remove("default").filter(|value| !matches!(value, Value::None));
            given.done("map")?;
            let path = path(attribute.as_ref())?.unwrap_or_default();
            for item in &items {
                found.push(self.walk(item, &path, default.as_ref())?);
            }
        } else {
            if given.positional.is_empty() {
                return Err(Fault::kind_error("map requires a filter argument"));
            }
            let name = self.string(&given.positional.remove(0))?;
            for item in items {
                let given = Given { positional: given.positional.clone(), named: given.named.clone() };
                found.push(self.nested(|machine| machine.filter(&name, item, given, scope))?);
            }
        }
        self.generator(found)
    }

    pub(super) fn select(&mut self, value: &Value, mut given: Given, of_attribute: bool, keep: bool) -> Result<Value> {
        if !value.truth() {
            return self.generator(Vec::new());
        }
        let mut steps = Path::new();
        if of_attribute {
            if given.positional.is_empty() {
                return Err(Fault::kind_error("Missing parameter for attribute name"));
            }
            steps = path(Some(&given.positional.remove(0)))?.unwrap_or_default();
        }
        let test = if given.positional.is_empty() { None } else { Some(given.positional.remove(0)) };
        let mut found = Vec::new();
        for item in self.items(value)? {
            let looked = self.walk(&item, &steps, None)?;
            let passes = match &test {
                None => looked.truth(),
                Some(name) => {
                    let name = self.string(name)?;
                    let given = Given { positional: given.positional.clone(), named: given.named.clone() };
                    self.test(&name, &looked, given)?
                }
            };
            if passes == keep {
                found.push(item);
            }
        }
        self.generator(found)
    }

    /// An attribute of an attribute.
    fn walk(&mut self, item: &Value, path: &Path, default: Option<&Value>) -> Result<Value> {
        let mut value = item.clone();
        for step in path {
            self.budget.step()?;
            value = self.item(&value, step)?;
            if let (true, Some(default)) = (value.is_undefined(), default) {
                value = default.clone();
            }
        }
        Ok(value)
    }

    /// What a value is compared by.
    fn sort_key(&mut self, item: &Value, path: Option<&Path>, fold: bool, default: Option<&Value>) -> Result<Value> {
        let found = match path {
            Some(path) => self.walk(item, path, default)?,
            None => item.clone(),
        };
        Ok(match found.as_str() {
            Some(text) if fold => {
                self.budget.make(text.len())?;
                Value::text(text.to_lowercase())
            }
            _ => found,
        })
    }

    /// The order of values, stable.
    pub(super) fn sorted(&mut self, keys: &[Value], reverse: bool) -> Result<Vec<usize>> {
        let rounds = usize::try_from(keys.len().max(2).ilog2()).unwrap_or(64) + 1;
        let bytes = keys.iter().fold(0_usize, |sum, key| sum.saturating_add(key.weight()));
        self.budget.make(bytes.saturating_mul(rounds))?;
        self.budget.items(keys.len())?;
        let mut order: Vec<usize> = (0..keys.len()).collect();
        let mut fault = None;
        order.sort_by(|left, right| {
            let (Some(left), Some(right)) = (keys.get(*left), keys.get(*right)) else { return Ordering::Equal };
            match ordering(left, right) {
                Ok(order) if reverse => order.unwrap_or(Ordering::Equal).reverse(),
                Ok(order) => order.unwrap_or(Ordering::Equal),
                Err(found) => {
                    fault.get_or_insert(found);
                    Ordering::Equal
                }
            }
        });
        fault.map_or(Ok(order), Err)
    }

    fn unique(&mut self, value: &Value, given: &mut Given) -> Result<Value> {
        let fold = !given.take(0, "case_sensitive").is_some_and(|value| value.truth());
        let path = path(given.take(1, "attribute").as_ref())?;
        let mut seen = indexmap::IndexSet::new();
        let mut found = Vec::new();
        for item in self.items(value)? {
            let key = self.sort_key(&item, path.as_ref(), fold, None)?;
            if seen.insert(Key::new(key)?) {
                found.push(item);
            }
        }
        self.generator(found)
    }

    fn sort(&mut self, value: &Value, given: &mut Given) -> Result<Value> {
        let reverse = given.take(0, "reverse").is_some_and(|value| value.truth());
        let fold = !given.take(1, "case_sensitive").is_some_and(|value| value.truth());
        let attribute = given.take(2, "attribute");
        let paths: Vec<Option<Path>> = match attribute.as_ref().and_then(Value::as_str) {
            Some(names) => names.split(',').map(|name| path(Some(&Value::text(name)))).collect::<Result<_>>()?,
            None => vec![path(attribute.as_ref())?],
        };
        let items = self.items(value)?;
        let mut keys = Vec::with_capacity(items.len());
        for item in &items {
            let parts = paths.iter().map(|path| self.sort_key(item, path.as_ref(), fold, None));
            keys.push(Value::list(parts.collect::<Result<_>>()?)?);
        }
        let order = self.sorted(&keys, reverse)?;
        Value::list(order.into_iter().filter_map(|place| items.get(place).cloned()).collect())
    }

    fn sort_dict(&mut self, value: &Value, given: &mut Given) -> Result<Value> {
        let fold = !given.take(0, "case_sensitive").is_some_and(|value| value.truth());
        let by = given.take(1, "by");
        let reverse = given.take(2, "reverse").is_some_and(|value| value.truth());
        let place = match by.as_ref().map(Value::as_str) {
            None | Some(Some("key")) => 0,
            Some(Some("value")) => 1,
            _ => return Err(Fault::kind_error("You can only sort by either \"key\" or \"value\"")),
        };
        let Value::Dict(dict) = value else {
            return match value {
                Value::Undefined(reason) => Err(Fault::undefined(reason)),
                _ => Err(Fault::kind_error(format!("'{}' object has no attribute 'items'", value.kind()))),
            };
        };
        let items = self.items(&Value::View(dict.clone(), View::Items))?;
        let mut keys = Vec::with_capacity(items.len());
        for item in &items {
            let key = self.item(item, &Value::Int(place))?;
            keys.push(self.sort_key(&key, None, fold, None)?);
        }
        let order = self.sorted(&keys, reverse)?;
        Value::list(order.into_iter().filter_map(|place| items.get(place).cloned()).collect())
    }

    fn group(&mut self, value: &Value, given: &mut Given) -> Result<Value> {
        let attribute = given.take(0, "attribute");
        let default = given.take(1, "default").filter(|value| !matches!(value, Value::None));
        let fold = !given.take(2, "case_sensitive").is_some_and(|value| value.truth());
        let path = path(attribute.as_ref())?;
        let items = self.items(value)?;
        let mut keys = Vec::with_capacity(items.len());
        for item in &items {
            keys.push(self.sort_key(item, path.as_ref(), fold, default.as_ref())?);
        }
        let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
        for place in self.sorted(&keys, false)? {
            let (Some(key), Some(item)) = (keys.get(place), items.get(place)) else { continue };
            let joins = match groups.last() {
                Some((before, _)) => self.same(before, key)?,
                None => false,
            };
            match groups.last_mut() {
                Some((_, members)) if joins => members.push(item.clone()),
                _ => groups.push((key.clone(), vec![item.clone()])),
            }
        }
        let mut found = Vec::with_capacity(groups.len());
        for (key, members) in groups {
            let first = members.first().cloned().unwrap_or(Value::None);
            let key = match (&path, fold) {
                (Some(path), true) => self.walk(&first, path, default.as_ref())?,
                _ => key,
            };
            found.push(Value::tuple(vec![key, Value::list(members)?])?);
        }
        Value::list(found)
    }

    fn sum(&mut self, value: &Value, given: &mut Given) -> Result<Value> {
        let path = path(given.take(0, "attribute").as_ref())?.unwrap_or_default();
        let mut total = given.take(1, "start").unwrap_or(Value::Int(0));
        if total.as_str().is_some() {
            return Err(Fault::kind_error("sum() can't sum strings [use ''.join(seq) instead]"));
        }
        for item in self.items(value)? {
            let item = self.walk(&item, &path, None)?;
            total = self.binary(super::ast::Operator::Add, &total, &item)?;
        }
        Ok(total)
    }

    fn extreme(&mut self, value: &Value, given: &mut Given, largest: bool) -> Result<Value> {
        let fold = !given.take(0, "case_sensitive").is_some_and(|value| value.truth());
        let path = path(given.take(1, "attribute").as_ref())?;
        let wanted = if largest { Ordering::Greater } else { Ordering::Less };
        let mut best: Option<(Value, Value)> = None;
        for item in self.items(value)? {
            let key = self.sort_key(&item, path.as_ref(), fold, None)?;
            let better = match &best {
                None => true,
                Some((before, _)) => {
                    self.budget.make(key.weight().min(before.weight()))?;
                    ordering(&key, before)? == Some(wanted)
                }
            };
            if better {
                best = Some((key, item));
            }
        }
        Ok(best.map_or_else(|| Value::undefined("No aggregated item, sequence was empty."), |(_, item)| item))
    }

    fn portions(&mut self, name: &str, value: &Value, given: &mut Given) -> Result<Value> {
        let count = given.take(0, if name == "batch" { "linecount" } else { "slices" });
        let fill = given.take(1, "fill_with").filter(|value| !matches!(value, Value::None));
        let Some(count) = count.and_then(|count| count.as_int()) else {
            return Err(Fault::kind_error(format!("{name}() takes a number")));
        };
        let count = usize::try_from(count).unwrap_or(0);
        let items = self.items(value)?;
        let mut found = Vec::new();
        if name == "batch" {
            for portion in items.chunks(count.max(1)) {
                let mut portion = portion.to_vec();
                if let Some(fill) = &fill {
                    self.budget.items(count.saturating_sub(portion.len()))?;
                    portion.resize(count.max(portion.len()), fill.clone());
                }
                found.push(Value::list(portion)?);
            }
            return self.generator(found);
        }
        if count == 0 {
            return Err(Fault::new(Kind::Python, "ZeroDivisionError: division by zero"));
        }
        self.budget.items(count)?;
        let (each, longer) = (items.len() / count, items.len() % count);
        let mut items = items.into_iter();
        for index in 0..count {
            let mut portion: Vec<Value> = items.by_ref().take(each + usize::from(index < longer)).collect();
            if index >= longer {
                portion.extend(fill.clone());
            }
            found.push(Value::list(portion)?);
        }
        self.generator(found)
    }
}

/// The steps to an attribute, or `None` where none is asked for.
fn path(attribute: Option<&Value>) -> Result<Option<Path>> {
    let Some(attribute) = attribute.filter(|value| !matches!(value, Value::None)) else { return Ok(None) };
    if let Value::Undefined(reason) = attribute {
        return Err(Fault::undefined(reason));
    }
    let Some(text) = attribute.as_str() else { return Ok(Some(vec![attribute.clone()])) };
    let step = |part: &str| match part.parse::<i128>() {
        Ok(number) if part.chars().all(|c| c.is_ascii_digit()) => Value::Int(number),
        _ => Value::text(part),
    };
    Ok(Some(text.split('.').map(step).collect()))
}
