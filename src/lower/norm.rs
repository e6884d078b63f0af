//! Norms, alone and behind a residual addition.

use super::{Form, Lowerer, Operator};
use crate::build::{Model, NormOp};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Graph, Type, ValueId};
use crate::spec::NormKind;
use crate::weight::Weight;

/// Weight and bias of a norm; the weight is ones where the norm has none.
#[derive(Clone, Copy)]
struct Affine {
    weight: ValueId,
    bias: Option<ValueId>,
}

impl Lowerer<'_> {
    pub(super) fn norm(&mut self, op: NormOp, model: &Graph<Model>, ids: &[ValueId]) -> Result<ValueId> {
        let x = self.operand(model, ids, 0)?;
        let affine = self.affine(op, model, ids, 1, x)?;
        self.norm_of(op, x, affine)
    }

    /// `residual + x`, and its norm.
    pub(super) fn add_norm(&mut self, op: NormOp, model: &Graph<Model>, ids: &[ValueId]) -> Result<[ValueId; 2]> {
        let (residual, x) = (self.operand(model, ids, 0)?, self.operand(model, ids, 1)?);
        let affine = self.affine(op, model, ids, 2, x)?;
        let composite = match op.kind {
            NormKind::Rms => "add_norm",
            NormKind::Layer => "add_layer_norm",
        };
        self.first_form(composite, |s, form| match form {
            "SkipSimplifiedLayerNormalization" if s.e.ty(affine.weight).element != s.e.ty(x).element => {
                Ok(Form::Refused("the weight is multiplied in float32 here".to_owned()))
            }
            "SkipSimplifiedLayerNormalization" => {
                let call = Operator::microsoft("SkipSimplifiedLayerNormalization").float("epsilon", op.eps);
                let operands = [Some(x), Some(residual), Some(affine.weight)];
                let [normed, _, _, sum] = s.e.call(call, &operands, [true, false, false, true])?;
                Ok(Form::Done([sum, normed]))
            }
            "SkipLayerNormalization" => {
                let call = Operator::microsoft("SkipLayerNormalization").float("epsilon", op.eps);
                let operands = [Some(x), Some(residual), Some(affine.weight), affine.bias];
                let given = if affine.bias.is_some() { 4 } else { 3 };
                let operands = operands.get(..given).unwrap_or(&operands);
                let [normed, _, _, sum] = s.e.call(call, operands, [true, false, false, true])?;
                Ok(Form::Done([sum, normed]))
            }
            _ => {
                let sum = s.e.add(Operator::new("Add"), &[residual, x])?;
                Ok(Form::Done([sum, s.norm_of(op, sum, affine)?]))
            }
        })
    }

    pub(super) fn operand(&mut self, model: &Graph<Model>, ids: &[ValueId], index: usize) -> Result<ValueId> {
        let missing = || Error::new(Code::SpecInvalid, "operand").found(format!("no operand {index}"));
        self.value(model, ids.get(index).copied().ok_or_else(missing)?)
    }

    /// Weight and bias as they are used: one is added to a stored difference once, not in every run.
    fn affine(
        &mut self,
        op: NormOp,
        model: &Graph<Model>,
        ids: &[ValueId],
        first: usize,
        x: ValueId,
    ) -> Result<Affine> {
        let weight = match ids.get(first).filter(|_| op.weight) {
            Some(id) if op.offset => {
                let value = model.value(*id);
                let weight = Weight::AddOne(Box::new(Weight::source(&value.name)));
                // In half precision one takes most of the bits of the difference: transformers adds in float32.
                let ty = Type::new(ElementType::F32, value.ty.shape.iter().cloned());
                let ty = if op.kind == NormKind::Rms { ty } else { self.ty(&value.ty) };
                self.parameter(&format!("{}.plus_one", value.name), ty, value.ty.element, weight)?
            }
            Some(id) => self.value(model, *id)?,
            None => {
                let width = self.e.shape(x).last().and_then(Dim::value).and_then(|w| usize::try_from(w).ok());
                self.ones(self.e.ty(x).element, width.unwrap_or(1))
            }
        };
        let bias = if op.bias { Some(self.operand(model, ids, first + usize::from(op.weight))?) } else { None };
        Ok(Affine { weight, bias })
    }

    fn norm_of(&mut self, op: NormOp, x: ValueId, affine: Affine) -> Result<ValueId> {
        if op.kind == NormKind::Layer {
            let call = Operator::new("LayerNormalization").int("axis", -1).float("epsilon", op.eps);
            let operands = [Some(x), Some(affine.weight), affine.bias];
            let given = if affine.bias.is_some() { 3 } else { 2 };
            let [normed] = self.e.call(call, operands.get(..given).unwrap_or(&operands), [true])?;
            return Ok(normed);
        }
        let element = self.e.ty(x).element;
        let x = self.e.cast(x, self.e.ty(affine.weight).element)?;
        let mut normed = self.first_form("norm", |s, form| match form {
            // It lives in ONNX's domain although ONNX has no such operator.
            "SimplifiedLayerNormalization" => {
                let call = Operator::new("SimplifiedLayerNormalization").int("axis", -1).float("epsilon", op.eps);
                s.e.add(call.int("stash_type", 1), &[x, affine.weight]).map(Form::Done)
            }
            "RMSNormalization" => {
                let call = Operator::new("RMSNormalization").int("axis", -1).float("epsilon", op.eps);
                s.e.add(call.int("stash_type", 1), &[x, affine.weight]).map(Form::Done)
            }
            _ => s.rms_spelled_out(op, x, affine.weight).map(Form::Done),
        })?;
        normed = self.e.cast(normed, element)?;
        if let Some(bias) = affine.bias {
            normed = self.e.add(Operator::new("Add"), &[normed, bias])?;
        }
        Ok(normed)
    }

    /// `x / sqrt(mean(x²) + eps) · weight`, the quotient in float32.
    fn rms_spelled_out(&mut self, op: NormOp, x: ValueId, weight: ValueId) -> Result<ValueId> {
        let element = self.e.ty(x).element;
        let wide = self.e.cast(x, ElementType::F32)?;
        let square = self.e.add(Operator::new("Mul"), &[wide, wide])?;
        let mean = self.reduce("ReduceMean", square, &[-1], true)?;
        let eps = self.e.scalar(ElementType::F32, op.eps);
        let shifted = self.e.add(Operator::new("Add"), &[mean, eps])?;
        let root = self.e.add(Operator::new("Sqrt"), &[shifted])?;
        let normed = self.e.add(Operator::new("Div"), &[wide, root])?;
        let normed = self.e.cast(normed, element)?;
        if !op.weight {
            return Ok(normed);
        }
        self.e.add(Operator::new("Mul"), &[normed, weight])
    }

    /// A reduction; its axes are an attribute in older versions of the operators and an operand in newer ones.
    pub(super) fn reduce(&mut self, op_type: &'static str, x: ValueId, axes: &[i64], keep: bool) -> Result<ValueId> {
        let op = Operator::new(op_type).int("keepdims", keep.into());
        if self.options.target.has_attribute("", op_type, "axes") {
            return self.e.add(op.ints("axes", axes), &[x]);
        }
        let axes = self.e.ints(axes);
        self.e.add(op, &[x, axes])
    }
}
