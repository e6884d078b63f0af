//! Frequencies of rotary position embeddings, after `transformers.modeling_rope_utils`.
//!
//! Everything that transformers computes in float32 is rounded to float32 at the same steps here.

use std::f64::consts::PI;

use crate::spec::{Rope, RopeScaling};

/// Angles per position, one for each rotated pair.
#[derive(Debug, Clone, PartialEq)]
pub enum Frequencies {
    /// The same for every length.
    Fixed(Vec<f32>),
    /// One set for sequences up to a length, another beyond.
    Switched {
        /// The last length of the first.
        limit: usize,
        /// Up to it.
        short: Vec<f32>,
        /// Beyond.
        long: Vec<f32>,
    },
    /// `base(length)^(-exponent)`: the base grows beyond a length.
    Growing {
        /// The last length that does not change the base.
        limit: usize,
        /// How fast it grows.
        factor: f64,
        /// The base up to there.
        theta: f64,
        /// Of each pair.
        exponents: Vec<f32>,
        /// Of what the base is multiplied with.
        power: f64,
    },
}

impl Frequencies {
    /// True if all of them are numbers. Factors that are numbers themselves can still divide to none.
    pub(super) fn are_finite(&self) -> bool {
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        match self {
            Self::Fixed(values) => finite(values),
            Self::Switched { short, long, .. } => finite(short) && finite(long),
            Self::Growing { factor, theta, exponents, power, .. } => {
                finite(exponents) && [factor, theta].iter().all(|value| value.is_finite()) && !power.is_nan()
            }
        }
    }
}

/// The frequencies that a specification asks for.
pub fn frequencies(rope: &Rope) -> Frequencies {
    let plain = inverse(rope, |_, frequency| frequency);
    match &rope.scaling {
        RopeScaling::Default => Frequencies::Fixed(plain),
        RopeScaling::Linear { factor } => Frequencies::Fixed(inverse(rope, |_, frequency| frequency / factor)),
        RopeScaling::Proportional { factor, pairs } => {
            Frequencies::Fixed(inverse(rope, |i, frequency| if i < *pairs { frequency / factor } else { 0.0 }))
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let context = float(*original_context);
            Frequencies::Fixed(inverse(rope, |_, frequency| {
                llama3(frequency, *factor, *low_freq_factor, *high_freq_factor, context)
            }))
        }
        RopeScaling::Yarn { .. } => Frequencies::Fixed(yarn(rope)),
        RopeScaling::Longrope { short_factor, long_factor, original_context } => {
            let divided = |factors: &[f64]| {
                inverse(rope, |i, frequency| frequency / f64::from(round(factors.get(i).copied().unwrap_or(1.0))))
            };
            Frequencies::Switched { limit: *original_context, short: divided(short_factor), long: divided(long_factor) }
        }
        RopeScaling::Dynamic { factor, original_context } => Frequencies::Growing {
            limit: *original_context,
            factor: *factor,
            theta: rope.theta,
            exponents: (0..rope.size / 2).map(|i| exponent(rope, i)).collect(),
            power: float(rope.size) / (float(rope.size) - 2.0),
        },
    }
}

/// Every set of frequencies that a specification computes, and first the one that it scales.
pub(crate) fn frequency_sets(rope: &Rope) -> Vec<Vec<f32>> {
    let mut sets = vec![inverse(rope, |_, frequency| frequency)];
    match frequencies(rope) {
        Frequencies::Fixed(values) => sets.push(values),
        Frequencies::Switched { short, long, .. } => sets.extend([short, long]),
        // It begins as the first one.
        Frequencies::Growing { .. } => {}
    }
    sets
}

/// `2i / size`
fn exponent(rope: &Rope, i: usize) -> f32 {
    round(float(2 * i) / float(rope.size))
}

/// `change(i, theta^(-2i / size))` for every pair.
fn inverse(rope: &Rope, change: impl Fn(usize, f64) -> f64) -> Vec<f32> {
    let plain = |i| f64::from(round(1.0 / f64::from(round(rope.theta.powf(f64::from(exponent(rope, i)))))));
    (0..rope.size / 2).map(|i| round(change(i, plain(i)))).collect()
}

fn llama3(frequency: f64, factor: f64, low: f64, high: f64, context: f64) -> f64 {
    let wavelength = 2.0 * PI / frequency;
    if wavelength < context / high {
        return frequency;
    }
    if wavelength > context / low {
        return frequency / factor;
    }
    let smooth = (context / wavelength - low) / (high - low);
    (1.0 - smooth) * frequency / factor + smooth * frequency
}

fn yarn(rope: &Rope) -> Vec<f32> {
    let RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_context } = rope.scaling else {
        return Vec::new();
    };
    let size = float(rope.size);
    // The pair that turns `rotations` times within the original context.
    let pair =
        |rotations: f64| size * (float(original_context) / (rotations * 2.0 * PI)).ln() / (2.0 * rope.theta.ln());
    let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(size - 1.0));
    #[expect(clippy::float_cmp, reason = "guards the division below, as transformers does")]
    if low == high {
        high += 0.001;
    }
    inverse(rope, |i, frequency| {
        let ramp = ((float(i) - low) / (high - low)).clamp(0.0, 1.0);
        frequency / factor * ramp + frequency * (1.0 - ramp)
    })
}

#[expect(clippy::cast_precision_loss, reason = "sizes and lengths are far below 2^52")]
pub(super) fn float(value: usize) -> f64 {
    value as f64
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
fn round(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::RopeLayout;

    fn rope(scaling: RopeScaling) -> Rope {
        let (layout, attention_factor) = (RopeLayout::Half, 1.0);
        Rope { layout, size: 8, theta: 10000.0, scaling, attention_factor, reversed: false, beyond: None }
    }

    fn fixed(scaling: RopeScaling) -> Vec<f32> {
        match frequencies(&rope(scaling)) {
            Frequencies::Fixed(values) => values,
            other => panic!("expected fixed frequencies, found {other:?}"),
        }
    }

    #[test]
    fn plain_and_linear() {
        approx::assert_relative_eq!(fixed(RopeScaling::Default).as_slice(), [1.0, 0.1, 0.01, 0.001].as_slice());
        let linear = fixed(RopeScaling::Linear { factor: 4.0 });
        approx::assert_relative_eq!(linear.as_slice(), [0.25, 0.025, 0.0025, 0.000_25].as_slice());
    }

    #[test]
    fn llama3_keeps_short_and_divides_long_wavelengths() {
        let values = fixed(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 1000,
        });
        approx::assert_relative_eq!(values[0], 1.0);
        approx::assert_relative_eq!(values[3], 0.001 / 8.0);
        assert!(values[2] > 0.01 / 8.0 && values[2] < 0.01, "the one between lies on the ramp: {values:?}");
    }
}
