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

/// The inputs and outputs of a layer's caches of keys and of values.
pub fn caches(index: usize) -> [(String, String); 2] {
    ["key", "value"].map(|name| (format!("past_key_values.{index}.{name}"), format!("present.{index}.{name}")))
}

/// Whether an input of this name is a cache of keys or values.
pub fn is_cache(input: &str) -> bool {
    input.starts_with("past_key_values.")
}

/// The states of a layer, in the order in which its builder takes and returns them. A layer that reads another's
/// cache has none; numbers are the layers' own.
pub(super) fn states(index: usize, layer: &Layer) -> Vec<State> {
    let attention = &layer.attention;
    let (batch, length) = (Dim::from(Symbol::Batch), Dim::from(Symbol::Past));
    let mut states = Vec::new();
    if attention.shares.is_none() {
        let caches = caches(index).into_iter().zip([attention.key_size, attention.value_size]);
        states.extend(caches.map(|((past, present), size)| State {
            past,
            present,
            ty: Type::new(Kind::Real, [batch.clone(), attention.kv_heads.into(), length.clone(), size.into()]),
        }));
    }
    if let Some(Indexer::Own { size, .. }) = attention.indexer {
        states.push(State {
            past: format!("past_indexer.{index}"),
            present: format!("present_indexer.{index}"),
            ty: Type::new(Kind::Real, [batch, length, size.into()]),
        });
    }
    states
}
