//! Several measurements of one thing.

use serde::Serialize;

/// Smallest, middle and largest of some measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The middle one; of an even number the mean of the two in the middle.
    pub median: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// The spread of some numbers; all zero without any.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
        let last = values.len().saturating_sub(1);
        Self { min: at(0), median: f64::midpoint(at(last / 2), at(values.len() / 2)), max: at(last) }
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn medians() {
        let of = |values: &[f64]| Spread::of(values.iter().copied());
        assert_eq!(of(&[3.0, 1.0, 8.0]), Spread { min: 1.0, median: 3.0, max: 8.0 });
        assert_eq!(of(&[4.0, 1.0, 2.0, 8.0]), Spread { min: 1.0, median: 3.0, max: 8.0 });
        assert_eq!(of(&[5.0]), Spread { min: 5.0, median: 5.0, max: 5.0 });
        assert_eq!(of(&[]), Spread { min: 0.0, median: 0.0, max: 0.0 });
    }
}
