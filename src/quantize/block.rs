//! One block: which scale and zero point, and which integers.
//!
//! A block comes as whole [`Lanes`]; where a row ends within one, zeros of weight zero fill it up.

use pulp::Simd;

use super::lanes::{LANES, Lanes, ROUND, fold, total};
use super::{Algorithm, ScaleType, Scheme};

/// The grid of a scheme: integers from 0 to `top`, around `middle` where no zero point is stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// The largest integer.
    pub(super) top: f32,
    /// The implicit zero point.
    pub(super) middle: f32,
    /// Bits of an integer.
    pub(super) bits: u8,
    symmetric: bool,
    scales: ScaleType,
    algorithm: Algorithm,
    /// True if an error costs the same in every column.
    even: bool,
}

/// How a block is written: `(integer - zero) * scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Fit {
    /// As it is stored: rounded to the scheme's type of scales.
    pub(super) scale: f32,
    /// An integer of the grid.
    pub(super) zero: f32,
}

/// Smallest and largest value of a block, and zero.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    low: f32,
    high: f32,
}

/// Grids to be tried at once, one a lane; the other lanes hold them again.
#[derive(Clone, Copy)]
struct Candidates {
    /// Reciprocals of their scales.
    inverse: Lanes,
    zero: Lanes,
}

/// Above it nothing is quantised: a scale's rounding could carry the result beyond float32.
pub(super) const LARGEST: f32 = 8.507_059e37;
/// Between these the squares of a block's values neither overflow nor vanish; elsewhere a search is not worth it.
const SEARCHED: std::ops::Range<f32> = 1e-12..1e12;

impl Grid {
    pub(super) fn new(scheme: &Scheme, even: bool) -> Self {
        let (top, middle) = match scheme.bits() {
            2 => (3.0, 2.0),
            4 => (15.0, 8.0),
            _ => (255.0, 128.0),
        };
        let (symmetric, scales, algorithm) = (scheme.is_symmetric(), scheme.scales(), scheme.algorithm());
        Self { top, middle, bits: scheme.bits(), symmetric, scales, algorithm, even }
    }

    /// The fit of a block by the scheme's algorithm. `weights` say what an error costs, value by value.
    #[inline(always)]
    pub(super) fn fit<S: Simd>(&self, simd: S, block: &[Lanes], weights: &[Lanes], range: Range) -> Fit {
        let plain = self.nearest(range);
        match self.algorithm {
            Algorithm::Search if SEARCHED.contains(&range.largest()) => self.search(simd, block, weights, range, plain),
            Algorithm::Search | Algorithm::Nearest | Algorithm::Stored => plain,
        }
    }

    /// The smallest grid that holds every value of the block. A symmetric one gives its longer side, which has one
    /// integer more, to the larger extreme: the scale takes the sign for that.
    #[inline(always)]
    fn nearest(&self, range: Range) -> Fit {
        if self.symmetric {
            let scale = self.store(range.extreme() / -self.middle);
            return Fit { scale, zero: self.middle };
        }
        let scale = self.store(range.high / self.top - range.low / self.top);
        if scale == 0.0 {
            return Fit { scale, zero: self.middle };
        }
        Fit { scale, zero: clamp(round(-range.low / scale), 0.0, self.top) }
    }

    /// What least squares make of the best of eight grids, of which one is the plain one, by their weighted squared
    /// errors.
    ///
    /// Each of the eight rounds the block. For those integers `sum(w q x) / sum(w q q)` is the best scale, and leaves
    /// an error of `sum(w x x) - sum(w q x)^2 / sum(w q q)`. So the result is no worse than the plain grid, unless the
    /// scale has to be rounded.
    #[inline(always)]
    fn search<S: Simd>(&self, simd: S, block: &[Lanes], weights: &[Lanes], range: Range, plain: Fit) -> Fit {
        let candidates = if self.symmetric { self.mirrored(range) } else { self.shifted(range) };
        let (surely, scale, zero) = self.project(simd, block, weights, &candidates);
        let fit = Fit { scale: self.store(scale), zero };
        // What the plain grid holds exactly is not to be changed by the last bit of a scale.
        let certain = surely && self.scales == ScaleType::Float32;
        let better = certain || self.error(simd, block, weights, fit) < self.error(simd, block, weights, plain);
        if better { fit } else { plain }
    }

    /// Scales that put the larger extreme on either side, beyond the grid's end or within it.
    #[inline(always)]
    fn mirrored(&self, range: Range) -> Candidates {
        let steps = match self.bits {
            2 => &MIRRORED_2,
            4 => &MIRRORED_4,
            _ => &MIRRORED_8,
        };
        let inverse = 1.0 / range.extreme();
        Candidates { inverse: twice(&steps.map(|step| step * inverse)), zero: [self.middle; LANES] }
    }

    /// Ranges cut at either end, with the zero point that each one needs.
    #[inline(always)]
    fn shifted(&self, range: Range) -> Candidates {
        let (low, high) = match self.bits {
            2 => (&SHIFTED_2.0, &SHIFTED_2.1),
            4 => (&SHIFTED_4.0, &SHIFTED_4.1),
            _ => (&SHIFTED_8.0, &SHIFTED_8.1),
        };
        let (mut inverse, mut zero) = ([0.0; CANDIDATES], [0.0; CANDIDATES]);
        for ((inverse, zero), (low, high)) in inverse.iter_mut().zip(&mut zero).zip(low.iter().zip(high)) {
            *inverse = self.top / (range.high * high - range.low * low);
            *zero = clamp(round(-range.low * low * *inverse), 0.0, self.top);
        }
        Candidates { inverse: twice(&inverse), zero: twice(&zero) }
    }

    /// Whether the best candidate is better than the first one by more than rounding; the best scale for its integers, and
    /// its zero point.
    ///
    /// Candidates stand side by side in registers, values follow one another: no sum crosses lanes.
    #[inline(always)]
    fn project<S: Simd>(
        &self,
        simd: S,
        block: &[Lanes],
        weights: &[Lanes],
        candidates: &Candidates,
    ) -> (bool, f32, f32) {
        let (mut cross, mut square, mut gain) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        let steps = S::as_simd_f32s(&candidates.inverse).0.iter().zip(S::as_simd_f32s(&candidates.zero).0);
        let sums = S::as_mut_simd_f32s(&mut cross).0.iter_mut().zip(S::as_mut_simd_f32s(&mut square).0);
        let tried = steps.zip(sums).zip(S::as_mut_simd_f32s(&mut gain).0).take(CANDIDATES.div_ceil(S::F32_LANES));
        for (((&inverse, &zero), (cross, square)), gain) in tried {
            // Shifted by `ROUND`, numbers are rounded as they are summed.
            let shift = simd.splat_f32s(ROUND);
            let low = simd.sub_f32s(shift, zero);
            let high = simd.add_f32s(low, simd.splat_f32s(self.top));
            // Two sums each, so that none waits for the one before.
            let (mut crosses, mut squares) = ([*cross; 2], [*square; 2]);
            let pairs = block.as_flattened().as_chunks::<2>().0.iter().zip(weights.as_flattened().as_chunks::<2>().0);
            for (values, weights) in pairs {
                let sums = crosses.iter_mut().zip(&mut squares);
                for ((value, weight), (cross, square)) in values.iter().zip(weights).zip(sums) {
                    let value = simd.splat_f32s(*value);
                    let shifted = simd.mul_add_f32s(value, inverse, shift);
                    let q = simd.sub_f32s(simd.min_f32s(simd.max_f32s(shifted, low), high), shift);
                    let weighted = if self.even { q } else { simd.mul_f32s(q, simd.splat_f32s(*weight)) };
                    *cross = simd.mul_add_f32s(weighted, value, *cross);
                    *square = simd.mul_add_f32s(weighted, q, *square);
                }
            }
            let ([cross_even, cross_odd], [square_even, square_odd]) = (crosses, squares);
            *cross = simd.add_f32s(cross_even, cross_odd);
            *square = simd.add_f32s(square_even, square_odd);
            // Where all integers are zero, so is the gain.
            let divisor = simd.max_f32s(*square, simd.splat_f32s(f32::MIN_POSITIVE));
            *gain = simd.div_f32s(simd.mul_f32s(*cross, *cross), divisor);
        }
        // Which one is best can not be foreseen, so nothing branches on it: the last bits of a gain, which is not negative,
        // give way to its lane counted from the last one, and the largest of these integers is the first of the best.
        let ranks = (0..=LAST).rev().zip(&gain).map(|(lane, gain)| gain.to_bits() & !LAST | lane);
        let best = (LAST - (ranks.fold(0, u32::max) & LAST)) as usize;
        match (gain.get(best), cross.get(best), square.get(best), candidates.zero.get(best)) {
            (Some(most), Some(cross), Some(square), Some(zero)) if *most > 0.0 => {
                let [plain, ..] = gain;
                (*most > plain * CERTAIN, quotient(*cross, *square), *zero)
            }
            _ => (false, 0.0, self.middle),
        }
    }

    /// The weighted squared error of a fit: `sum(w (x - s q)^2)`.
    #[inline(always)]
    fn error<S: Simd>(&self, simd: S, block: &[Lanes], weights: &[Lanes], fit: Fit) -> f32 {
        let (inverse, scale) = (simd.splat_f32s(reciprocal(fit.scale)), simd.splat_f32s(-fit.scale));
        let (low, high) = (simd.splat_f32s(-fit.zero), simd.splat_f32s(self.top - fit.zero));
        let mut sum = [0.0; LANES];
        {
            let (sum, _) = S::as_mut_simd_f32s(&mut sum);
            for (values, weights) in block.iter().zip(weights) {
                let (values, weights) = (S::as_simd_f32s(values).0, S::as_simd_f32s(weights).0);
                for (sum, (&value, &weight)) in sum.iter_mut().zip(values.iter().zip(weights)) {
                    let q = integer(simd, simd.mul_f32s(value, inverse), low, high);
                    let error = simd.mul_add_f32s(q, scale, value);
                    let weighted = if self.even { error } else { simd.mul_f32s(error, weight) };
                    *sum = simd.mul_add_f32s(weighted, error, *sum);
                }
            }
        }
        total(sum)
    }

    /// The integers of sixteen values.
    #[inline(always)]
    pub(super) fn integers(&self, values: Lanes, fit: Fit) -> [u8; LANES] {
        let (inverse, low, high) = (reciprocal(fit.scale), -fit.zero, self.top - fit.zero);
        // The low byte of the sum is the integer: see `ROUND`.
        let [zero, ..] = (ROUND + fit.zero).to_bits().to_le_bytes();
        values.map(|x| {
            let [byte, ..] = (clamp(x * inverse, low, high) + ROUND).to_bits().to_le_bytes();
            byte.wrapping_add(zero)
        })
    }

    /// A scale as it is stored.
    #[inline(always)]
    fn store(&self, scale: f32) -> f32 {
        self.scales.round(scale)
    }
}

/// Rounding to sixteen grids, one a lane.
pub(super) struct Rounding {
    inverse: Lanes,
    low: Lanes,
    high: Lanes,
    scale: Lanes,
}

impl Rounding {
    #[inline(always)]
    pub(super) fn new(grid: &Grid, fits: &[Fit; LANES]) -> Self {
        Self {
            inverse: fits.map(|fit| reciprocal(fit.scale)),
            low: fits.map(|fit| -fit.zero),
            high: fits.map(|fit| grid.top - fit.zero),
            scale: fits.map(|fit| fit.scale),
        }
    }

    /// By how much values lie above what their targets are rounded to.
    #[inline(always)]
    pub(super) fn error(&self, targets: Lanes, values: &Lanes) -> Lanes {
        let mut errors = targets;
        let bounds = self.low.iter().zip(&self.high);
        let grids = self.inverse.iter().zip(&self.scale).zip(bounds);
        for ((error, value), ((inverse, scale), (low, high))) in errors.iter_mut().zip(values).zip(grids) {
            *error = value - round(clamp(*error * inverse, *low, *high)) * scale;
        }
        errors
    }
}

impl Range {
    /// The range of a block and zero, or nothing where a value is not finite or is too large.
    #[inline(always)]
    pub(super) fn of(block: &[Lanes]) -> Option<Self> {
        let (mut low, mut high, mut largest) = ([0.0; LANES], [0.0; LANES], [0; LANES]);
        for values in block {
            for (((low, high), largest), value) in low.iter_mut().zip(&mut high).zip(&mut largest).zip(values) {
                *low = if *value < *low { *value } else { *low };
                *high = if *value > *high { *value } else { *high };
                // As integers, so that NaN counts as larger than anything.
                let bits = (value.to_bits() & 0x7fff_ffff).cast_signed();
                *largest = if bits > *largest { bits } else { *largest };
            }
        }
        let range = Self { low: fold(low, f32::min), high: fold(high, f32::max) };
        (largest.into_iter().fold(0, i32::max) <= LARGEST.to_bits().cast_signed()).then_some(range)
    }

    /// The value that lies farthest from zero.
    #[inline(always)]
    fn extreme(self) -> f32 {
        if -self.low >= self.high { self.low } else { self.high }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        self.extreme().abs()
    }
}

#[inline(always)]
fn quotient(a: f32, b: f32) -> f32 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// The nearest integers, ties to even, within bounds.
#[inline(always)]
fn integer<S: Simd>(simd: S, x: S::f32s, low: S::f32s, high: S::f32s) -> S::f32s {
    let round = simd.splat_f32s(ROUND);
    let x = simd.min_f32s(simd.max_f32s(x, low), high);
    simd.sub_f32s(simd.add_f32s(x, round), round)
}

/// `1 / scale`, or zero for a scale that is zero or whose reciprocal is not finite.
#[inline(always)]
fn reciprocal(scale: f32) -> f32 {
    if scale.abs() < f32::MIN_POSITIVE { 0.0 } else { 1.0 / scale }
}

#[inline(always)]
fn round(x: f32) -> f32 {
    (x + ROUND) - ROUND
}

#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// Grids that a search tries. Chosen, with the constants below, from thirty and more on normal and heavier-tailed values:
/// they come within 0.6 % of the squared error that all of those leave, in blocks of 32 to 256.
const CANDIDATES: usize = 8;
/// The last one's lane, all bits of a lane.
const LAST: u32 = 7;

/// More than the rounding of a sum.
const CERTAIN: f32 = 1.000_01;

/// One for each lane.
#[inline(always)]
fn twice(values: &[f32; CANDIDATES]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes.iter_mut().zip(values.iter().cycle()).for_each(|(lane, value)| *lane = *value);
    lanes
}

/// Where the larger extreme is put, counted from the zero point; first where plain rounding puts it.
const MIRRORED_2: [f32; CANDIDATES] = [-2.0, -2.5, -3.0, -3.5, -4.5, 2.5, 3.0, 4.0];
const MIRRORED_4: [f32; CANDIDATES] = [-8.0, -7.2, -8.3, -8.6, -9.0, -9.3, -9.9, -10.6];
const MIRRORED_8: [f32; CANDIDATES] = [-128.0, -126.0, -126.5, -127.0, -127.5, -128.4, -128.7, 127.5];
/// Parts of the range that are kept, below and above zero.
const SHIFTED_2: ([f32; CANDIDATES], [f32; CANDIDATES]) =
    ([1.0, 0.5, 0.5, 0.7, 0.3, 0.7, 0.7, 0.3], [1.0, 0.7, 0.4, 0.8, 0.7, 0.6, 0.4, 0.4]);
const SHIFTED_4: ([f32; CANDIDATES], [f32; CANDIDATES]) =
    ([1.0, 1.03, 0.97, 0.97, 0.9, 0.9, 0.86, 0.8], [1.0, 1.03, 0.97, 0.9, 0.97, 0.9, 0.86, 0.86]);
const SHIFTED_8: ([f32; CANDIDATES], [f32; CANDIDATES]) =
    ([1.0, 1.004, 1.002, 0.998, 0.998, 0.998, 0.996, 0.993], [1.0, 1.004, 1.002, 1.0, 0.998, 0.996, 0.996, 0.996]);
