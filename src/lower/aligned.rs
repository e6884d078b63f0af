//! Rows aligned to the left: attention without a bias that is exact for padding on either side.
//!
//! `GroupQueryAttention` keeps each row's cache without gaps and masks what lies behind its `seqlens_k`. That is padding
//! on the right. Padding on the left becomes padding on the right when the new tokens of each row are rotated, and
//! nothing but attention and the choice of the last token sees in which order tokens stand:
//!
//! ```text
//! mask       0 0 1 1 1            1 1 1 0 0
//! input_ids  - - a b c ─ rotated ─ a b c - - ─ layers ─ hidden states ─ rotated back ─ logits
//! cache                           a b c . .   and then   a b c d .
//! ```
//!
//! A piece that follows a first one must be without padding: the operator places its tokens by the length of the row.
//!
//! Nothing is read back from the device: lengths that the graph computes with become tensors there through `Range`, so
//! that a graph of kernels can be captured.

use super::{Lowerer, Operator, Padding};
use crate::build::{AttentionOp, Composite, Model};
use crate::element::ElementType;
use crate::error::Result;
use crate::graph::{Graph, ValueId};

/// The form of attention for which rows are aligned.
pub(super) const FORM: &str = "GroupQueryAttention.aligned";

impl Lowerer<'_> {
    /// Why the rows of this graph can not be aligned; nothing if they can: then every attention is of that form.
    pub(super) fn keeps_order(&self, model: &Graph<Model>) -> Result<Option<String>> {
        if !self.options.target.forms("attention")?.iter().any(|form| form == FORM) {
            return Ok(Some("the target has no such form".to_owned()));
        }
        let element = self.compute();
        let cached = self.cached();
        let inputs = [[element; 3].as_slice(), &[cached; 2], &[ElementType::I32; 2]].concat();
        let inputs: Vec<_> = inputs.into_iter().map(Some).collect();
        if !self.e.runs(&Operator::microsoft("GroupQueryAttention"), &inputs, &[Some(element), Some(cached)]) {
            let cache = if cached == element { String::new() } else { format!(" with a cache of {cached}") };
            return Ok(Some(format!("the provider has no kernel of the operator for {element}{cache}")));
        }
        let refusal = model.nodes.iter().find_map(|node| match &node.op {
            Composite::Attention(op) => refusal(op).map(|reason| format!("{}: {reason}", node.name)),
            _ => None,
        });
        Ok(refusal.map(|reason| format!("all layers must be of this form, and {reason}")))
    }

    /// Ids or positions `[B, S]` in the order of the cache: the tokens of each row first.
    pub(super) fn rotated(&mut self, x: ValueId) -> Result<ValueId> {
        if self.options.padding == Padding::Right {
            return Ok(x);
        }
        let (gap, row) = (self.tokens_from_the_first()?, self.token_index()?);
        let places = self.share("aligned/places", |s| {
            let places = s.e.add(Operator::new("Sub"), &[row, gap])?;
            s.within_the_sequence(places)
        })?;
        self.e.add(Operator::new("GatherElements").int("axis", 1), &[x, places])
    }

    /// Hidden states `[B, S, H]` in the order of the inputs.
    pub(super) fn rotated_back(&mut self, x: ValueId) -> Result<ValueId> {
        if self.options.padding == Padding::Right {
            return Ok(x);
        }
        let (gap, row) = (self.tokens_from_the_first()?, self.token_index()?);
        let places = self.share("aligned/back", |s| {
            let places = s.e.add(Operator::new("Add"), &[row, gap])?;
            let places = s.within_the_sequence(places)?;
            let axis = s.e.ints(&[2]);
            // [B, S] -> [B, S, 1]
            s.e.add(Operator::new("Unsqueeze"), &[places, axis])
        })?;
        self.e.add(Operator::new("GatherND").int("batch_dims", 1), &[x, places])
    }

    /// Tokens of each row less one, `[B]` in int32: where the last one lies.
    pub(super) fn seqlens(&mut self) -> Result<ValueId> {
        self.share("aligned/seqlens_k", |s| {
            let mask = s.input("attention_mask")?;
            let last = s.last_of(mask)?;
            s.e.cast(last, ElementType::I32)
        })
    }

    /// Where the last new token of each row lies among the new ones, `[B]`
    pub(super) fn last_new(&mut self) -> Result<ValueId> {
        let mask = self.new_mask()?;
        self.share("aligned/last_new", |s| s.last_of(mask))
    }

    /// The sum of each row less one, and not less than zero.
    fn last_of(&mut self, mask: ValueId) -> Result<ValueId> {
        let kept = self.reduce("ReduceSum", mask, &[1], false)?;
        let (one, zero) = (self.e.int(1), self.e.int(0));
        let last = self.e.add(Operator::new("Sub"), &[kept, one])?;
        self.e.add(Operator::new("Max"), &[last, zero])
    }

    /// Which of the new tokens are kept, `[B, S]`.
    fn new_mask(&mut self) -> Result<ValueId> {
        let bounds = self.new_tokens()?;
        self.share("aligned/new_mask", |s| {
            let mask = s.input("attention_mask")?;
            s.of_new_tokens(mask, bounds)
        })
    }

    /// How many of the new places begin with a row's first token, `[B, 1]`; none if it has no new one.
    fn tokens_from_the_first(&mut self) -> Result<ValueId> {
        let (mask, new) = (self.new_mask()?, self.new_length()?);
        self.share("aligned/from_the_first", |s| {
            let (zero, down) = (s.e.int(0), s.e.int(-1));
            // S, S - 1, .., 1
            let left = s.e.add(Operator::new("Range"), &[new, zero, down])?;
            let left = s.e.add(Operator::new("Mul"), &[mask, left])?;
            s.reduce("ReduceMax", left, &[1], true)
        })
    }

    /// `0 .. S`, `[S]`
    fn token_index(&mut self) -> Result<ValueId> {
        let new = self.new_length()?;
        self.share("aligned/token_index", |s| {
            let (zero, one) = (s.e.int(0), s.e.int(1));
            s.e.add(Operator::new("Range"), &[zero, new, one])
        })
    }

    /// Places modulo `S`.
    fn within_the_sequence(&mut self, places: ValueId) -> Result<ValueId> {
        let new = self.new_length()?;
        let length = self.share("aligned/length", |s| {
            let one = s.e.int(1);
            let behind = s.e.add(Operator::new("Add"), &[new, one])?;
            // [S]: one element, on the device
            s.e.add(Operator::new("Range"), &[new, behind, one])
        })?;
        self.e.add(Operator::new("Mod").int("fmod", 0), &[places, length])
    }
}

/// Why an attention is not of the form, whatever the target.
fn refusal(op: &AttentionOp) -> Option<String> {
    if op.chunk.is_some() || op.alibi.is_some() || op.bias {
        return Some("this one adds a bias to its scores".to_owned());
    }
    super::attention::unfit(op)
}
