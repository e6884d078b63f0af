//! Rotary position embedding: the table of cosines and sines, and the rotation.
//!
//! The table is computed from `position_ids` in the graph, once for all layers, in float32 as transformers
//! does: no table of the longest context is stored, and no position lies beyond it.

use super::rope::{Frequencies, float, frequencies};
use super::{Form, Lowerer, Operator};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, ValueId};
use crate::spec::{Rope, RopeLayout};

impl Lowerer<'_> {
    /// Cosine and sine of every position, `[B, S, size / 2]` each. `ids` are those that say how long sequences are.
    pub(super) fn rope_table(&mut self, rope: &Rope, positions: ValueId, ids: ValueId) -> Result<Vec<ValueId>> {
        let frequencies = self.frequencies(rope, ids)?;
        let axis = self.e.ints(&[-1]);
        let positions = self.e.cast(positions, ElementType::F32)?;
        // [B, S] -> [B, S, 1]
        let positions = self.e.add(Operator::new("Unsqueeze"), &[positions, axis])?;
        let angles = self.e.add(Operator::new("Mul"), &[positions, frequencies])?;
        let factor = self.attention_factor(rope, ids)?;
        let mut table = Vec::new();
        for function in ["Cos", "Sin"] {
            let mut value = self.e.add(Operator::new(function), &[angles])?;
            if let Some(factor) = factor {
                value = self.e.add(Operator::new("Mul"), &[value, factor])?;
            }
            if rope.reversed && function == "Sin" {
                value = self.e.add(Operator::new("Neg"), &[value])?;
            }
            table.push(self.e.cast(value, self.compute())?);
        }
        Ok(table)
    }

    /// Multiplier of cosine and sine, if it is not one.
    fn attention_factor(&mut self, rope: &Rope, ids: ValueId) -> Result<Option<ValueId>> {
        #[expect(clippy::float_cmp, reason = "exactly one means that there is nothing to multiply")]
        if rope.attention_factor == 1.0 && rope.beyond.is_none() {
            return Ok(None);
        }
        let within = self.e.scalar(ElementType::F32, rope.attention_factor);
        let Some(beyond) = rope.beyond else { return Ok(Some(within)) };
        let length = self.length_of(ids)?;
        let limit = self.e.scalar(ElementType::F32, float(beyond.length));
        let longer = self.e.add(Operator::new("Greater"), &[length, limit])?;
        let factor = self.e.scalar(ElementType::F32, beyond.attention_factor);
        self.e.add(Operator::new("Where"), &[longer, factor, within]).map(Some)
    }

    /// Angles per position, `[size / 2]`. Those that depend on the length take it from the largest position.
    fn frequencies(&mut self, rope: &Rope, positions: ValueId) -> Result<ValueId> {
        let frequencies = frequencies(rope);
        if !frequencies.are_finite() {
            return Err(Error::new(Code::SpecInvalid, "rope")
                .found(format!("frequencies that are no numbers, of {:?} with base {}", rope.scaling, rope.theta))
                .expected("parameters that a rotation can be computed from")
                .help("check the RoPE parameters in config.json"));
        }
        match frequencies {
            Frequencies::Fixed(values) => Ok(self.e.floats(&values)),
            Frequencies::Switched { limit, short, long } => {
                let length = self.length_of(positions)?;
                let limit = self.e.scalar(ElementType::F32, float(limit));
                let beyond = self.e.add(Operator::new("Greater"), &[length, limit])?;
                let (short, long) = (self.e.floats(&short), self.e.floats(&long));
                self.e.add(Operator::new("Where"), &[beyond, long, short])
            }
            Frequencies::Growing { limit, factor, theta, exponents, power } => {
                // theta * (factor * length / limit - (factor - 1))^power, and the length at least the limit
                let length = self.length_of(positions)?;
                let scalar = |s: &mut Self, value| s.e.scalar(ElementType::F32, value);
                let (limit_value, factor_value) = (scalar(self, float(limit)), scalar(self, factor));
                let (less, theta, power) = (scalar(self, factor - 1.0), scalar(self, theta), scalar(self, power));
                let length = self.e.add(Operator::new("Max"), &[length, limit_value])?;
                let scaled = self.e.add(Operator::new("Mul"), &[length, factor_value])?;
                let ratio = self.e.add(Operator::new("Div"), &[scaled, limit_value])?;
                let growth = self.e.add(Operator::new("Sub"), &[ratio, less])?;
                let growth = self.e.add(Operator::new("Pow"), &[growth, power])?;
                let base = self.e.add(Operator::new("Mul"), &[growth, theta])?;
                let exponents = self.e.floats(&exponents);
                let divisors = self.e.add(Operator::new("Pow"), &[base, exponents])?;
                self.e.add(Operator::new("Reciprocal"), &[divisors])
            }
        }
    }

    /// The largest position plus one, as a float32 scalar.
    fn length_of(&mut self, positions: ValueId) -> Result<ValueId> {
        let largest = self.reduce("ReduceMax", positions, &[0, 1], false)?;
        let one = self.e.int(1);
        let length = self.e.add(Operator::new("Add"), &[largest, one])?;
        self.e.cast(length, ElementType::F32)
    }

    /// Rotates the first `size` elements of each head of `x` `[B, S, heads * D]`.
    pub(super) fn rotate(
        &mut self,
        (heads, size, layout): (usize, usize, RopeLayout),
        x: ValueId,
        (cos, sin): (ValueId, ValueId),
        why_outside: &str,
    ) -> Result<ValueId> {
        let width = self.e.shape(x).last().and_then(|d| d.divided_by(&Dim::from(heads))).and_then(|d| d.value());
        let partial = width.and_then(|w| usize::try_from(w).ok()).is_some_and(|width| width != size);
        let interleaved = i64::from(layout == RopeLayout::Interleaved);
        self.first_form("rotary", |s, form| match form {
            super::inside::FORM => Ok(Form::Refused(why_outside.to_owned())),
            "com.microsoft.RotaryEmbedding" => {
                let mut call = Operator::microsoft("RotaryEmbedding").int("interleaved", interleaved);
                call = call.size("num_heads", heads);
                if partial {
                    call = call.size("rotary_embedding_dim", size);
                }
                let (cos, sin, rows) = (s.table_rows(cos)?, s.table_rows(sin)?, s.token_rows()?);
                s.e.add(call, &[x, rows, cos, sin]).map(Form::Done)
            }
            "RotaryEmbedding" => {
                let call = Operator::new("RotaryEmbedding")
                    .int("interleaved", interleaved)
                    .size("num_heads", heads)
                    .size("rotary_embedding_dim", if partial { size } else { 0 });
                s.e.add(call, &[x, cos, sin]).map(Form::Done)
            }
            _ => s.rotate_spelled_out((heads, size, layout), x, cos, sin).map(Form::Done),
        })
    }

    /// The table with one row per token: `[B, S, size / 2]` -> `[B * S, size / 2]`
    pub(super) fn table_rows(&mut self, table: ValueId) -> Result<ValueId> {
        let name = self.e.graph.value(table).name.clone();
        self.share(&format!("rotary_emb/rows/{name}"), |s| {
            let shape = s.e.shape(table).clone();
            let (rows, width) = match shape.as_slice() {
                [batch, sequence, width] => (batch * sequence, width.clone()),
                _ => (Dim::from(1), Dim::from(1)),
            };
            s.e.reshape(table, &vec![rows, width])
        })
    }

    /// Each token's row in such a table: `0 .. B * S` as `[B, S]`
    fn token_rows(&mut self) -> Result<ValueId> {
        let shape = self.shape_of("input_ids")?;
        self.share("rotary_emb/token_rows", |s| {
            let (first, second, zero, one) = (s.e.int(0), s.e.int(1), s.e.int(0), s.e.int(1));
            let batch = s.e.add(Operator::new("Gather").int("axis", 0), &[shape, first])?;
            let sequence = s.e.add(Operator::new("Gather").int("axis", 0), &[shape, second])?;
            let tokens = s.e.add(Operator::new("Mul"), &[batch, sequence])?;
            let rows = s.e.add(Operator::new("Range"), &[zero, tokens, one])?;
            s.e.add(Operator::new("Reshape"), &[rows, shape])
        })
    }

    /// `(a cos - b sin, b cos + a sin)` for every pair `(a, b)`.
    fn rotate_spelled_out(
        &mut self,
        (heads, size, layout): (usize, usize, RopeLayout),
        x: ValueId,
        cos: ValueId,
        sin: ValueId,
    ) -> Result<ValueId> {
        let flat = self.e.shape(x).clone();
        let head = flat.last().and_then(|d| d.divided_by(&Dim::from(heads))).unwrap_or_else(|| Dim::from(size));
        let mut shape = flat.clone();
        shape.pop();
        shape.extend([Dim::from(heads), head.clone()]);
        // [B, S, heads * D] -> [B, S, heads, D]
        let x = self.e.reshape(x, &shape)?;
        let rest = head.value().and_then(|d| usize::try_from(d).ok()).map_or(0, |d| d.saturating_sub(size));
        let (turned, kept) = match rest {
            0 => (x, None),
            rest => match self.split(x, &[size, rest])?.as_slice() {
                [turned, kept] => (*turned, Some(*kept)),
                _ => (x, None),
            },
        };
        let mut result = match layout {
            RopeLayout::Half => self.rotate_pairs(turned, size / 2, &[2], cos, sin)?,
            RopeLayout::Interleaved => {
                let mut pairs = shape.clone();
                pairs.pop();
                pairs.extend([Dim::from(size / 2), Dim::from(2)]);
                // [B, S, heads, size] -> [B, S, heads, size / 2, 2]
                let turned_pairs = self.e.reshape(turned, &pairs)?;
                let rotated = self.rotate_pairs(turned_pairs, 1, &[2, -1], cos, sin)?;
                let whole = self.e.shape(turned).clone();
                self.e.reshape(rotated, &whole)?
            }
        };
        if let Some(kept) = kept {
            result = self.e.add(Operator::new("Concat").int("axis", -1), &[result, kept])?;
        }
        // [B, S, heads, D] -> [B, S, heads * D]
        self.e.reshape(result, &flat)
    }

    /// Rotates `x`, whose last axis holds the first halves of the pairs and then the second ones.
    fn rotate_pairs(&mut self, x: ValueId, half: usize, axes: &[i64], cos: ValueId, sin: ValueId) -> Result<ValueId> {
        let (a, b) = match self.split(x, &[half, half])?.as_slice() {
            [a, b] => (*a, *b),
            _ => (x, x),
        };
        let cos = self.unsqueezed(cos, axes)?;
        let sin = self.unsqueezed(sin, axes)?;
        let e = &mut self.e;
        let (a_cos, b_sin) = (e.add(Operator::new("Mul"), &[a, cos])?, e.add(Operator::new("Mul"), &[b, sin])?);
        let (b_cos, a_sin) = (e.add(Operator::new("Mul"), &[b, cos])?, e.add(Operator::new("Mul"), &[a, sin])?);
        let first = e.add(Operator::new("Sub"), &[a_cos, b_sin])?;
        let second = e.add(Operator::new("Add"), &[b_cos, a_sin])?;
        e.add(Operator::new("Concat").int("axis", -1), &[first, second])
    }

    fn unsqueezed(&mut self, table: ValueId, axes: &[i64]) -> Result<ValueId> {
        let name = self.e.graph.value(table).name.clone();
        self.share(&format!("rotary_emb/{axes:?}/{name}"), |s| {
            let axes = s.e.ints(axes);
            s.e.add(Operator::new("Unsqueeze"), &[table, axes])
        })
    }
}
