//! Mixture of attention heads: the projections of queries and outputs are experts, chosen once for both.

use super::{Builder, Composite, Kind};
use crate::error::Result;
use crate::graph::{Dim, ValueId};
use crate::spec::{Attention, Mixture};

/// Which experts a token's slots take, and their weights.
#[derive(Clone, Copy)]
pub(super) struct Chosen {
    selection: ValueId,
    weights: ValueId,
}

/// Queries `[B, S, K * k * D]`: for each key head one from every slot.
pub(super) fn queries(b: &mut Builder, spec: &Attention, own: Mixture, x: ValueId) -> Result<(ValueId, Chosen)> {
    let (hidden, width) = (b.width(x), spec.kv_heads * spec.key_size);
    let full = b.emit("Convert", Composite::Convert(Kind::Full), &[x])?;
    let logits = b.linear("router", full, own.experts, false)?;
    let choose = Composite::Choose { top_k: own.top_k };
    let (selection, weights) = b.emit_pair(["Selection", "Weights"], choose, &[logits])?;
    let [selection, weights] = [selection, weights].map(|x| b.emit("Convert", Composite::Convert(Kind::Real), &[x]));
    let chosen = Chosen { selection: selection?, weights: weights? };
    let weight = b.within("q_proj", |b| b.parameter("weight", [own.experts, width, hidden], Kind::Real));
    let all = b.emit("EachExpert", Composite::EachExpert, &[x, weight])?;
    // [B, S, k, E] · [B, S, E, K * D] -> [B, S, k, K * D]
    let query = b.emit("Queries", Composite::MatMul, &[chosen.selection, all])?;
    let query = exchange(b, query, [own.top_k, spec.kv_heads, spec.key_size])?;
    Ok((query, chosen))
}

/// The experts' output projections, weighted and added: `[B, S, K * k * D]` -> `[B, S, H]`
pub(super) fn output(
    b: &mut Builder,
    spec: &Attention,
    own: Mixture,
    (mixed, hidden): (ValueId, usize),
    chosen: Chosen,
) -> Result<ValueId> {
    let width = spec.kv_heads * spec.value_size;
    let mixed = exchange(b, mixed, [spec.kv_heads, own.top_k, spec.value_size])?;
    // [B, S, K * k * D] -> [B, S, k, K * D]
    let mut shape = b.shape(mixed).to_vec();
    shape.truncate(2);
    shape.extend([Dim::from(own.top_k), Dim::from(width)]);
    let mixed = b.emit("BySlot", Composite::Reshape(shape), &[mixed])?;
    let weights = b.emit("Weights", Composite::Multiply, &[chosen.selection, chosen.weights])?;
    let weights = b.emit("Weights", Composite::Transpose(vec![0, 1, 3, 2]), &[weights])?;
    // [B, S, E, k] · [B, S, k, K * D] -> [B, S, E, K * D]
    let by_expert = b.emit("ByExpert", Composite::MatMul, &[weights, mixed])?;
    let weight = b.within("o_proj", |b| b.parameter("weight", [own.experts, hidden, width], Kind::Real));
    let sum = b.emit("SumExperts", Composite::SumExperts, &[by_expert, weight])?;
    if !spec.output_bias {
        return Ok(sum);
    }
    let bias = b.within("o_proj", |b| b.parameter("bias", [hidden], Kind::Real));
    b.emit("Bias", Composite::Add, &[sum, bias])
}

/// `[B, S, .. a * b * c]` -> `[B, S, b * a * c]`: the first two parts of the last axis change places.
fn exchange(b: &mut Builder, x: ValueId, [first, second, size]: [usize; 3]) -> Result<ValueId> {
    let leading: Vec<Dim> = b.shape(x).iter().take(2).cloned().collect();
    let shape = |sizes: &[usize]| leading.iter().cloned().chain(sizes.iter().map(|size| Dim::from(*size))).collect();
    let x = b.emit("Apart", Composite::Reshape(shape(&[first, second, size])), &[x])?;
    let x = b.emit("Exchanged", Composite::Transpose(vec![0, 1, 3, 2, 4]), &[x])?;
    b.emit("Flat", Composite::Reshape(shape(&[first * second * size])), &[x])
}
