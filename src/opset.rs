//! Which operators exist: the schemas of `opsets/*.json`, and the targets of `opsets/*.toml`.
//!
//! The tables are written by `opsets/make.py` from the official schemas, one operator version a line. A line is parsed
//! when its operator is first asked for, so a build pays for the thirty operators that it uses.

mod kernels;

pub use kernels::{Kernels, runs};

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

use serde::Deserialize;

use crate::element::{CacheType, ElementType};
use crate::error::{Code, Error, Result};

/// ONNX's own domain, as it is written in a node.
pub const ONNX: &str = "";
/// onnxruntime's domain.
pub const MICROSOFT: &str = "com.microsoft";

/// Each file of schemas, with the domain of the operators that do not name theirs.
const TABLES: [(&str, &str); 2] =
    [(ONNX, include_str!("../opsets/ai.onnx.json")), (MICROSOFT, include_str!("../opsets/com.microsoft.json"))];

/// Name and text of each target, the default first, and the kernels of its provider, if it is for one.
const TARGETS: [(&str, &str, Option<&str>); 4] = [
    ("ort-cpu", include_str!("../opsets/ort-cpu.toml"), None),
    ("ort-cuda", include_str!("../opsets/ort-cuda.toml"), Some(include_str!("../opsets/ort-cuda-kernels.json"))),
    ("standard", include_str!("../opsets/standard.toml"), None),
    ("primitive", include_str!("../opsets/primitive.toml"), None),
];

/// What a graph may be made of for one kind of consumer.
#[derive(Debug, Clone)]
pub struct Target {
    /// Name, as `--target` takes it.
    pub name: String,
    /// What it is for, in one line.
    pub description: String,
    /// Version of the file format.
    pub ir_version: i64,
    /// Version of each operator domain that the graph imports.
    pub opsets: BTreeMap<String, u32>,
    /// Float types that weights may have, the usual one first.
    pub dtypes: Vec<ElementType>,
    /// What is computed in, where that is not the weights' type.
    pub compute: Option<ElementType>,
    /// Where positions come from, if nothing is asked for.
    pub positions: Positions,
    /// For each composite operator the forms to try, best first.
    pub lowering: BTreeMap<String, Vec<String>>,
    /// The execution provider that it is for, as onnxruntime-genai names it; none in particular if there is none.
    pub provider: Option<String>,
    /// What the provider computes; everything, if it is for none.
    pub kernels: Option<Kernels>,
    /// The caches in 8 bits that its attention keeps.
    pub kv_caches: Vec<CacheType>,
    /// What single operators ask of their operands there, beyond their schemas.
    limits: BTreeMap<String, Limits>,
}

/// Where a graph takes the positions of new tokens from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// From its input `position_ids`.
    #[default]
    Ids,
    /// From `attention_mask`, whose kept tokens are counted; there is no such input.
    Mask,
}

/// What an operator asks of its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The sizes that it multiplies along are multiples of this.
    #[serde(default = "one")]
    pub widths: usize,
    /// Fewest integers that share a scale.
    #[serde(default = "one")]
    pub block: usize,
    /// Largest head whose cache it keeps in 8 bits.
    #[serde(default = "any")]
    pub quantized_head: usize,
    /// It takes integers for packed in its own way unless it is told that they are not.
    #[serde(default)]
    pub packed: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { widths: one(), block: one(), quantized_head: any(), packed: false }
    }
}

fn one() -> usize {
    1
}

fn any() -> usize {
    usize::MAX
}

/// A target's file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetFile {
    description: String,
    ir_version: i64,
    dtypes: Vec<String>,
    compute: Option<String>,
    provider: Option<String>,
    #[serde(default)]
    positions: Positions,
    opset: BTreeMap<String, u32>,
    lowering: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    kv_caches: Vec<String>,
    #[serde(default)]
    limits: BTreeMap<String, Limits>,
}

impl Target {
    /// The target of this name.
    pub fn named(name: &str) -> Result<&'static Self> {
        let all = Self::all()?;
        all.iter().find(|target| target.name == name).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|target| target.name.as_str()).collect();
            Error::new(Code::UsageInvalid, "--target").found(name).expected(format!("one of {}", names.join(", ")))
        })
    }

    /// Every target, the default first.
    pub fn all() -> Result<&'static [Self]> {
        static PARSED: OnceLock<Result<Vec<Target>>> = OnceLock::new();
        let parsed = PARSED
            .get_or_init(|| TARGETS.iter().map(|(name, text, kernels)| Self::parse(name, text, *kernels)).collect());
        parsed.as_ref().map(Vec::as_slice).map_err(Clone::clone)
    }

    /// True if the target's version of an operator takes this attribute; newer versions take operands instead.
    pub fn has_attribute(&self, domain: &str, op_type: &str, attribute: &str) -> bool {
        schema_for(self, domain, op_type).is_ok_and(|schema| schema.attributes.contains_key(attribute))
    }

    /// The forms of a composite operator to try, best first.
    pub fn forms(&self, composite: &str) -> Result<&[String]> {
        self.lowering.get(composite).map(Vec::as_slice).ok_or_else(|| {
            Error::new(Code::SpecInvalid, format!("target {}", self.name))
                .found(format!("no form of the composite operator {composite}"))
                .expected("a line in [lowering] of the target's file")
        })
    }

    /// What an operator asks of its operands, beyond its schema.
    pub fn limits(&self, op_type: &str) -> Limits {
        self.limits.get(op_type).copied().unwrap_or_default()
    }

    /// The type of weights where none is asked for.
    pub fn usual_dtype(&self) -> ElementType {
        self.dtypes.first().copied().unwrap_or(ElementType::F32)
    }

    fn parse(name: &str, text: &str, kernels: Option<&str>) -> Result<Self> {
        let invalid = |found: String| Error::new(Code::SpecInvalid, format!("opsets/{name}.toml")).found(found);
        let file: TargetFile = toml::from_str(text).map_err(|error| invalid(error.to_string()))?;
        let element = |dtype: &String| {
            let floats = [ElementType::F32, ElementType::F16, ElementType::BF16];
            let found = floats.into_iter().find(|element| element.to_string() == *dtype);
            found.ok_or_else(|| invalid(format!("dtype {dtype}")))
        };
        let cache = |name: &String| CacheType::named(name).ok_or_else(|| invalid(format!("a cache in {name}")));
        Ok(Self {
            name: name.to_owned(),
            description: file.description,
            ir_version: file.ir_version,
            dtypes: file.dtypes.iter().map(element).collect::<Result<_>>()?,
            compute: file.compute.as_ref().map(element).transpose()?,
            opsets: file.opset,
            lowering: file.lowering,
            provider: file.provider,
            positions: file.positions,
            kv_caches: file.kv_caches.iter().map(cache).collect::<Result<_>>()?,
            limits: file.limits,
            kernels: kernels.map(Kernels::parse).transpose().map_err(invalid)?,
        })
    }
}

/// What one version of an operator takes, gives and may be told.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schema {
    /// Operator.
    pub name: String,
    /// First opset version that this schema holds for.
    pub since: u32,
    /// Domain, where it is not that of the file.
    #[serde(default)]
    domain: Option<String>,
    /// Inputs in order.
    pub inputs: Vec<Parameter>,
    /// Outputs in order.
    pub outputs: Vec<Parameter>,
    /// Attributes by name.
    pub attributes: BTreeMap<String, Attribute>,
    /// The types that each type variable may stand for, as in `float16`.
    pub types: BTreeMap<String, Vec<String>>,
}

/// An input or an output of an operator.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "serde_json::Value")]
pub struct Parameter {
    /// Name.
    pub name: String,
    /// How often it may stand.
    pub option: ParameterOption,
    /// A type variable of the schema, or a type.
    pub ty: String,
}

/// How often a parameter may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterOption {
    /// Once.
    Single,
    /// Once or not at all.
    Optional,
    /// At least so many times; always the last parameter.
    Variadic(usize),
}

/// An attribute of an operator.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "serde_json::Value")]
pub struct Attribute {
    /// Kind, as in `ints`; kinds that no graph of ours writes (`tensor`) are kept by name.
    pub kind: String,
    /// True when a node must have it.
    pub required: bool,
    /// The value that holds where a node does not have it.
    pub default: Option<serde_json::Value>,
}

/// The kinds of attribute that graphs are written with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttributeKind {
    /// An integer.
    Int,
    /// A float.
    Float,
    /// A string.
    String,
    /// A list of integers.
    Ints,
    /// A list of floats.
    Floats,
}

impl AttributeKind {
    /// The name in a schema.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Int => "int",
            Self::Float => "float",
            Self::String => "string",
            Self::Ints => "ints",
            Self::Floats => "floats",
        }
    }
}

impl TryFrom<serde_json::Value> for Parameter {
    type Error = String;

    fn try_from(row: serde_json::Value) -> Result<Self, String> {
        let text = |at: usize| row.get(at).and_then(serde_json::Value::as_str).map(str::to_owned);
        let least = || row.get(3).and_then(serde_json::Value::as_u64).and_then(|least| usize::try_from(least).ok());
        let option = match text(1).as_deref() {
            Some("single") => Some(ParameterOption::Single),
            Some("optional") => Some(ParameterOption::Optional),
            Some("variadic") => least().map(ParameterOption::Variadic),
            _ => None,
        };
        match (text(0), option, text(2)) {
            (Some(name), Some(option), Some(ty)) => Ok(Self { name, option, ty }),
            _ => Err(format!("not a parameter: {row}")),
        }
    }
}

impl TryFrom<serde_json::Value> for Attribute {
    type Error = String;

    fn try_from(row: serde_json::Value) -> Result<Self, String> {
        let kind = row.get(0).and_then(serde_json::Value::as_str);
        match (kind, row.get(1).and_then(serde_json::Value::as_bool)) {
            (Some(kind), Some(required)) => Ok(Self { kind: kind.to_owned(), required, default: row.get(2).cloned() }),
            _ => Err(format!("not an attribute: {row}")),
        }
    }
}

/// A line of a table, parsed when it is first needed.
struct Line {
    since: u32,
    text: &'static str,
    schema: OnceLock<Option<Schema>>,
}

/// File and operator to the versions that it has had, oldest first.
type Index = HashMap<&'static str, HashMap<&'static str, Vec<Line>>>;

fn index() -> &'static Index {
    static INDEX: OnceLock<Index> = OnceLock::new();
    INDEX.get_or_init(|| {
        let mut index = Index::new();
        for (domain, table) in TABLES {
            for text in table.lines() {
                if let Some((name, since)) = head(text) {
                    index.entry(domain).or_default().entry(name).or_default().push(Line {
                        since,
                        text,
                        schema: OnceLock::new(),
                    });
                }
            }
        }
        index
    })
}

/// Name and version of a line, without parsing the rest: `{"name":"Add","since":14,...`.
fn head(text: &'static str) -> Option<(&'static str, u32)> {
    let (name, rest) = text.strip_prefix(r#"{"name":""#)?.split_once(r#"","since":"#)?;
    let (since, _) = rest.split_once(',')?;
    Some((name, since.parse().ok()?))
}

/// The schema in force for an operator in version `version` of `domain`.
pub fn schema(domain: &str, op_type: &str, version: u32) -> Option<&'static Schema> {
    let versions = index().get(domain).and_then(|table| table.get(op_type))?;
    let line = versions.iter().rev().find(|line| line.since <= version)?;
    line.schema.get_or_init(|| serde_json::from_str(line.text).ok()).as_ref()
}

/// Finds the schema of a node, or says why the target has none.
fn schema_for(target: &Target, domain: &str, op_type: &str) -> Result<&'static Schema, String> {
    let Some(&version) = target.opsets.get(domain) else {
        return Err(format!("target {} does not import the domain {domain:?} of {op_type}", target.name));
    };
    if let Some(found) = schema(domain, op_type, version).filter(|found| found.declares(domain)) {
        return Ok(found);
    }
    // onnxruntime has operators of its own in ONNX's domain
    let vendor = target.opsets.get(MICROSOFT).filter(|_| domain == ONNX);
    let stray = vendor.and_then(|&version| schema(MICROSOFT, op_type, version));
    stray.filter(|found| found.domain.as_deref() == Some(domain)).ok_or_else(|| {
        let place = if domain == ONNX { "ai.onnx" } else { domain };
        let elsewhere = index().get(domain).and_then(|table| table.get(op_type)).and_then(|lines| lines.first());
        let hint = elsewhere.map_or_else(String::new, |line| format!("; it came with {place} {}", line.since));
        format!("target {} has no {op_type} in {place} {version}{hint}", target.name)
    })
}

/// Checks a node against the schema that the target has for it. `None` is an input or output that is left out.
pub fn check(
    target: &Target,
    domain: &str,
    op_type: &str,
    inputs: &[Option<ElementType>],
    outputs: &[Option<ElementType>],
    attributes: &[(&str, AttributeKind)],
) -> Result<(), String> {
    let schema = schema_for(target, domain, op_type)?;
    let mut variables = BTreeMap::new();
    schema.check_values("input", &schema.inputs, inputs, &mut variables)?;
    schema.check_values("output", &schema.outputs, outputs, &mut variables)?;
    schema.check_attributes(attributes)
}

impl Schema {
    /// False for an operator that stands in the file of one domain and belongs to another.
    fn declares(&self, domain: &str) -> bool {
        self.domain.as_deref().is_none_or(|own| own == domain)
    }

    /// Name and version, as errors show them.
    fn label(&self) -> String {
        format!("{}-{}", self.name, self.since)
    }

    fn check_values<'s>(
        &'s self,
        what: &str,
        parameters: &'s [Parameter],
        values: &[Option<ElementType>],
        variables: &mut BTreeMap<&'s str, (ElementType, &'s str)>,
    ) -> Result<(), String> {
        let least = least(parameters);
        let most = match parameters.last().map(|last| last.option) {
            Some(ParameterOption::Variadic(_)) => None,
            _ => Some(parameters.len()),
        };
        let given = values.len();
        if given < least || most.is_some_and(|most| given > most) {
            let bounds = match most {
                Some(most) if most == least => most.to_string(),
                Some(most) => format!("{least} to {most}"),
                None => format!("at least {least}"),
            };
            return Err(format!("{}: {given} {what}s, and it has {bounds}", self.label()));
        }
        for (at, value) in values.iter().enumerate() {
            let Some(parameter) = parameters.get(at).or(parameters.last()) else {
                continue;
            };
            match value {
                None if parameter.option == ParameterOption::Optional => {}
                None => return Err(format!("{}: {what} {at} ({}) is missing", self.label(), parameter.name)),
                Some(element) => self
                    .check_type(parameter, *element, variables)
                    .map_err(|error| format!("{}: {what} {at} ({}) is {error}", self.label(), parameter.name))?,
            }
        }
        Ok(())
    }

    /// A type must be allowed, and be the one that its variable already stands for.
    fn check_type<'s>(
        &'s self,
        parameter: &'s Parameter,
        element: ElementType,
        variables: &mut BTreeMap<&'s str, (ElementType, &'s str)>,
    ) -> Result<(), String> {
        let Some(allowed) = self.types.get(&parameter.ty) else {
            let fits = parameter.ty == onnx_name(element);
            return if fits { Ok(()) } else { Err(format!("{}, and it takes {}", onnx_name(element), parameter.ty)) };
        };
        if !allowed.iter().any(|name| name == onnx_name(element)) {
            return Err(format!("{}, and {} may be {}", onnx_name(element), parameter.ty, allowed.join(", ")));
        }
        let (bound, by) = *variables.entry(&parameter.ty).or_insert((element, &parameter.name));
        if bound == element {
            return Ok(());
        }
        let (found, bound) = (onnx_name(element), onnx_name(bound));
        Err(format!("{found}, and {} is {bound} by its {by}", parameter.ty))
    }

    fn check_attributes(&self, attributes: &[(&str, AttributeKind)]) -> Result<(), String> {
        for (at, (name, kind)) in attributes.iter().enumerate() {
            let Some(known) = self.attributes.get(*name) else {
                let names: Vec<&str> = self.attributes.keys().map(String::as_str).collect();
                return Err(format!("{}: no attribute {name}; it has [{}]", self.label(), names.join(", ")));
            };
            if known.kind != kind.as_str() {
                let (wanted, found) = (&known.kind, kind.as_str());
                return Err(format!("{}: attribute {name} is {found}, and it takes {wanted}", self.label()));
            }
            if attributes.iter().take(at).any(|(earlier, _)| earlier == name) {
                return Err(format!("{}: attribute {name} stands twice", self.label()));
            }
        }
        let given = |name: &str| attributes.iter().any(|(known, _)| *known == name);
        match self.attributes.iter().find(|(name, known)| known.required && !given(name)) {
            Some((name, _)) => Err(format!("{}: attribute {name} is required", self.label())),
            None => Ok(()),
        }
    }
}

/// How many values must stand: up to the last one that is not optional.
fn least(parameters: &[Parameter]) -> usize {
    let needed = parameters.iter().enumerate().map(|(at, parameter)| match parameter.option {
        ParameterOption::Single => at + 1,
        ParameterOption::Variadic(least) if least > 0 => at + least,
        ParameterOption::Optional | ParameterOption::Variadic(_) => 0,
    });
    needed.max().unwrap_or(0)
}

/// The name of a type in the tables: the schema's without `tensor()`.
fn onnx_name(element: ElementType) -> &'static str {
    let name = element.schema_name();
    name.strip_prefix("tensor(").and_then(|name| name.strip_suffix(')')).unwrap_or(name)
}

#[cfg(test)]
#[path = "opset_tests.rs"]
mod tests;
