//! Sixteen float32 values at a time.
//!
//! Multiplication and addition are two roundings but where `mul_add` is written, which is one on every machine, and each
//! lane has its own sum: so the widest and the narrowest instruction set give the same bits.

/// Values in one [`Lanes`]: one AVX-512 register, two of AVX2, four of NEON or SSE2. No block is smaller.
pub(super) const LANES: usize = 16;

/// Sixteen values.
pub(super) type Lanes = [f32; LANES];

/// Adding and subtracting it rounds to an integer, ties to even, where |x| < 2^22: above 2^23 float32 has no
/// fraction. The low bits of the sum are the integer itself, in two's complement.
pub(super) const ROUND: f32 = 12_582_912.0;

/// Runs on registers of eight lanes where there are some: a search tries eight grids, and would leave half of a wider
/// register empty.
pub(super) fn by_eight<Op: pulp::WithSimd>(op: Op) -> Op::Output {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return pulp::Simd::vectorize(simd, op);
    }
    pulp::Arch::new().dispatch(op)
}

/// One value out of sixteen, in halves: the order does not depend on the machine.
#[inline(always)]
pub(super) fn fold(lanes: Lanes, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = lanes;
    for half in [8, 4, 2, 1] {
        let (low, high) = lanes.split_at_mut(half);
        for (a, b) in low.iter_mut().zip(high) {
            *a = f(*a, *b);
        }
    }
    let [result, ..] = lanes;
    result
}

/// The sum.
#[inline(always)]
pub(super) fn total(lanes: Lanes) -> f32 {
    fold(lanes, |a, b| a + b)
}
