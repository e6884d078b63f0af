//! What codes stand for, and in which type a product is rounded.

use half::{bf16, f16};

use crate::element::ElementType;

/// FP4 with two exponent bits, by its four bits; the sign is bit 3.
pub(super) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The same as `ModelOpt` reads it: its table has no negative zero.
pub(super) const E2M1_ONE_ZERO: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// FP8 with four exponent bits, without infinities (`float8_e4m3fn`).
pub(super) fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (byte >> 3 & 15, f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * power(-9),
        _ => (8.0 + fraction) * power(i32::from(exponent) - 10),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

/// FP8 with five exponent bits: the upper half of a float16.
pub(super) fn e5m2(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
}

/// The scale of MX formats: 2^(byte - 127); 255 is not a number.
pub(super) fn exponent(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

fn power(exponent: i32) -> f32 {
    2f32.powi(exponent)
}

/// A float32 rounded to what a type holds, to the nearest, ties to even.
#[inline]
pub(super) fn round(value: f32, to: ElementType) -> f32 {
    match to {
        ElementType::F16 => f16::from_f32(value).to_f32(),
        ElementType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats() {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let eight = [0x00, 0x01, 0x08, 0x38, 0x7e, 0xb8].map(e4m3);
        assert_eq!(bits(&eight), bits(&[0.0, 0.001_953_125, 0.015_625, 1.0, 448.0, -1.0]));
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan() && exponent(255).is_nan());
        assert_eq!(bits(&[0x3c, 0x7b, 0x01].map(e5m2)), bits(&[1.0, 57344.0, power(-16)]));
        let powers = [1, 127, 254].map(exponent);
        assert_eq!(bits(&powers), bits(&[f32::MIN_POSITIVE, 1.0, power(127)]));
        assert_eq!(bits(&[exponent(0) * 2.0]), bits(&[f32::MIN_POSITIVE]));
    }
}
