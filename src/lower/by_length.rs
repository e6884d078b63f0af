//! Attention that computes one new token in another way than several.
//!
//! The CPU kernel of `GroupQueryAttention` (release 1.32) works in tiles, so that a prompt's scores are never held all at
//! once, but one token takes it plain loops. Asked for what its tiles have not, it multiplies matrices, and those of one
//! row without a factor have kernels of their own. A sink that is never chosen asks for that and changes no bit.
//!
//! 32 heads of 64 with 8 heads of keys take 0.70 of the time behind 4,096 tokens, and 0.65 behind 1,024. A prompt of 4,096
//! tokens that is computed so takes 1.7 times the time and 2.2 GB, so it is not. Heads that have keys of their own take 1.1
//! to 1.2 times the time.

use super::attention::{Operands, Places, unfit};
use super::masks::masked;
use super::{Form, Lowerer, Operator};
use crate::build::AttentionOp;
use crate::element::ElementType;
use crate::error::Result;
use crate::graph::ValueId;

/// The form of an attention in two branches.
pub(super) const FORM: &str = "GroupQueryAttention.by_length";

impl Lowerer<'_> {
    /// `GroupQueryAttention` for one new token in each row, or for several.
    pub(super) fn attention_by_length(&mut self, op: &AttentionOp, operands: Operands) -> Result<Form<Vec<ValueId>>> {
        if let Some(reason) = unfit(op).or_else(|| one_way(op, self.e.ty(operands.query).element)) {
            return Ok(Form::Refused(reason));
        }
        self.with_window(op, operands, |s, places| s.branches_by_length(op, operands, places)).map(Form::Done)
    }

    fn branches_by_length(&mut self, op: &AttentionOp, operands: Operands, places: Places) -> Result<Vec<ValueId>> {
        // What both branches read stands before them.
        self.total_sequence_length()?;
        let (single, sinks) =
            (self.single_token()?, self.e.filled(ElementType::F32, op.heads, masked(ElementType::F32)));
        let factors = self.query_factors(op, operands.query)?;
        let one = self.branch("then_branch", "one_token", |s| {
            let mut query = operands.query;
            if let Some(factors) = factors {
                query = s.e.add(Operator::new("Mul"), &[query, factors])?;
                s.siblings.like(query, operands.query);
            }
            let unscaled = AttentionOp { scale: 1.0, ..*op };
            s.call_group_query(&unscaled, Operands { query, sinks: Some(sinks), ..operands }, places)
        })?;
        let several = self.branch("else_branch", "several_tokens", |s| s.call_group_query(op, operands, places))?;
        self.e.choose(single, [one, several])
    }

    /// True if each row has one new token.
    fn single_token(&mut self) -> Result<ValueId> {
        let new = self.new_length()?;
        self.share("lengths/single", |s| {
            let one = s.e.int(1);
            s.e.add(Operator::new("Equal"), &[new, one])
        })
    }

    /// What queries are multiplied with, so that their products with keys need no factor: one number, or one for each
    /// element of queries, keys and values that are joined. Nothing where there is no factor.
    fn query_factors(&mut self, op: &AttentionOp, query: ValueId) -> Result<Option<ValueId>> {
        if (op.scale - 1.0).abs() < f64::EPSILON {
            return Ok(None);
        }
        if !self.siblings.is_whole(query) {
            return Ok(Some(self.e.scalar(ElementType::F32, op.scale)));
        }
        let (queries, others) = (op.heads * op.key_size, 2 * op.kv_heads * op.key_size);
        self.share(&format!("scales/{queries}/{others}/{}", op.scale), |s| {
            let factors = [vec![op.scale; queries], vec![1.0; others]].concat();
            Ok(s.e.floats_of(ElementType::F32, &factors, None))
        })
        .map(Some)
    }
}

/// Why one token is computed like several.
fn one_way(op: &AttentionOp, element: ElementType) -> Option<String> {
    if op.sinks || op.softcap.is_some() {
        return Some("its sinks or softcap leave the operator one way to compute it".to_owned());
    }
    if op.heads <= op.kv_heads {
        return Some("each head has keys of its own, for which one way is as good".to_owned());
    }
    (element != ElementType::F32).then(|| format!("the operator has one way to compute {element}"))
}
