//! Weight expressions: how a tensor is made from others, as data.
//!
//! A closed list of transforms that print, have a shape before any byte is read, and are evaluated lazily.
//! Templates use them from checkpoint tensors to parameters, lowering from parameters to initializers;
//! binding puts one into the other.

use std::fmt;

/// An expression over named tensors. Axes count from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Weight {
    /// A tensor of the checkpoint or a parameter of the graph, as it is.
    Source(String),
    /// Joined along an axis.
    Concat(usize, Vec<Weight>),
    /// Joined along a new first axis.
    Stack(Vec<Weight>),
    /// One of the consecutive pieces of a tensor along an axis.
    Split(Split, Box<Weight>),
    /// The last two axes exchanged.
    Transpose(Box<Weight>),
    /// Rows of equally shaped tensors in turn, along an axis: `a[0], b[0], a[1], b[1], ...`
    Interleave(usize, Vec<Weight>),
    /// `1 + x`, computed in float32.
    AddOne(Box<Weight>),
    /// The same elements in another shape.
    Reshape(Vec<usize>, Box<Weight>),
}

/// Which piece [`Weight::Split`] takes. The axis is seen as `groups` blocks, each of which holds one part of
/// every piece: one group for `q q q k v`, one per key head for `q k v, q k v`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// The axis.
    pub axis: usize,
    /// Blocks along it.
    pub groups: usize,
    /// Sizes of the pieces, over all groups.
    pub sizes: Vec<usize>,
    /// Which piece.
    pub index: usize,
}

/// Consecutive elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part<'w> {
    /// The tensor's name.
    pub tensor: &'w str,
    /// Elements before it.
    pub first: usize,
    /// Its elements.
    pub count: usize,
}

impl Split {
    /// Where this piece starts within a block, how long it is there, and the block's length.
    pub(crate) fn block(&self) -> Result<(usize, usize, usize), String> {
        let groups = self.groups.max(1);
        if let Some(odd) = self.sizes.iter().find(|size| *size % groups != 0) {
            return Err(format!("{odd} rows do not divide into {groups} groups"));
        }
        let start: usize = self.sizes.iter().take(self.index).map(|size| size / groups).sum();
        let length = self.sizes.get(self.index).copied().unwrap_or(0) / groups;
        Ok((start, length, self.sizes.iter().map(|size| size / groups).sum()))
    }
}

impl Weight {
    /// A named tensor.
    pub fn source(name: impl Into<String>) -> Self {
        Self::Source(name.into())
    }

    /// Every tensor that the expression reads, in order.
    pub fn sources(&self) -> Vec<&str> {
        match self {
            Self::Source(name) => vec![name],
            Self::Concat(_, parts) | Self::Stack(parts) | Self::Interleave(_, parts) => {
                parts.iter().flat_map(Self::sources).collect()
            }
            Self::Split(_, inner) | Self::Transpose(inner) | Self::AddOne(inner) | Self::Reshape(_, inner) => {
                inner.sources()
            }
        }
    }

    /// The expression with every source replaced.
    pub fn substitute<E>(&self, replace: &mut impl FnMut(&str) -> Result<Self, E>) -> Result<Self, E> {
        let mut all =
            |parts: &[Self]| -> Result<Vec<Self>, E> { parts.iter().map(|part| part.substitute(replace)).collect() };
        Ok(match self {
            Self::Source(name) => replace(name)?,
            Self::Concat(axis, parts) => Self::Concat(*axis, all(parts)?),
            Self::Stack(parts) => Self::Stack(all(parts)?),
            Self::Interleave(axis, parts) => Self::Interleave(*axis, all(parts)?),
            Self::Split(split, inner) => Self::Split(split.clone(), Box::new(inner.substitute(replace)?)),
            Self::Transpose(inner) => Self::Transpose(Box::new(inner.substitute(replace)?)),
            Self::AddOne(inner) => Self::AddOne(Box::new(inner.substitute(replace)?)),
            Self::Reshape(shape, inner) => Self::Reshape(shape.clone(), Box::new(inner.substitute(replace)?)),
        })
    }

    /// The part of one tensor whose bytes, as they are stored, are the result.
    pub fn contiguous(&self, of: &impl Fn(&str) -> Option<Vec<usize>>) -> Option<Part<'_>> {
        match self {
            Self::Source(name) => Some(Part { tensor: name, first: 0, count: of(name)?.iter().product() }),
            Self::Reshape(_, inner) => inner.contiguous(of),
            Self::Concat(_, parts) | Self::Stack(parts) | Self::Interleave(_, parts) => match parts.as_slice() {
                [only] => only.contiguous(of),
                _ => None,
            },
            Self::Split(split, inner) => {
                let shape = inner.shape(of).ok()?;
                let (start, length, block) = split.block().ok()?;
                let outer: usize = shape.iter().take(split.axis).product::<usize>() * split.groups.max(1);
                let row: usize = shape.iter().skip(split.axis + 1).product();
                let part = inner.contiguous(of)?;
                let whole = outer == 1 || length == block;
                whole.then(|| Part { first: part.first + start * row, count: outer * length * row, ..part })
            }
            Self::Transpose(_) | Self::AddOne(_) => None,
        }
    }

    /// Shape of the result, given the shapes of the sources.
    pub fn shape(&self, of: &impl Fn(&str) -> Option<Vec<usize>>) -> Result<Vec<usize>, String> {
        match self {
            Self::Source(name) => of(name).ok_or_else(|| format!("there is no {name}")),
            Self::AddOne(inner) => inner.shape(of),
            Self::Reshape(shape, inner) => {
                let from = inner.shape(of)?;
                if from.iter().product::<usize>() != shape.iter().product::<usize>() {
                    return Err(format!("{inner} is {from:?} and can not be seen as {shape:?}"));
                }
                Ok(shape.clone())
            }
            Self::Transpose(inner) => {
                let mut shape = inner.shape(of)?;
                let rank = shape.len();
                if rank < 2 {
                    return Err(format!("{inner} has {rank} axes and can not be transposed"));
                }
                shape.swap(rank - 1, rank - 2);
                Ok(shape)
            }
            Self::Stack(parts) => {
                let mut shape = same_shapes(parts, of)?;
                shape.insert(0, parts.len());
                Ok(shape)
            }
            Self::Interleave(axis, parts) => {
                let mut shape = same_shapes(parts, of)?;
                let length = shape.get_mut(*axis).ok_or_else(|| format!("no axis {axis}"))?;
                *length *= parts.len();
                Ok(shape)
            }
            Self::Concat(axis, parts) => concat_shape(*axis, parts, of),
            Self::Split(split, inner) => {
                let mut shape = inner.shape(of)?;
                let (_, length, block) = split.block()?;
                let axis = shape.get_mut(split.axis).ok_or_else(|| format!("{inner} has no axis {}", split.axis))?;
                if *axis != block * split.groups.max(1) {
                    return Err(format!(
                        "axis {} of {inner} has {axis} rows, its pieces take {:?}",
                        split.axis, split.sizes
                    ));
                }
                *axis = length * split.groups.max(1);
                Ok(shape)
            }
        }
    }
}

fn same_shapes(parts: &[Weight], of: &impl Fn(&str) -> Option<Vec<usize>>) -> Result<Vec<usize>, String> {
    let first = parts.first().ok_or("nothing to join")?;
    let shape = first.shape(of)?;
    for part in parts {
        let other = part.shape(of)?;
        if other != shape {
            return Err(format!("{part} is {other:?}, {first} is {shape:?}"));
        }
    }
    Ok(shape)
}

fn concat_shape(axis: usize, parts: &[Weight], of: &impl Fn(&str) -> Option<Vec<usize>>) -> Result<Vec<usize>, String> {
    let first = parts.first().ok_or("nothing to join")?;
    let mut shape = first.shape(of)?;
    let mut total = 0;
    for part in parts {
        let mut other = part.shape(of)?;
        let (Some(length), Some(slot)) = (other.get(axis).copied(), shape.get(axis).copied()) else {
            return Err(format!("{part} has no axis {axis}"));
        };
        total += length;
        if let Some(own) = other.get_mut(axis) {
            *own = slot;
        }
        if other != shape {
            return Err(format!("{part} does not fit {first} beside axis {axis}"));
        }
    }
    if let Some(slot) = shape.get_mut(axis) {
        *slot = total;
    }
    Ok(shape)
}

impl fmt::Display for Weight {
    /// `stack(a, b)`, `split(qkv, 1 of 3)`; long lists are shortened in the middle.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(name) => f.write_str(name),
            Self::Concat(axis, parts) => write!(f, "concat({}, axis {axis})", list(parts)),
            Self::Stack(parts) => write!(f, "stack({})", list(parts)),
            Self::Interleave(axis, parts) => write!(f, "interleave({}, axis {axis})", list(parts)),
            Self::Split(split, inner) => {
                write!(f, "split({inner}, part {} of {:?}", split.index, split.sizes)?;
                if split.groups > 1 {
                    write!(f, " in {} groups", split.groups)?;
                }
                f.write_str(")")
            }
            Self::Transpose(inner) => write!(f, "transpose({inner})"),
            Self::AddOne(inner) => write!(f, "add_one({inner})"),
            Self::Reshape(shape, inner) => write!(f, "reshape({inner}, {shape:?})"),
        }
    }
}

fn list(parts: &[Weight]) -> String {
    match parts {
        [first, second, .., last] if parts.len() > 4 => {
            format!("{first}, {second}, ... {} in all ..., {last}", parts.len())
        }
        _ => parts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

mod convert;
mod evaluate;
mod rounding;
pub(crate) use convert::{convert, read_floats, write_floats};
pub use evaluate::{Evaluation, Tensors};
pub(crate) use rounding::Rounding;
