//! Composite operations: what a model means, before any target is known.

use std::fmt;

use crate::graph::{Dialect, Dim, Shape, Type, broadcast};
use crate::spec::{Activation, Alibi, NormKind, PositionScale, Rope, RopeLayout, Routing};

/// The dialect of composite operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {}

impl Dialect for Model {
    type Operation = Composite;
    type Element = Kind;
    type Literal = Parameter;
}

/// Element types before a computation type is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The computation's float type.
    Real,
    /// float32 whatever the computation's type is: routers, logits.
    Full,
    /// 64-bit integers.
    Integer,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Real => "real",
            Self::Full => "full",
            Self::Integer => "integer",
        })
    }
}

/// Marks a value as a learned parameter; its name and shape are the value's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter;

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("parameter")
    }
}

/// Formula of a norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormOp {
    /// The formula.
    pub kind: NormKind,
    /// Added before the root.
    pub eps: f64,
    /// It has a weight, the operand behind those that are normalised.
    pub weight: bool,
    /// It has a bias, the last operand.
    pub bias: bool,
    /// The weight is stored as its difference from one.
    pub offset: bool,
}

/// Causal attention with a cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionOp {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Size of a query or key head.
    pub key_size: usize,
    /// Size of a value head.
    pub value_size: usize,
    /// Multiplier of the products.
    pub scale: f64,
    /// Keys that a query sees, itself included.
    pub window: Option<usize>,
    /// A query sees only keys of its own block of this many positions.
    pub chunk: Option<usize>,
    /// Scores become `tanh(score / softcap) * softcap` before the mask.
    pub softcap: Option<f64>,
    /// A learned score per head takes part in the softmax, `[N]`, the last operand.
    pub sinks: bool,
    /// Scores fall linearly with distance.
    pub alibi: Option<Alibi>,
    /// Keys and values are another layer's present ones, all of them, and are not handed on.
    pub shared: bool,
    /// Something is added to the scores, `[B, 1, S, T]`, the last operand.
    pub bias: bool,
}

/// Routing and running of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeOp {
    /// Number of experts.
    pub experts: usize,
    /// Experts chosen for a token.
    pub top_k: usize,
    /// Width of an expert's hidden layer.
    pub intermediate_size: usize,
    /// Non-linearity.
    pub activation: Activation,
    /// Experts are gated MLPs.
    pub gated: bool,
    /// Experts have biases.
    pub bias: bool,
    /// Weights multiply the input instead of the output.
    pub weigh_input: bool,
    /// From logits to weights.
    pub routing: Routing,
}

/// An operation of the model. Operands and results are listed with their shapes: `B` batch, `S` new tokens,
/// `P` tokens in the cache, `T = P + S`.
#[derive(Debug, Clone, PartialEq)]
pub enum Composite {
    /// ids `[B, S]`, table `[V, H]` -> `[B, S, H]`
    Embed,
    /// Product with a constant, which is rounded to the element type first.
    Scale(f64),
    /// x `[.., I]`, weight `[O, I]`, optional bias `[O]` -> `[.., O]`; computed in the weight's type.
    Linear,
    /// x `[.., H]`, weight and bias `[H]` if it has them -> `[.., H]`
    Norm(NormOp),
    /// residual, x, weight and bias `[H]` if it has them -> residual + x, and its norm
    AddNorm(NormOp),
    /// Sum, with broadcasting.
    Add,
    /// Product, with broadcasting.
    Multiply,
    /// Logistic function.
    Sigmoid,
    /// Non-linearity; xIELU takes its two learned slopes and its two constants as further operands.
    Activate(Activation),
    /// gate, up -> `(u + 1) * g * sigmoid(alpha g)`, the gate clamped to at most a limit, up to plus and minus it
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f64,
        /// Where values are cut off.
        limit: f64,
    },
    /// `tanh(x / cap) * cap`
    Softcap(f64),
    /// Clamped to plus and minus a bound.
    Clip(f64),
    /// Integers plus a constant.
    Shift(usize),
    /// positions `[B, S]` -> sines, then cosines, `[B, S, width]`
    Sinusoid {
        /// Elements per position.
        width: usize,
    },
    /// positions `[B, S]`, mask `[B, T]` -> multiplier of queries, `[B, S, 1]`
    PositionScale(PositionScale),
    /// Another shape for the same elements.
    Reshape(Shape),
    /// Pieces of these sizes along the last axis.
    Split(Vec<usize>),
    /// Joined along the last axis.
    Concat,
    /// Broadcast to a shape.
    Expand(Shape),
    /// Cast.
    Convert(Kind),
    /// positions `[B, S]` -> cosine and sine, each `[B, S, size / 2]`
    RopeTable(Rope),
    /// x `[B, S, heads * D]`, cosine, sine -> x with the first `size` elements of each head rotated
    Rotate {
        /// Heads in x.
        heads: usize,
        /// Rotated elements of each.
        size: usize,
        /// Which elements pair up.
        layout: RopeLayout,
    },
    /// q `[B, S, N*Dk]`, k `[B, S, K*Dk]`, v `[B, S, K*Dv]`, past key `[B, K, P, Dk]` and value, mask `[B, T]`,
    /// sinks `[N]` if it has them -> output `[B, S, N*Dv]`, present key `[B, K, T, Dk]` and value
    Attention(AttentionOp),
    /// x `[B, S, H]`, router logits `[B, S, E]`, correction bias `[E]` if any, scale `[E]` if any, gate `[E, I, H]` if gated,
    /// up `[E, I, H]`, down `[E, H, I]`, each with its bias `[E, .]` behind it if experts have them -> `[B, S, H]`
    Moe(MoeOp),
    /// x `[B, S, H]`, mask `[B, T]` -> the last kept token of each row, `[B, 1, H]`
    LastToken,
    /// x `[B, S, H]`, mask `[B, T]` -> the same, as the tokens stand in `input_ids`
    EveryToken,
    /// Difference, with broadcasting.
    Subtract,
    /// Hyperbolic tangent.
    Tanh,
    /// Exponential.
    Exp,
    /// Sum over the last axis, which stays.
    Sum,
    /// Elements of the last axis from the first to before the second.
    Slice(usize, usize),
    /// Product of the matrices of the last two axes.
    MatMul,
    /// The axes in another order.
    Transpose(Vec<usize>),
    /// `relu(x − mean(x) − std(x) · Φ⁻¹(share))` over the last axis
    SparseRelu(f64),
    /// x, reference -> x with the root mean square of the reference; that of x counts as at least `1e-5^(1/2)`
    MatchMagnitude,
    /// ids, with those from this number on as 0
    IdsBelow(usize),
    /// logits `[B, S, E]` -> which experts the slots take `[B, S, k, E]`, and the softmax of their logits `[B, S, k, 1]`
    Choose {
        /// Slots.
        top_k: usize,
    },
    /// x `[B, S, I]`, weight `[E, O, I]` -> every expert's result `[B, S, E, O]`
    EachExpert,
    /// x `[B, S, E, I]`, weight `[E, O, I]` -> the sum of the experts' results `[B, S, O]`
    SumExperts,
    /// q `[B, S, H*D]`, k `[B, S, D]`, past k `[B, P, D]`, weights `[B, S, H]` -> what is added to the scores
    /// `[B, 1, S, T]`, present k `[B, T, D]`
    Index(IndexOp),
}

/// The choice of keys by an indexer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexOp {
    /// Query heads.
    pub heads: usize,
    /// Size of a head.
    pub size: usize,
    /// Keys that stay.
    pub top_k: usize,
}

impl Composite {
    /// Result types, or what is wrong with the operands.
    pub(super) fn infer(&self, operands: &[&Type<Kind>]) -> Result<Vec<Type<Kind>>, String> {
        let operand = |i: usize| operands.get(i).copied().ok_or_else(|| format!("operand {i} is missing"));
        let x = operand(0)?;
        Ok(match self {
            Self::Embed => vec![Type::new(Kind::Real, with_axis(x, last(operand(1)?)?.clone()))],
            Self::Linear => vec![linear(x, operand(1)?, operands.get(2).copied())?],
            Self::Norm(op) => {
                for parameter in operands.iter().skip(1) {
                    expect_last(x, last(parameter)?)?;
                }
                op.expect_operands(1, operands.len())?;
                vec![x.clone()]
            }
            Self::AddNorm(op) => {
                expect_same(x, operand(1)?)?;
                for parameter in operands.iter().skip(2) {
                    expect_last(x, last(parameter)?)?;
                }
                op.expect_operands(2, operands.len())?;
                vec![x.clone(), x.clone()]
            }
            Self::Add | Self::Multiply => {
                let other = operand(1)?;
                expect_element(x, other)?;
                let shape = broadcast(&x.shape, &other.shape).ok_or_else(|| format!("{x} and {other} do not fit"))?;
                vec![Type::new(x.element, shape)]
            }
            Self::ClampedSwiglu { .. } => {
                expect_same(x, operand(1)?)?;
                vec![x.clone()]
            }
            Self::Scale(_) | Self::Sigmoid | Self::Activate(_) | Self::Softcap(_) | Self::Clip(_) | Self::Shift(_) => {
                vec![x.clone()]
            }
            Self::Sinusoid { width } => vec![per_position(x, *width)],
            Self::PositionScale(_) => vec![per_position(x, 1)],
            Self::Reshape(shape) => {
                if product(&x.shape) != product(shape) {
                    return Err(format!("{x} can not be reshaped to {}", Type::new(x.element, shape.clone())));
                }
                vec![Type::new(x.element, shape.clone())]
            }
            Self::Expand(shape) => vec![Type::new(x.element, shape.clone())],
            Self::Convert(kind) => vec![Type::new(*kind, x.shape.clone())],
            Self::Split(sizes) => split(x, sizes)?,
            Self::Concat => vec![concat(operands)?],
            Self::RopeTable(rope) => {
                let table = per_position(x, rope.size / 2);
                vec![table.clone(), table]
            }
            Self::Attention(attention) => super::infer::attention(attention, operands)?,
            Self::Moe(moe) => {
                expect_last(operand(1)?, &Dim::from(moe.experts + moe.routing.identity_experts))?;
                vec![x.clone()]
            }
            Self::Subtract => Self::Add.infer(operands)?,
            Self::Tanh | Self::Exp | Self::SparseRelu(_) | Self::MatchMagnitude | Self::IdsBelow(_) => vec![x.clone()],
            further => super::infer::infer(further, operands)?,
        })
    }
}

impl NormOp {
    fn expect_operands(&self, normalised: usize, found: usize) -> Result<(), String> {
        let expected = normalised + usize::from(self.weight) + usize::from(self.bias);
        if found == expected { Ok(()) } else { Err(format!("{found} operands, expected {expected}")) }
    }
}

fn per_position(positions: &Type<Kind>, width: usize) -> Type<Kind> {
    let mut shape = positions.shape.clone();
    shape.push(Dim::from(width));
    Type::new(Kind::Real, shape)
}

pub(super) fn last(ty: &Type<Kind>) -> Result<&Dim, String> {
    ty.shape.last().ok_or_else(|| format!("{ty} has no axis"))
}

/// The shape with one more axis behind the others.
fn with_axis(ty: &Type<Kind>, axis: Dim) -> Shape {
    let mut shape = ty.shape.clone();
    shape.push(axis);
    shape
}

fn product(shape: &Shape) -> Dim {
    shape.iter().fold(Dim::from(1), |product, dim| &product * dim)
}

fn expect_element(a: &Type<Kind>, b: &Type<Kind>) -> Result<(), String> {
    if a.element == b.element { Ok(()) } else { Err(format!("{a} and {b} differ in element type")) }
}

fn expect_same(a: &Type<Kind>, b: &Type<Kind>) -> Result<(), String> {
    if a == b { Ok(()) } else { Err(format!("{a} and {b} should be of one type")) }
}

pub(super) fn expect_last(ty: &Type<Kind>, expected: &Dim) -> Result<(), String> {
    let found = last(ty)?;
    if found == expected { Ok(()) } else { Err(format!("the last axis of {ty} should be {expected}")) }
}

fn linear(x: &Type<Kind>, weight: &Type<Kind>, bias: Option<&Type<Kind>>) -> Result<Type<Kind>, String> {
    let [output, input] = weight.shape.as_slice() else {
        return Err(format!("a weight is [out, in], found {weight}"));
    };
    expect_last(x, input)?;
    expect_element(x, weight)?;
    if let Some(bias) = bias {
        expect_last(bias, output)?;
    }
    let mut shape = x.shape.clone();
    shape.pop();
    shape.push(output.clone());
    Ok(Type::new(x.element, shape))
}

fn split(x: &Type<Kind>, sizes: &[usize]) -> Result<Vec<Type<Kind>>, String> {
    expect_last(x, &Dim::from(sizes.iter().sum::<usize>()))?;
    let piece = |size: &usize| {
        let mut shape = x.shape.clone();
        shape.pop();
        shape.push(Dim::from(*size));
        Type::new(x.element, shape)
    };
    Ok(sizes.iter().map(piece).collect())
}

fn concat(operands: &[&Type<Kind>]) -> Result<Type<Kind>, String> {
    let mut width = Dim::constant(0);
    for ty in operands {
        width = &width + last(ty)?;
    }
    let first = operands.first().ok_or("nothing to join")?;
    let mut shape = first.shape.clone();
    shape.pop();
    shape.push(width);
    Ok(Type::new(first.element, shape))
}

impl fmt::Display for Composite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Norm(op) => write!(f, "Norm{op}"),
            Self::AddNorm(op) => write!(f, "AddNorm{op}"),
            Self::Reshape(shape) => write!(f, "Reshape{{{}}}", Type::new("", shape.clone())),
            Self::Expand(shape) => write!(f, "Expand{{{}}}", Type::new("", shape.clone())),
            Self::Attention(op) => write!(f, "{op}"),
            Self::Moe(op) => write!(f, "{op}"),
            other => write!(f, "{other:?}"),
        }
    }
}

impl fmt::Display for AttentionOp {
    /// What is usual is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { heads, kv_heads, key_size, value_size, scale, .. } = self;
        write!(f, "Attention{{heads: {heads}, kv_heads: {kv_heads}, size: {key_size}")?;
        if value_size != key_size {
            write!(f, ", value_size: {value_size}")?;
        }
        write!(f, ", scale: {scale}")?;
        let sizes = [("window", self.window), ("chunk", self.chunk)];
        for (name, size) in sizes.iter().filter_map(|(name, size)| size.map(|size| (name, size))) {
            write!(f, ", {name}: {size}")?;
        }
        if let Some(cap) = self.softcap {
            write!(f, ", softcap: {cap}")?;
        }
        if let Some(alibi) = self.alibi {
            write!(f, ", {alibi:?}")?;
        }
        f.write_str(if self.sinks { ", sinks}" } else { "}" })
    }
}

impl fmt::Display for MoeOp {
    /// What is usual is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { experts, top_k, intermediate_size, activation, routing, .. } = self;
        write!(f, "Moe{{{top_k} of {experts} experts of {intermediate_size}, {activation:?}")?;
        let flags = [("gated", self.gated), ("bias", self.bias), ("weigh_input", self.weigh_input)];
        for (name, _) in flags.iter().filter(|(_, set)| *set) {
            write!(f, ", {name}")?;
        }
        write!(f, ", {:?}", routing.score)?;
        let flags =
            [("bias", routing.bias), ("correction bias", routing.correction_bias), ("normalize", routing.normalize)];
        for (name, _) in flags.iter().filter(|(_, set)| *set) {
            write!(f, " {name}")?;
        }
        if let Some(groups) = routing.groups {
            write!(f, ", {} of {} groups by their best {}", groups.top, groups.count, groups.score_top)?;
        }
        if routing.identity_experts > 0 {
            write!(f, ", {} identity experts", routing.identity_experts)?;
        }
        write!(f, ", scale: {}}}", routing.scale)
    }
}

impl fmt::Display for NormOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weight = match (self.weight, self.offset) {
            (false, _) => "",
            (true, false) => ", weight",
            (true, true) => ", 1 + weight",
        };
        let bias = if self.bias { ", bias" } else { "" };
        write!(f, "{{{:?}, eps: {:e}{weight}{bias}}}", self.kind, self.eps)
    }
}
