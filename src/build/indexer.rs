//! The indexer of sparse attention: a small attention of its own that chooses which keys a query sees.
//!
//! ```text
//! latent ─ wq_b ─ rotate ────────────┐
//! x ─ wk ─ norm ─ rotate ─ (cache) ──┴ relu(q · k) ─ weighted sum of heads ─ the best keys
//! x ─ weights_proj ──────────────────────────────┘
//! ```

use super::op::{Composite, IndexOp, Kind, NormOp};
use super::{Builder, Context};
use crate::error::{Code, Error, Result};
use crate::graph::ValueId;
use crate::spec::{Attention, Indexer, NormKind};

/// What is added to the scores, and the present state if the layer has an indexer of its own.
pub(super) fn build(
    b: &mut Builder,
    spec: &Attention,
    indexer: &Indexer,
    (x, latent): (ValueId, ValueId),
    context: &Context,
) -> Result<(ValueId, Option<ValueId>)> {
    let missing = |found: &str| Error::new(Code::SpecInvalid, "indexer").found(found);
    let Indexer::Own { heads, size, top_k, layout } = *indexer else {
        let index = context.index.ok_or_else(|| missing("the first layer has no indexer before it"))?;
        return Ok((index, None));
    };
    let past = context.pasts.get(2).copied().ok_or_else(|| missing("no state for its keys"))?;
    let mut query = b.linear("wq_b", latent, heads * size, false)?;
    let key = b.linear("wk", x, size, false)?;
    let mut key = b.within("k_norm", |b| {
        // `nn.LayerNorm(head_dim, eps=1e-6)`, whatever rms_norm_eps says.
        let norm = NormOp { kind: NormKind::Layer, eps: 1e-6, weight: true, bias: true, offset: false };
        let affine = ["weight", "bias"].map(|name| b.parameter(name, [size], Kind::Real));
        b.emit("Norm", Composite::Norm(norm), &[key, affine[0], affine[1]])
    })?;
    if let Some(rope) = &spec.rope {
        let (cos, sin) = b.rope_table(rope, context.inputs.position_ids)?;
        let turn = |heads| Composite::Rotate { heads, size: rope.size, layout };
        query = b.within("q_rotary", |b| b.emit("Rotate", turn(heads), &[query, cos, sin]))?;
        key = b.within("k_rotary", |b| b.emit("Rotate", turn(1), &[key, cos, sin]))?;
    }
    let weights = b.linear("weights_proj", x, heads, false)?;
    let op = Composite::Index(IndexOp { heads, size, top_k });
    let (bias, present) = b.emit_pair(["Index", "PresentKey"], op, &[query, key, past, weights])?;
    Ok((bias, Some(present)))
}
