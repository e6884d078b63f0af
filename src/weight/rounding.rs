//! What rounding values to a narrower float type does to them, where it is more than rounding.

use half::{bf16, f16};

use crate::element::ElementType;

/// Below this float16 rounds by a fixed step, and in the end to 0.
const NORMAL: f32 = 6.103_515_6e-5;
/// What is off by more than this share of its size has lost its small values. Float16's own rounding is off by 1/4096, and
/// a lone 1e-6, as activations have it for an epsilon, by 1/77, which transformers in float16 has as well.
const ROUNDED: f64 = 1.0 / 32.0;

/// A tally over the values of a tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Rounding {
    /// Values that are not 0.
    pub(crate) values: u64,
    /// Those of them that became 0.
    pub(crate) zeros: u64,
    /// The largest finite value that became infinite; 0 if none did.
    pub(crate) overflow: f32,
    squares: f64,
    errors: f64,
}

impl Rounding {
    /// Counts values that are about to be rounded to a type.
    pub(crate) fn count(&mut self, values: &[f32], to: ElementType) {
        let infinite: fn(f32) -> bool = match to {
            ElementType::F16 => |value| f16::from_f32(value).is_infinite(),
            ElementType::BF16 => |value| bf16::from_f32(value).is_infinite(),
            _ => return,
        };
        // Most chunks are of usual values: two passes that the processor does many values of at a time.
        let finite = |largest: f32, value: &f32| if value.is_finite() { largest.max(value.abs()) } else { largest };
        let largest = values.iter().fold(0.0, finite);
        if infinite(largest) {
            self.overflow = self.overflow.max(largest);
        }
        if to != ElementType::F16 {
            return;
        }
        let mut lanes = [0.0_f64; 8];
        let (mut count, mut small) = (0_u64, false);
        for eight in values.chunks(8) {
            for (lane, value) in lanes.iter_mut().zip(eight) {
                *lane += f64::from(*value) * f64::from(*value);
                count += u64::from(*value != 0.0);
                small |= value.abs() < NORMAL && *value != 0.0;
            }
        }
        self.squares += lanes.iter().sum::<f64>();
        self.values += count;
        if small {
            self.count_small(values);
        }
    }

    fn count_small(&mut self, values: &[f32]) {
        for value in values.iter().filter(|value| value.abs() < NORMAL && **value != 0.0) {
            let rounded = f16::from_f32(*value).to_f32();
            let error = f64::from(*value) - f64::from(rounded);
            self.errors += error * error;
            self.zeros += u64::from(rounded == 0.0);
        }
    }

    /// Adds what was counted elsewhere.
    pub(crate) fn add(&mut self, other: &Self) {
        self.values += other.values;
        self.zeros += other.zeros;
        self.overflow = self.overflow.max(other.overflow);
        self.squares += other.squares;
        self.errors += other.errors;
    }

    /// How far the tensor as a whole is off because its values are small, relative to its size.
    pub(crate) fn loss(&self) -> f64 {
        if self.squares > 0.0 { (self.errors / self.squares).sqrt() } else { 0.0 }
    }

    /// Whether that is more than rounding costs anyhow.
    pub(crate) fn is_lossy(&self) -> bool {
        self.loss() > ROUNDED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(values: &[f32], to: ElementType) -> Rounding {
        let mut rounding = Rounding::default();
        rounding.count(values, to);
        rounding
    }

    #[test]
    fn what_becomes_infinite() {
        for (value, to, infinite) in [
            (65504.0, ElementType::F16, false),
            (65519.0, ElementType::F16, false),
            (65520.0, ElementType::F16, true),
            (-7e4, ElementType::F16, true),
            (f32::INFINITY, ElementType::F16, false),
            (f32::NAN, ElementType::F16, false),
            (7e4, ElementType::BF16, false),
            (f32::MAX, ElementType::BF16, true),
            (f32::MAX, ElementType::F32, false),
        ] {
            let found = counted(&[1.0, value, 2.0], to).overflow;
            assert_eq!(found > 0.0, infinite, "{value} to {to}: {found}");
        }
        assert_eq!(counted(&[7e4, -9e4, f32::INFINITY], ElementType::F16).overflow.to_bits(), 9e4_f32.to_bits());
    }

    #[test]
    fn what_becomes_zero() {
        let few = counted(&[0.0, 1e-9, 0.5, -0.5], ElementType::F16);
        assert_eq!((few.values, few.zeros, few.is_lossy()), (3, 1, false));
        let all = counted(&[1e-9; 20], ElementType::F16);
        assert_eq!((all.values, all.zeros, all.is_lossy()), (20, 20, true));
        // Not 0, but of a step as large as itself.
        let coarse = counted(&[9e-8; 20], ElementType::F16);
        assert_eq!((coarse.zeros, coarse.is_lossy()), (0, true));
        assert!(!counted(&[0.013; 20], ElementType::F16).is_lossy());
        assert!(!counted(&[1e-9; 20], ElementType::BF16).is_lossy());
    }

    #[test]
    fn parts_add_up() {
        let values: Vec<f32> = (0..50_u8).map(|i| 1e-9 * f32::from(i).powi(6)).collect();
        let mut sum = counted(&values[..17], ElementType::F16);
        sum.add(&counted(&values[17..], ElementType::F16));
        let whole = counted(&values, ElementType::F16);
        assert_eq!((sum.values, sum.zeros), (whole.values, whole.zeros));
        approx::assert_relative_eq!(sum.loss(), whole.loss(), max_relative = 1e-12);
    }
}
