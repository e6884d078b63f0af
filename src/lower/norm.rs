//! Norms, alone and behind a residual addition.

use super::{Form, Lowerer, Operator};
use crate::build::{Model, NormOp};
use crate::element::ElementType;
use crate::error::Result;
use crate::graph::{Graph, ValueId};
use crate::weight::Weight;

impl Lowerer {
    pub(super) fn norm(&mut self, op: NormOp, model: &Graph<Model>, ids: &[ValueId]) -> Result<ValueId> {
        let x = self.operand(model, ids, 0)?;
        let weight = self.norm_weight(op, model, ids, 1)?;
        self.norm_of(op, x, weight)
    }

    /// `residual + x`, and its norm.
    pub(super) fn add_norm(&mut self, op: NormOp, model: &Graph<Model>, ids: &[ValueId]) -> Result<[ValueId; 2]> {
        let (residual, x) = (self.operand(model, ids, 0)?, self.operand(model, ids, 1)?);
        let weight = self.norm_weight(op, model, ids, 2)?;
        self.first_form("add_norm", |s, form| {
            if form == "SkipSimplifiedLayerNormalization" {
                let call = Operator::microsoft("SkipSimplifiedLayerNormalization").float("epsilon", op.eps);
                let operands = [Some(x), Some(residual), Some(weight)];
                let [normed, _, _, sum] = s.e.call(call, &operands, [true, false, false, true])?;
                Ok(Form::Done([sum, normed]))
            } else {
                let sum = s.e.add(Operator::new("Add"), &[residual, x])?;
                Ok(Form::Done([sum, s.norm_of(op, sum, weight)?]))
            }
        })
    }

    pub(super) fn operand(&mut self, model: &Graph<Model>, ids: &[ValueId], index: usize) -> Result<ValueId> {
        let id = ids.get(index).copied().ok_or_else(|| {
            crate::error::Error::new(crate::error::Code::SpecInvalid, "operand").found(format!("no operand {index}"))
        })?;
        self.value(model, id)
    }

    /// The weight as it multiplies: one is added to a stored difference once, not in every run.
    fn norm_weight(&mut self, op: NormOp, model: &Graph<Model>, ids: &[ValueId], index: usize) -> Result<ValueId> {
        let Some(id) = ids.get(index).filter(|_| op.offset) else {
            return self.operand(model, ids, index);
        };
        let value = model.value(*id);
        let weight = Weight::AddOne(Box::new(Weight::source(&value.name)));
        let ty = self.ty(&value.ty);
        Ok(self.e.weight(&format!("{}.plus_one", value.name), ty, weight))
    }

    fn norm_of(&mut self, op: NormOp, x: ValueId, weight: ValueId) -> Result<ValueId> {
        self.first_form("norm", |s, form| match form {
            // It lives in ONNX's domain although ONNX has no such operator.
            "SimplifiedLayerNormalization" => {
                let call = Operator::new("SimplifiedLayerNormalization").int("axis", -1).float("epsilon", op.eps);
                s.e.add(call.int("stash_type", 1), &[x, weight]).map(Form::Done)
            }
            "RMSNormalization" => {
                let call = Operator::new("RMSNormalization").int("axis", -1).float("epsilon", op.eps);
                s.e.add(call.int("stash_type", 1), &[x, weight]).map(Form::Done)
            }
            _ => s.rms_spelled_out(op, x, weight).map(Form::Done),
        })
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
