//! Small integers in bytes, the first in the lowest bits.

use super::block::{Fit, Grid};
use super::lanes::{LANES, Lanes};

/// The integers of a block, packed.
#[inline(always)]
pub(super) fn store(block: &[Lanes], grid: &Grid, fit: Fit, out: &mut [u8]) {
    match grid.bits {
        2 => {
            for (values, out) in block.iter().zip(out.as_chunks_mut::<4>().0) {
                let integers = grid.integers(*values, fit);
                for (out, [a, b, c, d]) in out.iter_mut().zip(integers.as_chunks::<4>().0) {
                    *out = a | b << 2 | c << 4 | d << 6;
                }
            }
        }
        4 => {
            for (values, out) in block.iter().zip(out.as_chunks_mut::<8>().0) {
                let integers = grid.integers(*values, fit);
                for (out, [low, high]) in out.iter_mut().zip(integers.as_chunks::<2>().0) {
                    *out = low | high << 4;
                }
            }
        }
        _ => {
            for (values, out) in block.iter().zip(out.as_chunks_mut::<LANES>().0) {
                *out = grid.integers(*values, fit);
            }
        }
    }
}

/// One integer; zero beyond the end.
#[inline(always)]
pub(super) fn get(packed: &[u8], index: usize, bits: u8) -> u8 {
    let per_byte = usize::from(8 / bits);
    let byte = packed.get(index / per_byte).copied().unwrap_or(0);
    let shift = (index % per_byte) * usize::from(bits);
    byte >> shift & (u8::MAX >> (8 - bits))
}

/// Adds one integer, a whole number from 0 to 255, to bits that are still zero; nothing beyond the end.
#[inline(always)]
pub(super) fn set(packed: &mut [u8], index: usize, bits: u8, integer: f32) {
    let per_byte = usize::from(8 / bits);
    if let Some(byte) = packed.get_mut(index / per_byte) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number of the grid")]
        let integer = integer as u8;
        *byte |= integer << ((index % per_byte) * usize::from(bits));
    }
}
