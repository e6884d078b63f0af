//! From token ids to the first hidden states.

use super::{Builder, Composite, Inputs, Kind};
use crate::error::Result;
use crate::graph::ValueId;
use crate::spec::{Embedding, Positions};

/// Embeds tokens, scales them, adds positions, projects and normalises: whatever of it the model does.
pub(super) fn build(
    b: &mut Builder,
    spec: &Embedding,
    (vocabulary, hidden): (usize, usize),
    ids: ValueId,
    inputs: &Inputs,
) -> Result<ValueId> {
    let width = spec.size.unwrap_or(hidden);
    let mut x = b.within("embed_tokens", |b| {
        let table = b.parameter("weight", [vocabulary, width], Kind::Real);
        let embedded = b.emit("Embed", Composite::Embed, &[ids, table])?;
        match spec.scale {
            Some(scale) => b.emit("Scale", Composite::Scale(scale), &[embedded]),
            None => Ok(embedded),
        }
    })?;
    if width != hidden {
        x = b.linear("project_in", x, hidden, false)?;
    }
    if let Some(positions) = &spec.positions {
        let added = b.within("embed_positions", |b| absolute(b, positions, hidden, inputs.position_ids))?;
        x = b.within("embed_positions", |b| b.emit("Add", Composite::Add, &[x, added]))?;
    }
    match &spec.norm {
        Some(norm) => b.norm(norm, x),
        None => Ok(x),
    }
}

fn absolute(b: &mut Builder, spec: &Positions, width: usize, positions: ValueId) -> Result<ValueId> {
    let shifted = |b: &mut Builder, offset: usize| match offset {
        0 => Ok(positions),
        offset => b.emit("Shift", Composite::Shift(offset), &[positions]),
    };
    match *spec {
        Positions::Learned { rows, offset } => {
            let positions = shifted(b, offset)?;
            let table = b.parameter("weight", [rows, width], Kind::Real);
            b.emit("Embed", Composite::Embed, &[positions, table])
        }
        Positions::Sinusoidal { offset } => {
            let positions = shifted(b, offset)?;
            b.emit("Sinusoid", Composite::Sinusoid { width }, &[positions])
        }
    }
}
