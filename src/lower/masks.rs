//! Masks and lengths, which all layers share.
//!
//! Order goes by place in the cache, distance by token: query `i` sees key `j` when `j <= i`, when `attention_mask` keeps
//! `j`, and when `j` is one of the last `window` tokens up to `i`. transformers measures distance by place, which is the
//! same as long as padding lies before or behind a row's tokens; where it lies among them (onnxruntime-genai pads on the
//! right and goes on behind the padding), only tokens give each row what it has alone. A query always sees itself, so that
//! no row of a softmax is empty; rows of padding are nobody's result.

use super::{Lowerer, Operator};
use crate::build::AttentionOp;
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::ValueId;
use crate::spec::Alibi;

/// What is added to a score that must not count: half the lowest number, so that no sum overflows.
pub(super) fn masked(element: ElementType) -> f64 {
    match element {
        ElementType::F16 => -65504.0 / 2.0,
        _ => f64::from(f32::MIN) / 2.0,
    }
}

/// `2^(-max · h / n)` for the largest power of two `n` that is not above the heads, then every other one of twice as
/// many for the rest (Press et al. 2021).
fn slopes(heads: usize, max: f64, rounded: bool) -> Vec<f32> {
    let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let slope = |h: usize, n: usize| (-max * super::rope::float(h) / super::rope::float(n)).exp2();
    let first = (1..=whole).map(|h| slope(h, whole));
    let rest = (0..heads - whole).map(|h| slope(2 * h + 1, 2 * whole));
    #[expect(clippy::cast_possible_truncation, reason = "slopes are float32")]
    let single = |slope: f64| if rounded { half::bf16::from_f64(slope).to_f32() } else { slope as f32 };
    first.chain(rest).map(single).collect()
}

impl Lowerer<'_> {
    /// Shape of a graph input, as a tensor.
    pub(super) fn shape_of(&mut self, input: &str) -> Result<ValueId> {
        self.share(&format!("lengths/shape_of_{input}"), |s| {
            let input = s.input(input)?;
            s.e.add(Operator::new("Shape"), &[input])
        })
    }

    /// Length of the second axis of a graph input, as a scalar.
    fn length(&mut self, input: &str) -> Result<ValueId> {
        let shape = self.shape_of(input)?;
        self.share(&format!("lengths/{input}"), |s| {
            let axis = s.e.int(1);
            s.e.add(Operator::new("Gather").int("axis", 0), &[shape, axis])
        })
    }

    /// Tokens in the cache and new ones together, `T`.
    pub(super) fn total_length(&mut self) -> Result<ValueId> {
        self.length("attention_mask")
    }

    /// New tokens, `S`.
    pub(super) fn new_length(&mut self) -> Result<ValueId> {
        self.length("input_ids")
    }

    /// Tokens in the cache, `P = T - S`.
    pub(super) fn past_length(&mut self) -> Result<ValueId> {
        let (total, new) = (self.total_length()?, self.new_length()?);
        self.share("lengths/past", |s| s.e.add(Operator::new("Sub"), &[total, new]))
    }

    /// Where the new tokens begin and end among all, `P` and `T`.
    pub(super) fn new_tokens(&mut self) -> Result<[ValueId; 2]> {
        Ok([self.past_length()?, self.total_length()?])
    }

    /// What all tokens have, of the new ones alone: the last columns, `[B, T]` -> `[B, S]`
    pub(super) fn of_new_tokens(&mut self, x: ValueId, [past, total]: [ValueId; 2]) -> Result<ValueId> {
        let axis = self.e.ints(&[0]);
        let start = self.e.add(Operator::new("Unsqueeze"), &[past, axis])?;
        let end = self.e.add(Operator::new("Unsqueeze"), &[total, axis])?;
        let columns = self.e.ints(&[1]);
        self.e.add(Operator::new("Slice"), &[x, start, end, columns])
    }

    /// `0 .. T`, `[T]`
    pub(super) fn key_index(&mut self) -> Result<ValueId> {
        let total = self.total_length()?;
        self.share("mask/key_index", |s| {
            let (zero, one) = (s.e.int(0), s.e.int(1));
            s.e.add(Operator::new("Range"), &[zero, total, one])
        })
    }

    /// `P .. T`, `[S, 1]`
    fn query_index(&mut self) -> Result<ValueId> {
        let (past, total) = (self.past_length()?, self.total_length()?);
        self.share("mask/query_index", |s| {
            let one = s.e.int(1);
            let range = s.e.add(Operator::new("Range"), &[past, total, one])?;
            let axis = s.e.ints(&[1]);
            s.e.add(Operator::new("Unsqueeze"), &[range, axis])
        })
    }

    /// How many tokens stand before each place of a row, `[B, T]`: for a token its number, from 0 on.
    fn token_number(&mut self) -> Result<ValueId> {
        self.share("mask/token_number", |s| {
            let (mask, axis) = (s.input("attention_mask")?, s.e.int(1));
            s.e.add(Operator::new("CumSum").int("exclusive", 1), &[mask, axis])
        })
    }

    /// The numbers of keys `[B, 1, 1, T]` and of queries `[B, 1, S, 1]`.
    fn key_and_query_number(&mut self) -> Result<[ValueId; 2]> {
        let (number, bounds) = (self.token_number()?, self.new_tokens()?);
        let key = self.share("mask/key_number", |s| {
            let axes = s.e.ints(&[1, 2]);
            s.e.add(Operator::new("Unsqueeze"), &[number, axes])
        })?;
        let query = self.share("mask/query_number", |s| {
            let number = s.of_new_tokens(number, bounds)?;
            let axes = s.e.ints(&[1, 3]);
            s.e.add(Operator::new("Unsqueeze"), &[number, axes])
        })?;
        Ok([key, query])
    }

    /// True if the last `window` places of every new token hold as many tokens as they can: no padding lies among
    /// tokens there. One boolean for all rows.
    pub(super) fn windows_are_whole(&mut self, window: usize) -> Result<ValueId> {
        let (number, bounds) = (self.token_number()?, self.new_tokens()?);
        self.share(&format!("mask/whole_{window}"), |s| {
            let [past, total] = bounds;
            let before = i64::try_from(window).unwrap_or(i64::MAX) - 1;
            let (zero, one, before) = (s.e.int(0), s.e.int(1), s.e.int(before));
            let places = s.e.add(Operator::new("Range"), &[past, total, one])?;
            let starts = s.e.add(Operator::new("Sub"), &[places, before])?;
            let starts = s.e.add(Operator::new("Max"), &[starts, zero])?;
            // Tokens before each new one `[B, S]`: those that its window has, and those that it can have.
            let new = s.of_new_tokens(number, bounds)?;
            let outside = s.e.add(Operator::new("Gather").int("axis", 1), &[number, starts])?;
            let inside = s.e.add(Operator::new("Sub"), &[new, outside])?;
            let most = s.e.add(Operator::new("Min"), &[new, before])?;
            let gap = s.e.add(Operator::new("Sub"), &[most, inside])?;
            // Padding among the new places sees what it may.
            let mask = s.input("attention_mask")?;
            let kept = s.of_new_tokens(mask, bounds)?;
            let gap = s.e.add(Operator::new("Mul"), &[gap, kept])?;
            let widest = s.reduce("ReduceMax", gap, &[0, 1], false)?;
            s.e.add(Operator::new("Equal"), &[widest, zero])
        })
    }

    /// Which keys are tokens, `[B, 1, 1, T]`
    fn kept(&mut self) -> Result<ValueId> {
        self.share("mask/kept", |s| {
            let mask = s.input("attention_mask")?;
            let kept = s.e.cast(mask, ElementType::Bool)?;
            let axes = s.e.ints(&[1, 2]);
            s.e.add(Operator::new("Unsqueeze"), &[kept, axes])
        })
    }

    /// What is added to the scores: 0 where the query sees the key, `[B, 1, S, T]`
    pub(super) fn score_mask(&mut self, op: &AttentionOp, element: ElementType) -> Result<ValueId> {
        let (key, query, kept) = (self.key_index()?, self.query_index()?, self.kept()?);
        let block = op.chunk.map(|chunk| self.same_block(chunk)).transpose()?;
        self.share(&format!("mask/{element}/{:?}/{:?}", op.window, op.chunk), |s| {
            let mut visible = s.e.add(Operator::new("LessOrEqual"), &[key, query])?;
            if let Some(window) = op.window {
                let [key, query] = s.key_and_query_number()?;
                let window = s.e.int(i64::try_from(window).unwrap_or(i64::MAX));
                let before = s.e.add(Operator::new("Sub"), &[query, window])?;
                let near = s.e.add(Operator::new("Greater"), &[key, before])?;
                visible = s.e.add(Operator::new("And"), &[visible, near])?;
            }
            if let Some(block) = block {
                visible = s.e.add(Operator::new("And"), &[visible, block])?;
            }
            let itself = s.e.add(Operator::new("Equal"), &[key, query])?;
            let kept = s.e.add(Operator::new("Or"), &[kept, itself])?;
            let visible = s.e.add(Operator::new("And"), &[visible, kept])?;
            s.zero_where(visible, element)
        })
    }

    /// Which keys lie in the query's block of so many tokens, `[B, 1, S, T]`
    fn same_block(&mut self, chunk: usize) -> Result<ValueId> {
        let [key, query] = self.key_and_query_number()?;
        self.share(&format!("mask/block_{chunk}"), |s| {
            let size = s.e.int(i64::try_from(chunk).unwrap_or(i64::MAX));
            let key = s.e.add(Operator::new("Div"), &[key, size])?;
            let query = s.e.add(Operator::new("Div"), &[query, size])?;
            s.e.add(Operator::new("Equal"), &[key, query])
        })
    }

    /// Biases that fall with distance, `[B, N, 1, T]`: softmax does not see what is the same for all keys, so a
    /// key's place is enough. Places are counted over kept tokens, as transformers does.
    pub(super) fn alibi_bias(&mut self, alibi: Alibi, heads: usize, element: ElementType) -> Result<ValueId> {
        self.share(&format!("mask/alibi_{heads}_{element}_{alibi:?}"), |s| {
            let mask = s.input("attention_mask")?;
            let (axis, one) = (s.e.int(1), s.e.int(1));
            let place = s.e.add(Operator::new("CumSum"), &[mask, axis])?;
            let place = s.e.add(Operator::new("Sub"), &[place, one])?;
            let place = s.e.add(Operator::new("Mul"), &[place, mask])?;
            let axes = s.e.ints(&[1, 2]);
            // [B, T] -> [B, 1, 1, T]
            let place = s.e.add(Operator::new("Unsqueeze"), &[place, axes])?;
            let place = s.e.cast(place, ElementType::F32)?;
            let place = if alibi.rounded { s.rounded(place)? } else { place };
            let slopes = slopes(heads, alibi.max, alibi.rounded);
            let slopes = s.e.floats(&slopes);
            let axes = s.e.ints(&[1, 2]);
            // [N] -> [N, 1, 1]
            let slopes = s.e.add(Operator::new("Unsqueeze"), &[slopes, axes])?;
            let mut bias = s.e.add(Operator::new("Mul"), &[place, slopes])?;
            if alibi.rounded {
                bias = s.rounded(bias)?;
            }
            let scale = s.e.scalar(ElementType::F32, alibi.scale);
            let bias = s.e.add(Operator::new("Mul"), &[bias, scale])?;
            s.e.cast(bias, element)
        })
    }

    /// Rounded to bfloat16 and back.
    fn rounded(&mut self, x: ValueId) -> Result<ValueId> {
        let x = self.e.cast(x, ElementType::BF16)?;
        self.e.cast(x, ElementType::F32)
    }

    /// The padding alone as something added to the scores, `[B, 1, S, T]`
    pub(super) fn padding_bias(&mut self, element: ElementType) -> Result<ValueId> {
        let kept = self.kept()?;
        let new = self.new_length()?;
        self.share(&format!("mask/padding_{element}"), |s| {
            let bias = s.zero_where(kept, element)?;
            let (one, axis) = (s.e.ints(&[1]), s.e.ints(&[0]));
            let new = s.e.add(Operator::new("Unsqueeze"), &[new, axis])?;
            let shape = s.e.add(Operator::new("Concat").int("axis", 0), &[one, one, new, one])?;
            // [B, 1, 1, T] -> [B, 1, S, T]
            s.e.add(Operator::new("Expand"), &[bias, shape])
        })
    }

    /// The padding alone where an operator's own window will do, else the whole mask; only what is chosen is computed.
    pub(super) fn padding_or_window_bias(
        &mut self,
        op: &AttentionOp,
        window: usize,
        element: ElementType,
    ) -> Result<ValueId> {
        let whole = self.windows_are_whole(window)?;
        self.share(&format!("mask/padding_or_window_{window}_{element}"), |s| {
            let padding = s.branch("then_branch", "padding", |s| Ok(vec![s.padding_bias(element)?]))?;
            let window = s.branch("else_branch", "window", |s| Ok(vec![s.score_mask(op, element)?]))?;
            let chosen = s.e.choose(whole, [padding, window])?;
            let lost = || Error::new(Code::SpecInvalid, "mask").found("a choice without a result");
            chosen.first().copied().ok_or_else(lost)
        })
    }

    fn zero_where(&mut self, condition: ValueId, element: ElementType) -> Result<ValueId> {
        let (zero, masked) = (self.e.scalar(element, 0.0), self.e.scalar(element, masked(element)));
        self.e.add(Operator::new("Where"), &[condition, zero, masked])
    }

    /// Place of each row's last kept token, `[B]`
    pub(super) fn last_kept(&mut self) -> Result<ValueId> {
        let index = self.key_index()?;
        self.share("mask/last_kept", |s| {
            let mask = s.input("attention_mask")?;
            let places = s.e.add(Operator::new("Mul"), &[mask, index])?;
            s.reduce("ReduceMax", places, &[1], false)
        })
    }

    /// The hidden state of each row's last kept token among the new ones: `[B, S, H]` -> `[B, 1, H]`
    pub(super) fn last_token(&mut self, x: ValueId, _mask: ValueId) -> Result<ValueId> {
        let place = if self.order_kept.is_none() {
            self.last_new()?
        } else {
            let (last, past) = (self.last_kept()?, self.past_length()?);
            let place = self.e.add(Operator::new("Sub"), &[last, past])?;
            let zero = self.e.int(0);
            // A row without a new token (it ended before) has no logits worth reading; its first place is as good as any.
            self.e.add(Operator::new("Max"), &[place, zero])?
        };
        let axes = self.e.ints(&[1, 2]);
        // [B] -> [B, 1, 1]
        let place = self.e.add(Operator::new("Unsqueeze"), &[place, axes])?;
        self.e.add(Operator::new("GatherND").int("batch_dims", 1), &[x, place])
    }
}
