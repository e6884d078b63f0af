//! The choice of keys by an indexer, spelled out: no target has an operator for it.

use super::masks::masked;
use super::{Lowerer, Operator};
use crate::build::{AttentionOp, IndexOp};
use crate::element::ElementType;
use crate::error::Result;
use crate::graph::ValueId;

impl Lowerer<'_> {
    /// What is added to the scores `[B, 1, S, T]`, and the present keys `[B, T, D]`.
    ///
    /// ```text
    /// q [B, S, H*D] ─ [B, H, S, D] ─┐
    /// past, k ─ [B, T, D] ─ [B, 1, D, T] ─┴ relu [B, H, S, T] · weights [B, H, S, 1] ─ sum ─ + causal ─ top k
    /// ```
    pub(super) fn index(&mut self, op: IndexOp, operands: [ValueId; 4]) -> Result<Vec<ValueId>> {
        let [query, key, past, weights] = operands;
        let present = self.e.add(Operator::new("Concat").int("axis", 1), &[past, key])?;
        let [query, key, weights] = [query, present, weights].map(|x| self.e.cast(x, ElementType::F32));
        let (query, key, weights) = (query?, key?, weights?);
        let query = self.heads_first(query, op.heads, op.size)?;
        let axis = self.e.ints(&[1]);
        let key = self.e.add(Operator::new("Transpose").ints("perm", &[0, 2, 1]), &[key])?;
        let key = self.e.add(Operator::new("Unsqueeze"), &[key, axis])?;
        let scores = self.e.add(Operator::new("MatMul"), &[query, key])?;
        let scores = self.scaled(scores, super::rope::float(op.size).powf(-0.5))?;
        let scores = self.e.add(Operator::new("Relu"), &[scores])?;
        // [B, S, H] -> [B, H, S] -> [B, H, S, 1]
        let weights = self.e.add(Operator::new("Transpose").ints("perm", &[0, 2, 1]), &[weights])?;
        let last = self.e.ints(&[-1]);
        let weights = self.e.add(Operator::new("Unsqueeze"), &[weights, last])?;
        let weights = self.scaled(weights, super::rope::float(op.heads).powf(-0.5))?;
        let scores = self.e.add(Operator::new("Mul"), &[scores, weights])?;
        let scores = self.reduce("ReduceSum", scores, &[1], true)?;
        let mask = self.score_mask(&causal(op), ElementType::F32)?;
        let scores = self.e.add(Operator::new("Add"), &[scores, mask])?;
        Ok(vec![self.best(op, scores)?, present])
    }

    fn scaled(&mut self, x: ValueId, factor: f64) -> Result<ValueId> {
        let factor = self.e.scalar(ElementType::F32, factor);
        self.e.add(Operator::new("Mul"), &[x, factor])
    }

    /// 0 for the best keys of each query `[B, 1, S, T]`. There may be fewer keys than are to stay, so as many as
    /// that are put behind them, worse than any, and taken off again.
    fn best(&mut self, op: IndexOp, scores: ValueId) -> Result<ValueId> {
        let count = i64::try_from(op.top_k).unwrap_or(i64::MAX);
        let ids = self.input("input_ids")?;
        let beyond = self.share(&format!("mask/beyond_{count}"), |s| {
            let leading = s.e.add(Operator::new("Shape"), &[ids])?;
            let (count, axis) = (s.e.ints(&[count]), s.e.ints(&[1]));
            let sizes = s.e.add(Operator::new("Concat").int("axis", 0), &[leading, count])?;
            let lowest = s.e.scalar(ElementType::F32, f64::from(f32::MIN));
            let beyond = s.e.add(Operator::new("Expand"), &[lowest, sizes])?;
            // [B, S, k] -> [B, 1, S, k]
            s.e.add(Operator::new("Unsqueeze"), &[beyond, axis])
        })?;
        let padded = self.e.add(Operator::new("Concat").int("axis", -1), &[scores, beyond])?;
        let [best, places] = self.top_k(padded, op.top_k)?;
        let (none, ones) = (self.filled_like(padded, 0.0)?, self.filled_like(best, 1.0)?);
        let chosen = self.e.add(Operator::new("ScatterElements").int("axis", -1), &[none, places, ones])?;
        let [start, end, axis] = [0, -count, -1].map(|value| self.e.ints(&[value]));
        let chosen = self.e.add(Operator::new("Slice"), &[chosen, start, end, axis])?;
        let chosen = self.e.cast(chosen, ElementType::Bool)?;
        let element = self.compute();
        let (zero, masked) = (self.e.scalar(element, 0.0), self.e.scalar(element, masked(element)));
        self.e.add(Operator::new("Where"), &[chosen, zero, masked])
    }
}

/// The attention whose mask an indexer's scores take: causal and nothing else.
fn causal(op: IndexOp) -> AttentionOp {
    AttentionOp {
        heads: op.heads,
        kv_heads: 1,
        key_size: op.size,
        value_size: op.size,
        scale: 1.0,
        window: None,
        chunk: None,
        softcap: None,
        sinks: false,
        alibi: None,
        shared: false,
        bias: false,
    }
}
