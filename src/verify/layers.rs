//! Which layers a model's error comes from.

use std::collections::BTreeMap;

use serde::Serialize;

use super::metrics::Energy;

/// The error of a layer's output.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerError {
    /// `embedding`, `layers.0` and so on; `lm_head` for the logits. The last layer's output is that of the final norm.
    pub name: String,
    /// Norm of the difference by the norm of the reference: the mean over the positions, because a few positions
    /// (the first one of a text, often) have states so large that they would drown the others in one norm of all.
    pub error: f64,
    /// How much of it the layer's input did not have: less than zero where the layer hides what came before.
    pub increase: f64,
}

/// Sums over positions.
#[derive(Debug, Default)]
pub(super) struct LayerTally {
    states: BTreeMap<usize, (f64, f64)>,
    logits: (f64, f64),
}

impl LayerTally {
    /// Adds one position of a hidden state.
    pub(super) fn add(&mut self, number: usize, reference: &[f32], model: &[f32]) {
        let mut energy = Energy::default();
        for (r, m) in reference.iter().zip(model) {
            let (r, d) = (f64::from(*r), f64::from(*m) - f64::from(*r));
            energy += Energy { reference: r * r, difference: d * d };
        }
        let (sum, count) = self.states.entry(number).or_default();
        *sum += energy.error();
        *count += 1.0;
    }

    /// Adds one position's error of the logits.
    pub(super) fn add_logits(&mut self, error: f64) {
        self.logits = (self.logits.0 + error, self.logits.1 + 1.0);
    }

    /// The errors, largest increase first; nothing where no hidden state was compared.
    pub(super) fn finish(self) -> Vec<LayerError> {
        if self.states.is_empty() {
            return Vec::new();
        }
        let mean = |(sum, count): (f64, f64)| {
            let mean = if count > 0.0 { sum / count } else { 0.0 };
            if mean.is_nan() { f64::INFINITY } else { mean }
        };
        let named = self.states.into_iter().map(|(number, sums)| (name(number), mean(sums)));
        let mut before = 0.0;
        let mut layers: Vec<LayerError> = named
            .chain([("lm_head".to_owned(), mean(self.logits))])
            .map(|(name, error)| {
                let increase = if error.is_finite() { error - before } else { error };
                before = error;
                LayerError { name, error, increase }
            })
            .collect();
        layers.sort_by(|a, b| b.increase.total_cmp(&a.increase));
        layers
    }
}

fn name(number: usize) -> String {
    match number.checked_sub(1) {
        None => "embedding".into(),
        Some(layer) => format!("layers.{layer}"),
    }
}
