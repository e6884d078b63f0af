//! Parameters taken from the checkpoint's files as they are: what has to be joined, turned or widened for the graph
//! is written as nodes on constants, which a session folds when it loads.

use std::collections::BTreeMap;

use super::{Lowerer, Operator};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Type, ValueId};
use crate::weight::{Split, Weight};

/// How a checkpoint stores the parameters of a model.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    /// Each parameter, from tensors.
    pub parameters: BTreeMap<String, Weight>,
    /// Element type and shape of those tensors.
    pub tensors: BTreeMap<String, (ElementType, Vec<usize>)>,
}

impl Stored {
    /// The expression over tensors that an expression over parameters stands for.
    fn resolve(&self, weight: &Weight) -> Option<Weight> {
        weight.substitute(&mut |name| self.parameters.get(name).cloned().ok_or(())).ok()
    }

    fn shape(&self, weight: &Weight) -> Result<Vec<usize>> {
        let of = |name: &str| self.tensors.get(name).map(|(_, shape)| shape.clone());
        weight.shape(&of).map_err(|reason| Error::new(Code::TensorShape, weight).found(reason))
    }

    /// Element type of the one tensor that an expression is a part of.
    fn part(&self, weight: &Weight) -> Option<ElementType> {
        let of = |name: &str| self.tensors.get(name).map(|(_, shape)| shape.clone());
        let part = weight.contiguous(&of)?;
        self.tensors.get(part.tensor).map(|(element, _)| *element)
    }

    /// Element type of an expression that needs no arithmetic; none for any other.
    fn linkable(&self, weight: &Weight) -> Option<ElementType> {
        if let Some(element) = self.part(weight) {
            return matches!(element, ElementType::F32 | ElementType::F16 | ElementType::BF16).then_some(element);
        }
        match weight {
            Weight::Source(_) | Weight::AddOne(_) => None,
            Weight::Reshape(_, inner) | Weight::Transpose(inner) | Weight::Split(_, inner) => self.linkable(inner),
            Weight::Concat(_, parts) | Weight::Stack(parts) | Weight::Interleave(_, parts) => {
                let mut elements = parts.iter().map(|part| self.linkable(part));
                let first = elements.next()??;
                elements.all(|element| element == Some(first)).then_some(first)
            }
        }
    }
}

impl Lowerer<'_> {
    /// A parameter from the checkpoint's files, in the type of `ty`. None, if nothing is to be taken from there, or
    /// if it takes arithmetic to make it: then it is written.
    pub(super) fn linked(&mut self, name: &str, ty: &Type<ElementType>, weight: &Weight) -> Result<Option<ValueId>> {
        let Some(stored) = self.options.stored else { return Ok(None) };
        let Some(weight) = stored.resolve(weight).filter(|weight| stored.linkable(weight).is_some()) else {
            return Ok(None);
        };
        let value = self.share(&format!("weights/{name}"), |s| {
            let shape = stored.shape(&weight)?;
            let value = s.link(stored, name, &weight, &shape)?;
            s.e.cast(value, ty.element)
        })?;
        Ok(Some(value))
    }

    /// Nodes that make an expression from parts of tensors; `view` is the shape to see it in.
    fn link(&mut self, stored: &Stored, name: &str, weight: &Weight, view: &[usize]) -> Result<ValueId> {
        if let Some(element) = stored.part(weight) {
            let ty = Type::new(element, view.iter().copied().map(Dim::from));
            return Ok(self.e.stored(name, ty, weight.clone()));
        }
        let value = match weight {
            Weight::Reshape(_, inner) => return self.link(stored, name, inner, view),
            Weight::Stack(parts) if view.first() == Some(&parts.len()) => {
                // [1, ..] each -> [n, ..]
                let piece = [&[1], view.get(1..).unwrap_or_default()].concat();
                return self.join(stored, name, (0, parts), &piece);
            }
            Weight::Stack(parts) => {
                let piece = [&[1], stored.shape(parts.first().unwrap_or(weight))?.as_slice()].concat();
                self.join(stored, name, (0, parts), &piece)?
            }
            Weight::Concat(axis, parts) => {
                let mut pieces = Vec::new();
                for (i, part) in parts.iter().enumerate() {
                    pieces.push(self.link(stored, &format!("{name}.{i}"), part, &stored.shape(part)?)?);
                }
                self.e.add(Operator::new("Concat").size("axis", *axis), &pieces)?
            }
            Weight::Interleave(axis, parts) => {
                // [.., r, ..] each -> [.., r, 1, ..] -> [.., r, n, ..]
                let mut piece = stored.shape(parts.first().unwrap_or(weight))?;
                piece.insert(axis + 1, 1);
                self.join(stored, name, (axis + 1, parts), &piece)?
            }
            Weight::Transpose(inner) => {
                let shape = stored.shape(inner)?;
                let value = self.link(stored, name, inner, &shape)?;
                let mut order: Vec<i64> = (0..).take(shape.len()).collect();
                let rank = order.len();
                order.swap(rank.saturating_sub(1), rank.saturating_sub(2));
                self.e.add(Operator::new("Transpose").ints("perm", &order), &[value])?
            }
            Weight::Split(split, inner) => self.link_piece(stored, name, split, inner)?,
            Weight::Source(_) | Weight::AddOne(_) => {
                return Err(Error::new(Code::SpecInvalid, name).found(format!("{weight}, which can not be linked")));
            }
        };
        self.seen_as(value, view)
    }

    /// Parts of one shape, joined along an axis.
    fn join(
        &mut self,
        stored: &Stored,
        name: &str,
        (axis, parts): (usize, &[Weight]),
        piece: &[usize],
    ) -> Result<ValueId> {
        let pieces = parts.iter().enumerate();
        let pieces = pieces.map(|(i, part)| self.link(stored, &format!("{name}.{i}"), part, piece));
        let pieces: Vec<ValueId> = pieces.collect::<Result<_>>()?;
        self.e.add(Operator::new("Concat").size("axis", axis), &pieces)
    }

    /// `[.., g · block, ..]` -> `[outer · g, block, row]` -> `[outer · g, length, row]`
    fn link_piece(&mut self, stored: &Stored, name: &str, split: &Split, inner: &Weight) -> Result<ValueId> {
        let invalid = |reason: String| Error::new(Code::TensorShape, name).found(reason);
        let shape = stored.shape(inner)?;
        let (start, length, block) = split.block().map_err(invalid)?;
        let outer = shape.iter().take(split.axis).product::<usize>() * split.groups.max(1);
        let row = shape.iter().skip(split.axis + 1).product();
        // The tensor is one initializer, whatever number of pieces is taken from it.
        let whole = format!("{name}.whole");
        let whole = self.link(stored, &whole, inner, &[outer, block, row])?;
        let bound = |at: usize| i64::try_from(at).map_err(|e| invalid(e.to_string()));
        let (starts, ends) = (self.e.ints(&[bound(start)?]), self.e.ints(&[bound(start + length)?]));
        let axes = self.e.ints(&[1]);
        self.e.add(Operator::new("Slice"), &[whole, starts, ends, axes])
    }

    fn seen_as(&mut self, value: ValueId, view: &[usize]) -> Result<ValueId> {
        let shape = view.iter().copied().map(Dim::from).collect();
        self.e.reshape(value, &shape)
    }
}
