//! The dialect of ONNX operators.

use std::fmt;

use crate::element::ElementType;
use crate::graph::Dialect;
use crate::quantize::Scheme;
use crate::weight::Weight;

/// The domain of onnxruntime's own operators.
pub const MICROSOFT: &str = "com.microsoft";

/// The dialect of ONNX operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Onnx {}

impl Dialect for Onnx {
    type Operation = Operator;
    type Element = ElementType;
    type Literal = Constant;
}

/// What is known when the graph is written.
#[derive(Debug, Clone, PartialEq)]
pub enum Constant {
    /// Bytes that stand in the graph file.
    Inline(Vec<u8>),
    /// Made from parameters, and stored beside the graph.
    Weight(Weight),
    /// A part of one tensor of the checkpoint, as its file has it.
    Stored(Weight),
    /// A part of a quantised matrix, made from parameters.
    Quantized(Quantized),
}

/// One of the tensors that a matrix `[.., N, K]` becomes when it is quantised.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// How.
    pub scheme: Scheme,
    /// Which of them.
    pub part: Part,
    /// The matrix.
    pub weight: Weight,
}

/// The tensors of a quantised matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The integers, unsigned, each block filled up.
    Data,
    /// The integers less the implicit zero point, signed, without filling.
    SignedData,
    /// A scale for each block.
    Scales,
    /// A zero point for each block.
    ZeroPoints,
    /// The zero points less the implicit one, signed, without filling.
    SignedZeroPoints,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "integers",
            Self::SignedData => "signed integers",
            Self::Scales => "scales",
            Self::ZeroPoints => "zero points",
            Self::SignedZeroPoints => "signed zero points",
        })
    }
}

impl fmt::Display for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(bytes) => write!(f, "constant<{} bytes>", bytes.len()),
            Self::Weight(weight) => write!(f, "weight<{weight}>"),
            Self::Stored(weight) => write!(f, "stored<{weight}>"),
            Self::Quantized(Quantized { scheme, part, weight }) => write!(f, "{part}<{weight}, {scheme}>"),
        }
    }
}

/// A call of an operator.
#[derive(Debug, Clone, PartialEq)]
pub struct Operator {
    /// Domain; empty for ONNX's own.
    pub domain: &'static str,
    /// Name.
    pub op_type: &'static str,
    /// Attributes in the order in which they were given.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// Value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// INT.
    Int(i64),
    /// FLOAT.
    Float(f32),
    /// INTS.
    Ints(Vec<i64>),
    /// STRING.
    String(&'static str),
}

impl Operator {
    /// An operator of ONNX's own domain.
    pub fn new(op_type: &'static str) -> Self {
        Self { domain: "", op_type, attributes: Vec::new() }
    }

    /// An operator of onnxruntime's domain.
    pub fn microsoft(op_type: &'static str) -> Self {
        Self { domain: MICROSOFT, ..Self::new(op_type) }
    }

    /// With an integer attribute.
    #[must_use]
    pub fn int(mut self, name: &'static str, value: i64) -> Self {
        self.attributes.push((name, Attribute::Int(value)));
        self
    }

    /// With an attribute that counts something.
    #[must_use]
    pub fn size(self, name: &'static str, value: usize) -> Self {
        self.int(name, i64::try_from(value).unwrap_or(i64::MAX))
    }

    /// With a float attribute; ONNX has only float32 there.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "attributes are float32")]
    pub fn float(mut self, name: &'static str, value: f64) -> Self {
        self.attributes.push((name, Attribute::Float(value as f32)));
        self
    }

    /// With a list of integers.
    #[must_use]
    pub fn ints(mut self, name: &'static str, values: &[i64]) -> Self {
        self.attributes.push((name, Attribute::Ints(values.to_vec())));
        self
    }

    /// With a string.
    #[must_use]
    pub fn string(mut self, name: &'static str, value: &'static str) -> Self {
        self.attributes.push((name, Attribute::String(value)));
        self
    }

    /// An integer attribute, if it is given.
    pub fn get_int(&self, name: &str) -> Option<i64> {
        self.attributes.iter().find_map(|(key, value)| match value {
            Attribute::Int(value) if *key == name => Some(*value),
            _ => None,
        })
    }

    /// A list of integers, if it is given.
    pub fn get_ints(&self, name: &str) -> Option<&[i64]> {
        self.attributes.iter().find_map(|(key, value)| match value {
            Attribute::Ints(values) if *key == name => Some(values.as_slice()),
            _ => None,
        })
    }
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.domain.is_empty() {
            write!(f, "{}.", self.domain)?;
        }
        f.write_str(self.op_type)?;
        if self.attributes.is_empty() {
            return Ok(());
        }
        let attributes: Vec<String> = self.attributes.iter().map(|(name, value)| format!("{name}={value}")).collect();
        write!(f, "{{{}}}", attributes.join(", "))
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Ints(values) => write!(f, "{values:?}"),
            Self::String(value) => write!(f, "{value:?}"),
        }
    }
}
