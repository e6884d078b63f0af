//! Conversion between float types on bytes, little-endian, rounded to nearest with ties to even.

use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::Rounding;
use crate::element::ElementType;

/// Elements that are converted at a time: few enough for the second pass to find them in the cache.
const STEP: usize = 4096;

/// Converts the elements of `from` into `out`, which holds as many of its own type. Equal types are copied. Counts what
/// does not survive it.
pub(crate) fn convert(
    from: &[u8],
    from_element: ElementType,
    out: &mut [u8],
    out_element: ElementType,
    rounding: &mut Rounding,
) -> Result<(), String> {
    if from_element == out_element {
        out.copy_from_slice(from);
        return Ok(());
    }
    // Widening bfloat16 is a shift: worth a loop without floats in between.
    if (from_element, out_element) == (ElementType::BF16, ElementType::F32) {
        for (wide, narrow) in out.chunks_exact_mut(4).zip(lanes::<2>(from)) {
            wide.copy_from_slice(&(u32::from(u16::from_le_bytes(narrow)) << 16).to_le_bytes());
        }
        return Ok(());
    }
    let mut values = Vec::with_capacity(STEP);
    let parts = from.chunks(STEP * from_element.size()).zip(out.chunks_mut(STEP * out_element.size()));
    for (from, out) in parts {
        read_floats(from, from_element, &mut values)?;
        rounding.count(&values, out_element);
        write_floats(&values, out_element, out)?;
    }
    Ok(())
}

/// Elements as float32, in place of what `values` held.
pub(crate) fn read_floats(from: &[u8], element: ElementType, values: &mut Vec<f32>) -> Result<(), String> {
    values.clear();
    match element {
        ElementType::F32 => values.extend(lanes::<4>(from).map(f32::from_le_bytes)),
        ElementType::BF16 => values.extend(lanes::<2>(from).map(|b| bf16::from_le_bytes(b).to_f32())),
        ElementType::F16 => {
            // On slices the processor's own instructions are used.
            let narrow: Vec<f16> = lanes::<2>(from).map(f16::from_le_bytes).collect();
            values.resize(narrow.len(), 0.0);
            narrow.convert_to_f32_slice(values);
        }
        #[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
        ElementType::F64 => values.extend(lanes::<8>(from).map(|b| f64::from_le_bytes(b) as f32)),
        other => return Err(format!("{other} is not a float type")),
    }
    Ok(())
}

/// Writes float32 values as elements of a type.
pub(crate) fn write_floats(values: &[f32], element: ElementType, out: &mut [u8]) -> Result<(), String> {
    match element {
        ElementType::F32 => {
            out.chunks_exact_mut(4).zip(values).for_each(|(lane, value)| lane.copy_from_slice(&value.to_le_bytes()));
        }
        ElementType::F16 => {
            let mut narrow = vec![f16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            out.chunks_exact_mut(2).zip(narrow).for_each(|(lane, value)| lane.copy_from_slice(&value.to_le_bytes()));
        }
        ElementType::BF16 => {
            let narrow = values.iter().map(|value| bf16::from_f32(*value).to_le_bytes());
            out.chunks_exact_mut(2).zip(narrow).for_each(|(lane, value)| lane.copy_from_slice(&value));
        }
        other => return Err(format!("weights are not written as {other}")),
    }
    Ok(())
}

pub(super) fn lanes<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.as_chunks().0.iter().copied()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLOATS: [ElementType; 4] = [ElementType::F32, ElementType::F16, ElementType::BF16, ElementType::F64];

    /// One element at a time, by the `half` crate's scalars.
    fn naive(value: f64, element: ElementType) -> (Vec<u8>, f32) {
        #[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
        let single = value as f32;
        match element {
            ElementType::F32 => (single.to_le_bytes().to_vec(), single),
            ElementType::F16 => (f16::from_f32(single).to_le_bytes().to_vec(), f16::from_f32(single).to_f32()),
            ElementType::BF16 => (bf16::from_f32(single).to_le_bytes().to_vec(), bf16::from_f32(single).to_f32()),
            _ => (value.to_le_bytes().to_vec(), single),
        }
    }

    proptest! {
        #[test]
        fn agrees_with_one_element_at_a_time(
            values in prop::collection::vec(prop_oneof![any::<f64>(), -4.0..4.0f64, Just(65536.0), Just(1.0 + 1.0 / 256.0)], 0..9000)
        ) {
            for from in FLOATS {
                let stored: Vec<(Vec<u8>, f32)> = values.iter().map(|value| naive(*value, from)).collect();
                let bytes: Vec<u8> = stored.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
                for to in [ElementType::F32, ElementType::F16, ElementType::BF16] {
                    let mut out = vec![0; values.len() * to.size()];
                    convert(&bytes, from, &mut out, to, &mut Rounding::default()).unwrap();
                    for ((_, value), lane) in stored.iter().zip(out.chunks_exact(to.size())) {
                        if !value.is_nan() {
                            prop_assert_eq!(lane, naive(f64::from(*value), to).0, "{} from {} to {}", value, from, to);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn integers_are_not_weights() {
        let mut counted = Rounding::default();
        assert!(convert(&[0; 8], ElementType::I64, &mut [0; 4], ElementType::F32, &mut counted).is_err());
        assert!(convert(&[0; 4], ElementType::F32, &mut [0; 1], ElementType::I8, &mut counted).is_err());
    }
}
