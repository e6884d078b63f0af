//! Sums of products, the work of everything that knows a layer's inputs.

use pulp::Simd;

use super::lanes::{LANES, Lanes};

/// Sums that are kept in registers at a time, each of sixteen lanes.
pub(super) const WIDTH: usize = 8;

/// `sums[c] += sum over k of lanes[k] * factors[k][c]`, added up in the order of `k`.
#[inline(always)]
pub(super) fn add_products<S: Simd>(simd: S, lanes: &[Lanes], factors: &[[f32; WIDTH]], sums: &mut [Lanes; WIDTH]) {
    for part in 0..LANES / S::F32_LANES {
        let mut found = [simd.splat_f32s(0.0); WIDTH];
        for (lanes, factors) in lanes.iter().zip(factors) {
            let lanes = S::as_simd_f32s(lanes).0.get(part).copied().unwrap_or(simd.splat_f32s(0.0));
            for (sum, factor) in found.iter_mut().zip(factors) {
                *sum = simd.add_f32s(*sum, simd.mul_f32s(lanes, simd.splat_f32s(*factor)));
            }
        }
        for (sums, found) in sums.iter_mut().zip(found) {
            if let Some(sum) = S::as_mut_simd_f32s(sums).0.get_mut(part) {
                *sum = simd.add_f32s(*sum, found);
            }
        }
    }
}
