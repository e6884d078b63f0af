//! Random values by their place alone, so that any thread can draw any piece of a tensor.
//!
//! Element i of a tensor is `mean + SCALE * (s(i) - 131070)`, each operation rounded to float32 on its own, then rounded
//! to the tensor's type; s(i) is the sum of the four 16-bit lanes of `mix(key + (i + 1) * STEP)`, the (i + 1)-th output of
//! splitmix64 (Steele, Lea and Flood 2014). Integers and single roundings only: every machine draws the same.

use half::{bf16, f16};

use crate::element::ElementType;

/// A sum of four lanes has the standard deviation 65536 / sqrt(3); this makes it 0.02.
const SCALE: f32 = 0.02 / 37_837.227;
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The key of one tensor's values: FNV-1a over its name, from the seed.
pub(super) fn key(name: &str, seed: u64) -> u64 {
    let start = mix(seed.wrapping_add(STEP)) ^ 0xCBF2_9CE4_8422_2325;
    name.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// Writes the elements from number `first` on, little-endian, until `out` is full.
pub(super) fn fill(key: u64, first: u64, mean: f32, element: ElementType, out: &mut [u8]) {
    match element {
        ElementType::BF16 => lanes(key, first, mean, out, |value| bf16::from_f32(value).to_le_bytes()),
        ElementType::F16 => lanes(key, first, mean, out, |value| f16::from_f32(value).to_le_bytes()),
        _ => lanes(key, first, mean, out, f32::to_le_bytes),
    }
}

fn lanes<const N: usize>(key: u64, first: u64, mean: f32, out: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
    let mut state = key.wrapping_add(first.wrapping_mul(STEP));
    for lane in out.chunks_exact_mut(N) {
        state = state.wrapping_add(STEP);
        lane.copy_from_slice(&encode(mean + SCALE * around_zero(mix(state))));
    }
}

/// The output function of splitmix64.
fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The sum of the four lanes around its middle: nearly normal.
#[expect(clippy::cast_precision_loss, reason = "below 2^18, so exact")]
fn around_zero(bits: u64) -> f32 {
    let bytes = bits.to_le_bytes();
    let (lanes, _) = bytes.as_chunks::<2>();
    let sum: i32 = lanes.iter().map(|lane| i32::from(u16::from_le_bytes(*lane))).sum();
    (sum - 131_070) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(first: u64, count: usize, mean: f32) -> Vec<f32> {
        let mut bytes = vec![0; count * 4];
        fill(key("a", 0), first, mean, ElementType::F32, &mut bytes);
        bytes.chunks_exact(4).map(|lane| f32::from_le_bytes(lane.try_into().expect("four bytes"))).collect()
    }

    #[test]
    fn values_are_nearly_normal() {
        let values = floats(0, 100_000, 1.0);
        let average = |of: &dyn Fn(f64) -> f64| values.iter().map(|v| of(f64::from(*v))).sum::<f64>() / 100_000.0;
        let mean = average(&|v| v);
        let deviation = average(&|v| (v - mean).powi(2)).sqrt();
        assert!((mean - 1.0).abs() < 3e-4, "mean {mean}");
        assert!((deviation - 0.02).abs() < 2e-4, "standard deviation {deviation}");
        // A normal distribution has 3, a uniform one 1.8; four uniform ones have 2.7.
        let kurtosis = average(&|v| (v - mean).powi(4)) / deviation.powi(4);
        assert!((2.6..2.8).contains(&kurtosis), "kurtosis {kurtosis}");
    }

    #[test]
    fn pieces_join_without_a_seam() {
        let whole = floats(0, 100, 0.0);
        assert_eq!([floats(0, 33, 0.0), floats(33, 67, 0.0)].concat(), whole);
    }

    #[test]
    fn names_and_seeds_differ() {
        assert_ne!(key("a", 0), key("b", 0));
        assert_ne!(key("a", 0), key("a", 1));
    }

    /// The values are part of what the benches compare over time.
    #[test]
    fn the_first_values_stay() {
        let bits: Vec<u32> = floats(0, 3, 0.0).into_iter().map(f32::to_bits).collect();
        assert_eq!(bits, [3_170_092_526, 989_969_161, 979_973_133]);
    }
}
