//! Codes, one a byte, from every layout.

use std::borrow::Cow;
use std::ops::Range;

use super::form::{Layout, Logical};
use super::parts::{Parts, Role, Stored, corrupt, window};
use crate::error::Result;

/// AWQ's order: column j of eight stands in slot `AWQ[j]` of a word.
pub(super) const AWQ: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The bytes that hold the codes of a range of rows.
#[derive(Debug)]
pub(super) struct Codes<'p> {
    layout: Layout,
    bytes: Cow<'p, [u8]>,
    /// What the first of `bytes` is, counted from the start of the tensor.
    base: usize,
    all_rows: usize,
    columns: usize,
}

impl<'p> Codes<'p> {
    pub(super) fn read(logical: &Logical, parts: &'p dyn Parts, rows: &Range<usize>) -> Result<Self> {
        let layout = logical.encoding.layout;
        let Some(tensor) = logical.part(Role::Codes) else {
            return Err(corrupt(&logical.name).found("no codes"));
        };
        let columns = logical.columns();
        let range = byte_range(layout, tensor, rows, columns);
        let base = usize::try_from(range.start).unwrap_or(usize::MAX);
        Ok(Self { layout, bytes: window(parts, tensor, range)?, base, all_rows: logical.rows(), columns })
    }

    /// The codes of `rows`, row after row, into `out`.
    pub(super) fn fill(&self, rows: &Range<usize>, out: &mut [u8]) {
        let columns = self.columns.max(1);
        match self.layout {
            Layout::Columns { bits } => self.columns_first(bits, rows, out),
            Layout::Awq => self.awq(rows, out),
            Layout::Transposed { rows: matrix } => self.transposed(matrix, rows, out),
            _ => {
                for (row, out) in rows.clone().zip(out.chunks_mut(columns)) {
                    self.row(row, out);
                }
            }
        }
    }

    fn row(&self, row: usize, out: &mut [u8]) {
        let first = row.saturating_mul(self.columns);
        match self.layout {
            Layout::Rows { bits, stride } => {
                unpack(self.after(row.saturating_mul(stride)), u32::from(bits), out);
            }
            Layout::RowPairs => {
                let shift = if row.is_multiple_of(2) { 0 } else { 4 };
                for (out, byte) in out.iter_mut().zip(self.after((row / 2).saturating_mul(self.columns))) {
                    *out = byte >> shift & 15;
                }
            }
            Layout::FlatHighFirst => {
                for (at, out) in (first..).zip(out) {
                    let byte = self.byte(at / 2);
                    *out = if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                }
            }
            Layout::Slices { .. } => {
                for (at, out) in (first..).zip(out) {
                    *out = self.sliced(at);
                }
            }
            _ => {
                for (out, byte) in out.iter_mut().zip(self.after(first)) {
                    *out = *byte;
                }
            }
        }
    }

    /// GPTQ: a panel of columns at a time, so that the words of a line of memory are used together.
    fn columns_first(&self, bits: u8, rows: &Range<usize>, out: &mut [u8]) {
        let bits = u32::from(bits);
        let mask = mask(bits);
        for k in 0..self.columns {
            let bit = (k as u64).saturating_mul(u64::from(bits));
            let (word, shift) = (usize::try_from(bit / 32).unwrap_or(usize::MAX), (bit % 32) as u32);
            let at = |n: usize, word: usize| self.word(word.saturating_mul(self.all_rows).saturating_add(n));
            for (n, out) in rows.clone().zip(out.iter_mut().skip(k).step_by(self.columns)) {
                let low = at(n, word) >> shift;
                // Three bits straddle words.
                let value = if shift + bits > 32 { low | at(n, word + 1) << (32 - shift) } else { low };
                *out = low_byte(value & mask);
            }
        }
    }

    fn awq(&self, rows: &Range<usize>, out: &mut [u8]) {
        let words = self.all_rows / 8;
        for k in 0..self.columns {
            for (n, out) in rows.clone().zip(out.iter_mut().skip(k).step_by(self.columns)) {
                let word = self.word(k.saturating_mul(words).saturating_add(n / 8));
                let slot = AWQ.get(n % 8).copied().unwrap_or(0);
                *out = low_byte(word >> (4 * slot) & 15);
            }
        }
    }

    fn transposed(&self, matrix: usize, rows: &Range<usize>, out: &mut [u8]) {
        let (matrix, stride) = (matrix.max(1), matrix / 2);
        for column in 0..self.columns {
            for (row, out) in rows.clone().zip(out.iter_mut().skip(column).step_by(self.columns)) {
                let (expert, k) = (row / matrix, row % matrix);
                let stored = expert.saturating_mul(self.columns).saturating_add(column);
                let byte = self.byte(stored.saturating_mul(stride).saturating_add(k / 2));
                *out = if k.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
            }
        }
    }

    fn sliced(&self, at: usize) -> u8 {
        let Layout::Slices { bits, item, step, width, slices, high_first } = self.layout else { return 0 };
        let (row, column) = (at / width.max(1), at % width.max(1));
        let slice = row / step.max(1);
        let place = (row % step.max(1)).saturating_mul(width).saturating_add(column);
        let value = if item == 4 { self.word(place) } else { u32::from(self.byte(place)) };
        let slot = if high_first { slices.saturating_sub(slice + 1) } else { slice };
        let shift = u32::try_from(slot).unwrap_or(0) * u32::from(bits);
        low_byte(value.checked_shr(shift).unwrap_or(0) & mask(u32::from(bits)))
    }

    #[inline]
    fn after(&self, at: usize) -> &[u8] {
        self.bytes.get(at.saturating_sub(self.base)..).unwrap_or_default()
    }

    #[inline]
    fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at.saturating_sub(self.base)).copied().unwrap_or(0)
    }

    #[inline]
    fn word(&self, at: usize) -> u32 {
        let at = at.saturating_mul(4).saturating_sub(self.base);
        self.bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }
}

/// The bytes that the codes of some rows lie in; those layouts that spread a row over all of the tensor need all of it.
fn byte_range(layout: Layout, tensor: &Stored, rows: &Range<usize>, columns: usize) -> Range<u64> {
    let times = |rows: usize, size: usize| (rows as u64).saturating_mul(size as u64);
    match layout {
        Layout::Bytes => times(rows.start, columns)..times(rows.end, columns),
        Layout::Rows { stride, .. } => times(rows.start, stride)..times(rows.end, stride),
        Layout::RowPairs => times(rows.start / 2, columns)..times(rows.end.div_ceil(2), columns),
        Layout::FlatHighFirst => times(rows.start, columns) / 2..times(rows.end, columns).div_ceil(2),
        Layout::Transposed { rows: matrix } => {
            let (matrix, size) = (matrix.max(1), times(columns, matrix / 2));
            let start = ((rows.start / matrix) as u64).saturating_mul(size);
            start..(rows.end.div_ceil(matrix) as u64).saturating_mul(size)
        }
        Layout::Columns { .. } | Layout::Awq | Layout::Slices { .. } => 0..tensor.bytes(),
    }
}

/// The lowest `bits` bits.
pub(super) fn mask(bits: u32) -> u32 {
    1u32.checked_shl(bits).map_or(u32::MAX, |bit| bit - 1)
}

#[inline]
fn low_byte(value: u32) -> u8 {
    let [low, ..] = value.to_le_bytes();
    low
}

/// A stream of bits, the first code in the lowest ones.
fn unpack(bytes: &[u8], bits: u32, out: &mut [u8]) {
    let mask = mask(bits);
    let (mut held, mut count, mut bytes) = (0u32, 0u32, bytes.iter());
    for out in out {
        if count < bits {
            held |= u32::from(bytes.next().copied().unwrap_or(0)) << count;
            count += 8;
        }
        *out = low_byte(held & mask);
        held >>= bits;
        count -= bits;
    }
}
