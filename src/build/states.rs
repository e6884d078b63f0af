//! What a run hands to the next one: the state inputs of each layer, and the outputs that carry them on.

use super::{Builder, Kind};
use crate::graph::{Dim, Symbol, Type, ValueId};
use crate::spec::{Indexer, Layer};

/// A state input and its output.
#[derive(Debug)]
pub(super) struct State {
    past: String,
    present: String,
    ty: Type<Kind>,
}

impl State {
    /// Adds the input.
    pub(super) fn input(&self, b: &mut Builder) -> ValueId {
        b.input(&self.past, self.ty.clone())
    }

    /// Makes a value the output.
    pub(super) fn output(&self, b: &mut Builder, value: ValueId) {
        b.output(&self.present, value);
    }
}

/// The states of a layer, in the order in which its builder takes and returns them. A layer that reads another's
/// cache has none; numbers are the layers' own.
pub(super) fn states(index: usize, layer: &Layer) -> Vec<State> {
    let attention = &layer.attention;
    let (batch, past) = (Dim::from(Symbol::Batch), Dim::from(Symbol::Past));
    let mut states = Vec::new();
    if attention.shares.is_none() {
        let sizes = [("key", attention.key_size), ("value", attention.value_size)];
        states.extend(sizes.map(|(name, size)| State {
            past: format!("past_key_values.{index}.{name}"),
            present: format!("present.{index}.{name}"),
            ty: Type::new(Kind::Real, [batch.clone(), attention.kv_heads.into(), past.clone(), size.into()]),
        }));
    }
    if let Some(Indexer::Own { size, .. }) = attention.indexer {
        states.push(State {
            past: format!("past_indexer.{index}"),
            present: format!("present_indexer.{index}"),
            ty: Type::new(Kind::Real, [batch, past, size.into()]),
        });
    }
    states
}
