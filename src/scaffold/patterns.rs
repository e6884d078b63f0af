//! Tensor names with their numbers taken out: `blocks.3.ff.experts.7.up` is one of `blocks.{layer}.ff.experts.{expert}.up`.

use std::collections::{BTreeMap, BTreeSet};

use crate::read::Checkpoint;

/// Tensors whose names differ by their numbers only.
#[derive(Debug, Clone, Default)]
pub(super) struct Pattern {
    /// The name with `{layer}` for its first number and `{expert}` for its second.
    pub(super) name: String,
    /// The first numbers.
    pub(super) layers: BTreeSet<usize>,
    /// How many second numbers there are.
    pub(super) experts: usize,
    /// Shape of the first of them.
    pub(super) shape: Vec<usize>,
    /// How many tensors.
    pub(super) count: usize,
}

/// A name's pattern, and the numbers in it.
pub(super) fn generalise(name: &str) -> (String, Vec<usize>) {
    let mut numbers = Vec::new();
    let segments = name.split('.').map(|segment| match segment.parse::<usize>() {
        Ok(number) if numbers.len() < 2 => {
            numbers.push(number);
            if numbers.len() == 1 { "{layer}" } else { "{expert}" }
        }
        _ => segment,
    });
    (segments.collect::<Vec<_>>().join("."), numbers)
}

/// The patterns of a checkpoint, by name.
pub(super) fn patterns(checkpoint: &Checkpoint) -> Vec<Pattern> {
    let mut found: BTreeMap<String, Pattern> = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        let (name, numbers) = generalise(&tensor.name);
        let pattern = found.entry(name.clone()).or_insert_with(|| Pattern {
            name,
            shape: tensor.shape.clone(),
            ..Pattern::default()
        });
        pattern.layers.extend(numbers.first());
        pattern.experts = pattern.experts.max(numbers.get(1).map_or(0, |expert| expert.saturating_add(1)));
        pattern.count += 1;
    }
    found.into_values().collect()
}
