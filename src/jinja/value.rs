//! What a template computes with: Python's values, as far as Jinja reaches them.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use indexmap::IndexMap;

use super::fault::{Fault, Result};

/// How deep lists and dictionaries may lie in each other. Python gives up at about 1000 while it prints them.
const DEEPEST: usize = 200;
/// Largest tuple that can be a key.
const HEAVIEST: usize = 10_000;

#[derive(Debug, Clone)]
pub(super) enum Value {
    /// With the reason, for the error of whoever uses it.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    /// A text that `safe` or `escape` made: what is added to it is escaped.
    Markup(Arc<str>),
    List(Arc<List>),
    Tuple(Arc<List>),
    Dict(Arc<Dict>),
    Range(Range),
    View(Arc<Dict>, View),
    /// A value with a state, which the machine holds.
    Held(Held, usize),
    Function(&'static str),
    Method(Arc<Value>, &'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Keys,
    Values,
    Items,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    Namespace,
    /// What `map`, `select`, `items` and others give: it is read once.
    Generator,
    Loop,
    Macro,
    Cycler,
    Joiner,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: i64,
    pub(super) stop: i64,
    pub(super) step: i64,
    /// How many items it has.
    pub(super) count: usize,
}

impl Range {
    pub(super) fn at(&self, place: usize) -> Value {
        let place = i128::try_from(place).unwrap_or(i128::MAX);
        Value::Int(i128::from(self.start) + place * i128::from(self.step))
    }
}

#[derive(Debug)]
pub(super) struct List {
    pub(super) items: Vec<Value>,
    depth: usize,
    /// About the bytes that are read when it is compared. One list may lie in another many times.
    weight: usize,
}

#[derive(Debug)]
pub(super) struct Dict {
    pub(super) entries: IndexMap<Key, Value>,
    depth: usize,
    weight: usize,
}

impl Value {
    pub(super) fn text(text: impl Into<Arc<str>>) -> Self {
        Self::Str(text.into())
    }

    /// A text of the kind that `like` is.
    pub(super) fn text_like(text: String, like: &Self) -> Self {
        if matches!(like, Self::Markup(_)) { Self::Markup(text.into()) } else { Self::Str(text.into()) }
    }

    pub(super) fn list(items: Vec<Self>) -> Result<Self> {
        Ok(Self::List(Arc::new(List::new(items)?)))
    }

    pub(super) fn tuple(items: Vec<Self>) -> Result<Self> {
        Ok(Self::Tuple(Arc::new(List::new(items)?)))
    }

    pub(super) fn dict(entries: IndexMap<Key, Self>) -> Result<Self> {
        let depth = 1 + entries.iter().map(|(key, value)| key.0.depth().max(value.depth())).max().unwrap_or(0);
        check(depth)?;
        let weight = entries
            .iter()
            .fold(16_usize, |sum, (key, value)| sum.saturating_add(key.0.weight()).saturating_add(value.weight()));
        Ok(Self::Dict(Arc::new(Dict { entries, depth, weight })))
    }

    pub(super) fn count(count: usize) -> Self {
        Self::Int(i128::try_from(count).unwrap_or(i128::MAX))
    }

    pub(super) fn undefined(reason: &str) -> Self {
        Self::Undefined(reason.into())
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) | Self::Markup(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number; `true` is 1.
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Bool(truth) => Some(i128::from(*truth)),
            _ => None,
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "as Python's float() rounds")]
    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(number) => Some(*number),
            other => other.as_int().map(|number| number as f64),
        }
    }

    pub(super) fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    fn depth(&self) -> usize {
        match self {
            Self::List(list) | Self::Tuple(list) => list.depth,
            Self::Dict(dict) | Self::View(dict, _) => dict.depth,
            Self::Method(of, _) => of.depth() + 1,
            _ => 0,
        }
    }

    /// About the bytes that are read when it is compared.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Str(text) | Self::Markup(text) => text.len().saturating_add(16),
            Self::List(list) | Self::Tuple(list) => list.weight,
            Self::Dict(dict) | Self::View(dict, _) => dict.weight,
            _ => 16,
        }
    }

    /// Python's name of the type.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Markup(_) => "Markup",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Range(_) => "range",
            Self::View(_, View::Keys) => "dict_keys",
            Self::View(_, View::Values) => "dict_values",
            Self::View(_, View::Items) => "dict_items",
            Self::Held(Held::Namespace, _) => "Namespace",
            Self::Held(Held::Generator, _) => "generator",
            Self::Held(Held::Loop, _) => "LoopContext",
            Self::Held(Held::Macro, _) => "Macro",
            Self::Held(Held::Cycler, _) => "Cycler",
            Self::Held(Held::Joiner, _) => "Joiner",
            Self::Function(_) => "function",
            Self::Method(..) => "builtin_function_or_method",
        }
    }

    /// Python's truth.
    pub(super) fn truth(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(truth) => *truth,
            Self::Int(number) => *number != 0,
            Self::Float(number) => *number != 0.0,
            Self::Str(text) | Self::Markup(text) => !text.is_empty(),
            Self::List(list) | Self::Tuple(list) => !list.items.is_empty(),
            Self::Dict(dict) | Self::View(dict, _) => !dict.entries.is_empty(),
            Self::Range(range) => range.count > 0,
            _ => true,
        }
    }

    /// Python's `len`; `None` for what has no length.
    pub(super) fn length(&self) -> Option<usize> {
        match self {
            Self::Undefined(_) => Some(0),
            Self::Str(text) | Self::Markup(text) => Some(text.chars().count()),
            Self::List(list) | Self::Tuple(list) => Some(list.items.len()),
            Self::Dict(dict) | Self::View(dict, _) => Some(dict.entries.len()),
            Self::Range(range) => Some(range.count),
            _ => None,
        }
    }

    /// A value of JSON.
    pub(super) fn from_json(json: &serde_json::Value) -> Result<Self> {
        Ok(match json {
            serde_json::Value::Null => Self::None,
            serde_json::Value::Bool(truth) => Self::Bool(*truth),
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(whole), _) => Self::Int(whole.into()),
                (None, Some(whole)) => Self::Int(whole.into()),
                (None, None) => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => Self::text(text.as_str()),
            serde_json::Value::Array(items) => Self::list(items.iter().map(Self::from_json).collect::<Result<_>>()?)?,
            serde_json::Value::Object(entries) => {
                let entries = entries.iter().map(|(key, value)| Ok((Key::text(key), Self::from_json(value)?)));
                Self::dict(entries.collect::<Result<_>>()?)?
            }
        })
    }
}

fn check(depth: usize) -> Result<()> {
    if depth > DEEPEST {
        return Err(Fault::refused(format!("lists within lists, more than {DEEPEST} deep")));
    }
    Ok(())
}

impl List {
    fn new(items: Vec<Value>) -> Result<Self> {
        let depth = 1 + items.iter().map(Value::depth).max().unwrap_or(0);
        check(depth)?;
        let weight = items.iter().fold(16_usize, |sum, item| sum.saturating_add(item.weight()));
        Ok(Self { items, depth, weight })
    }
}

impl Dict {
    pub(super) fn get(&self, key: &Value) -> Result<Option<&Value>> {
        Ok(self.entries.get(&Key::new(key.clone())?))
    }
}

/// A value that can be a key: one that Python can hash.
#[derive(Debug, Clone)]
pub(super) struct Key(pub(super) Value);

impl Key {
    pub(super) fn new(value: Value) -> Result<Self> {
        if matches!(value, Value::Tuple(_)) && value.weight() > HEAVIEST {
            return Err(Fault::refused(format!("a tuple of more than {HEAVIEST} bytes as a key")));
        }
        let fits = match &value {
            Value::List(_) | Value::Dict(_) | Value::View(..) => false,
            Value::Tuple(list) => list.items.iter().all(|item| Self::new(item.clone()).is_ok()),
            _ => true,
        };
        if fits { Ok(Self(value)) } else { Err(Fault::kind_error(format!("unhashable type: '{}'", value.kind()))) }
    }

    pub(super) fn text(text: &str) -> Self {
        Self(Value::text(text))
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        equal(&self.0, &other.0)
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match &self.0 {
            Value::Str(text) | Value::Markup(text) => text.hash(state),
            Value::Tuple(list) => list.items.iter().for_each(|item| Self(item.clone()).hash(state)),
            // Equal numbers of all kinds have one hash.
            other => match other.as_float() {
                Some(number) => (number + 0.0).to_bits().hash(state),
                None => other.kind().hash(state),
            },
        }
    }
}

/// Python's `==`.
#[expect(clippy::float_cmp, reason = "as Python compares")]
pub(super) fn equal(left: &Value, right: &Value) -> bool {
    if let (Some(left), Some(right)) = (left.as_str(), right.as_str()) {
        return left == right;
    }
    if let (Some(left), Some(right)) = (left.as_int(), right.as_int()) {
        return left == right;
    }
    if let (Some(left), Some(right)) = (left.as_float(), right.as_float()) {
        return left == right;
    }
    match (left, right) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            left.items.len() == right.items.len() && left.items.iter().zip(&right.items).all(|(l, r)| equal(l, r))
        }
        (Value::Dict(left), Value::Dict(right)) | (Value::View(left, View::Items), Value::View(right, View::Items)) => {
            equal_dicts(left, right)
        }
        (Value::View(left, View::Keys), Value::View(right, View::Keys)) => {
            left.entries.len() == right.entries.len() && left.entries.keys().all(|key| right.entries.contains_key(key))
        }
        (Value::Range(left), Value::Range(right)) => {
            let first = left.count == 0 || left.start == right.start;
            left.count == right.count && first && (left.count < 2 || left.step == right.step)
        }
        (Value::Held(kind, place), Value::Held(other, index)) => kind == other && place == index,
        (Value::Function(left), Value::Function(right)) => left == right,
        _ => false,
    }
}

fn equal_dicts(left: &Dict, right: &Dict) -> bool {
    left.entries.len() == right.entries.len()
        && left.entries.iter().all(|(key, value)| right.entries.get(key).is_some_and(|other| equal(value, other)))
}
