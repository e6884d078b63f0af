//! Functions of positions other than the rotary table.

use super::rope::float;
use super::{Lowerer, Operator};
use crate::element::ElementType;
use crate::error::Result;
use crate::graph::ValueId;
use crate::spec::PositionScale;

impl Lowerer<'_> {
    /// Positions plus a constant.
    pub(super) fn shift(&mut self, offset: usize, positions: ValueId) -> Result<ValueId> {
        let offset = self.e.int(i64::try_from(offset).unwrap_or(i64::MAX));
        self.e.add(Operator::new("Add"), &[positions, offset])
    }

    /// The positions of new tokens, counted over the kept ones of each row, `[B, S]`; those of padding are of no account.
    pub(super) fn counted_positions(&mut self) -> Result<ValueId> {
        let bounds = self.new_tokens()?;
        let counted = self.share("positions/counted", |s| {
            let (mask, axis) = (s.input("attention_mask")?, s.e.int(1));
            let (one, zero) = (s.e.int(1), s.e.int(0));
            let place = s.e.add(Operator::new("CumSum"), &[mask, axis])?;
            let place = s.e.add(Operator::new("Sub"), &[place, one])?;
            let place = s.e.add(Operator::new("Max"), &[place, zero])?;
            s.of_new_tokens(place, bounds)
        })?;
        if self.order_kept.is_some() {
            return Ok(counted);
        }
        self.share("positions/rotated", |s| s.rotated(counted))
    }

    /// `[B, S]` -> `[B, S, 1]` in float32
    fn column(&mut self, positions: ValueId) -> Result<ValueId> {
        let axis = self.e.ints(&[-1]);
        let positions = self.e.cast(positions, ElementType::F32)?;
        self.e.add(Operator::new("Unsqueeze"), &[positions, axis])
    }

    /// `sin(p · f_i), ..., cos(p · f_i), ...` with `f_i = 10000^(-i / (half - 1))`, as fairseq orders them.
    pub(super) fn sinusoid(&mut self, width: usize, positions: ValueId) -> Result<ValueId> {
        let half = width / 2;
        let step = 10000.0_f64.ln() / float(half.saturating_sub(1).max(1));
        #[expect(clippy::cast_possible_truncation, reason = "the table is float32")]
        let frequencies: Vec<f32> = (0..half).map(|i| (-float(i) * step).exp() as f32).collect();
        let frequencies = self.e.floats(&frequencies);
        let positions = self.column(positions)?;
        let angles = self.e.add(Operator::new("Mul"), &[positions, frequencies])?;
        let sin = self.e.add(Operator::new("Sin"), &[angles])?;
        let cos = self.e.add(Operator::new("Cos"), &[angles])?;
        let table = self.e.add(Operator::new("Concat").int("axis", -1), &[sin, cos])?;
        self.e.cast(table, self.compute())
    }

    /// Positions plus the padding of each row: `p + sum(1 - mask)`. The length of the mask would be a number of the host.
    fn padded(&mut self, positions: ValueId, mask: ValueId) -> Result<ValueId> {
        let one = self.e.int(1);
        let padding = self.e.add(Operator::new("Sub"), &[one, mask])?;
        // [B, T] -> [B, 1]
        let padding = self.reduce("ReduceSum", padding, &[-1], true)?;
        self.e.add(Operator::new("Add"), &[positions, padding])
    }

    /// `1 + c · ln(1 + floor((p + offset) / period))`, `[B, S, 1]`
    pub(super) fn position_scale(
        &mut self,
        scale: &PositionScale,
        positions: ValueId,
        mask: ValueId,
    ) -> Result<ValueId> {
        self.share(&format!("position_scale/{scale:?}"), |s| {
            let positions = if scale.padded { s.padded(positions, mask)? } else { positions };
            let x = s.column(positions)?;
            let constant = |s: &mut Self, value| s.e.scalar(ElementType::F32, value);
            let (offset, period) = (constant(s, scale.offset), constant(s, scale.period));
            let (coefficient, one) = (constant(s, scale.coefficient), constant(s, 1.0));
            let x = s.e.add(Operator::new("Add"), &[x, offset])?;
            let x = s.e.add(Operator::new("Div"), &[x, period])?;
            let x = s.e.add(Operator::new("Floor"), &[x])?;
            let x = s.e.add(Operator::new("Add"), &[x, one])?;
            let x = s.e.add(Operator::new("Log"), &[x])?;
            let x = s.e.add(Operator::new("Mul"), &[x, coefficient])?;
            let x = s.e.add(Operator::new("Add"), &[x, one])?;
            s.e.cast(x, s.compute())
        })
    }
}
