//! Rows of a logical tensor as numbers: those of the format's own library, to the last bit.

use std::ops::Range;

use super::codes::{AWQ, Codes, mask};
use super::form::{Encoding, Index, Logical, Product, Scales, Values, Zeros};
use super::parts::{Numbers, Parts, Role, Stored, corrupt};
use super::values::{self, round};
use crate::element::{ElementType, StoredType};
use crate::error::{Code, Error, Result};

/// Rows that are decoded together; a line of memory holds as many 32-bit words.
const PANEL: usize = 16;
/// 1 / 127 as bitsandbytes writes it.
pub(super) const OVER_127: f32 = 7.874_016e-3;

/// Decodes rows of a logical tensor (all axes but the last, counted together) to float32 values, row after row.
///
/// The values are exactly those that the format's own library computes, in the type [`Logical::dtype`].
pub fn decode_rows(logical: &Logical, parts: &dyn Parts, rows: Range<usize>) -> Result<Vec<f32>> {
    let reader = Reader::new(logical, parts, &rows)?;
    let columns = logical.columns();
    let mut out = vec![0.0; reader.count(&rows)?];
    let mut codes = vec![0; columns.saturating_mul(PANEL.min(rows.len()))];
    let mut at = rows.start;
    for panel in out.chunks_mut(columns.saturating_mul(PANEL).max(1)) {
        let here = at..at.saturating_add(panel.len() / columns.max(1));
        reader.codes.fill(&here, &mut codes);
        for ((row, codes), out) in here.clone().zip(codes.chunks(columns.max(1))).zip(panel.chunks_mut(columns.max(1)))
        {
            reader.row(row, codes, out);
        }
        at = here.end;
    }
    Ok(out)
}

/// Everything that is read to decode some rows.
pub(super) struct Reader<'p> {
    pub(super) codes: Codes<'p>,
    encoding: &'p Encoding,
    scales: Numbers<'p>,
    zeros: Option<Numbers<'p>>,
    order: Option<Numbers<'p>>,
    global: f32,
    /// A scalar without a shape does not widen bfloat16 scales (the rule of torch).
    narrow: bool,
    nested: Option<(Numbers<'p>, Numbers<'p>)>,
    values: Vec<f32>,
    rows: usize,
    columns: usize,
    groups: usize,
}

/// A run of columns with one scale and one zero.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) end: usize,
    pub(super) scale: f32,
    pub(super) zero: f32,
}

impl<'p> Reader<'p> {
    pub(super) fn new(logical: &'p Logical, parts: &'p dyn Parts, rows: &Range<usize>) -> Result<Self> {
        if rows.start > rows.end || rows.end > logical.rows() {
            return Err(Error::new(Code::TensorShape, format!("tensor {}", logical.name))
                .found(format!("rows {rows:?}"))
                .expected(format!("rows of {}", logical.rows())));
        }
        let need = |role: Role| logical.part(role).ok_or_else(|| corrupt(&logical.name).found("a part is missing"));
        let numbers = |role: Role| Numbers::read(parts, need(role)?);
        let encoding = &logical.encoding;
        let scaled = matches!(encoding.scales, Scales::TimesGlobal | Scales::OverGlobal);
        let nested = matches!(encoding.scales, Scales::Nested { .. });
        let stored_zeros = encoding.zeros != Zeros::None;
        let groups = groups(encoding, logical.part(Role::Scales));
        Ok(Self {
            codes: Codes::read(logical, parts, rows)?,
            encoding,
            scales: numbers(Role::Scales)?,
            zeros: stored_zeros.then(|| numbers(Role::Zeros)).transpose()?,
            order: (encoding.index == Index::Ordered).then(|| numbers(Role::Order)).transpose()?,
            global: if scaled { numbers(Role::Global)?.get(0) } else { 1.0 },
            narrow: scaled && need(Role::Global)?.shape.is_empty(),
            nested: if nested { Some((numbers(Role::NestedScales)?, numbers(Role::NestedTable)?)) } else { None },
            values: table(encoding.values, || numbers(Role::Table))?,
            rows: logical.rows(),
            columns: logical.columns(),
            groups,
        })
    }

    /// How many values the rows have.
    pub(super) fn count(&self, rows: &Range<usize>) -> Result<usize> {
        let count = rows.len().checked_mul(self.columns).filter(|count| *count <= isize::MAX as usize / 4);
        count.ok_or_else(|| Error::new(Code::TensorShape, "a decoded tensor").found("more values than fit memory"))
    }

    /// The group of column `k`, where columns are ordered by a tensor of their own.
    pub(super) fn group_of(&self, k: usize) -> Option<usize> {
        self.order.as_ref().map(|order| order.word(k) as usize)
    }

    /// What a code stands for.
    pub(super) fn value(&self, code: u8) -> f32 {
        self.values.get(usize::from(code)).copied().unwrap_or(0.0)
    }

    /// The run of columns from `k` on that share a scale.
    pub(super) fn run(&self, n: usize, k: usize) -> Run {
        let flat = n.saturating_mul(self.columns).saturating_add(k);
        let (end, group, at) = match self.encoding.index {
            Index::One => (self.columns, 0, 0),
            Index::Blocks { matrix, rows, columns, grid_rows, grid_columns } => {
                let row = (n / matrix.max(1)).saturating_mul(grid_rows).saturating_add(n % matrix.max(1) / rows.max(1));
                let group = k / columns.max(1);
                ((group + 1).saturating_mul(columns), group, row.saturating_mul(grid_columns).saturating_add(group))
            }
            Index::Transposed { group: size } => {
                let group = k / size.max(1);
                ((group + 1).saturating_mul(size), group, group.saturating_mul(self.rows).saturating_add(n))
            }
            Index::Ordered => {
                let group = self.group_of(k).unwrap_or(0);
                (k + 1, group, group.saturating_mul(self.rows).saturating_add(n))
            }
            Index::Flat { block } => {
                let at = flat / block.max(1);
                (k.saturating_add(block - flat % block.max(1)), at, at)
            }
            Index::Cyclic { count } => (k + 1, 0, flat % count.max(1)),
            Index::Experts { rows } => {
                let (expert, inner) = (n / rows.max(1), n % rows.max(1) / 32);
                let stored = expert.saturating_mul(self.columns).saturating_add(k);
                (k + 1, 0, stored.saturating_mul(rows / 32).saturating_add(inner))
            }
        };
        Run { end: end.clamp(k + 1, self.columns.max(k + 1)), scale: self.scale(at), zero: self.zero(n, group, at) }
    }

    fn scale(&self, at: usize) -> f32 {
        match self.encoding.scales {
            Scales::Plain => self.scales.get(at),
            Scales::TimesGlobal => self.scales.get(at) * self.global,
            Scales::OverGlobal if self.narrow => round(self.scales.get(at) / self.global, ElementType::BF16),
            Scales::OverGlobal => self.scales.get(at) / self.global,
            Scales::Nested { block, offset } => self.nested.as_ref().map_or(0.0, |(scales, table)| {
                table.get(usize::from(self.scales.byte(at))) * scales.get(at / block.max(1)) + offset
            }),
        }
    }

    fn zero(&self, n: usize, group: usize, at: usize) -> f32 {
        let Some(zeros) = &self.zeros else { return 0.0 };
        match self.encoding.zeros {
            Zeros::None => 0.0,
            Zeros::Stored => zeros.get(at),
            Zeros::Awq => {
                let word = zeros.word(group.saturating_mul(self.rows / 8).saturating_add(n / 8));
                small(word >> (4 * AWQ.get(n % 8).copied().unwrap_or(0)) & 15)
            }
            // Three bits do not divide a word: their fields are counted up one by one.
            Zeros::Columns { bits: 3, less_one: true } => {
                let width = self.rows.saturating_mul(3).div_ceil(32);
                let stored = stream(n, 3, |at| zeros.word(group.saturating_mul(width).saturating_add(at)));
                if stored < 7.0 { stored + 1.0 } else { 0.0 }
            }
            Zeros::Columns { bits, less_one } => {
                let width = self.rows.saturating_mul(usize::from(bits)).div_ceil(32);
                let one = if less_one { ones(bits) } else { 0 };
                let word = |at: usize| zeros.word(group.saturating_mul(width).saturating_add(at)).wrapping_add(one);
                stream(n, bits, word)
            }
            // Offset as the codes are.
            Zeros::Rows { bits } => {
                let stored = stream(n, bits, |at| zeros.word(at.saturating_mul(self.groups).saturating_add(group)));
                stored - f32::from(1u8 << (bits.clamp(1, 8) - 1))
            }
        }
    }

    fn row(&self, n: usize, codes: &[u8], out: &mut [f32]) {
        let mut at = 0;
        while at < out.len() {
            let run = self.run(n, at);
            let end = run.end.min(out.len());
            let (Some(codes), Some(out)) = (codes.get(at..end), out.get_mut(at..end)) else { return };
            if self.values.len() <= 16 && out.len() >= 16 {
                let mut table = [0.0; 16];
                for (slot, value) in table.iter_mut().zip(&self.values) {
                    *slot = self.combine(*value, run);
                }
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = table.get(usize::from(code & 15)).copied().unwrap_or(0.0);
                }
            } else {
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = self.combine(self.value(*code), run);
                }
            }
            at = end;
        }
    }

    #[inline]
    pub(super) fn combine(&self, value: f32, run: Run) -> f32 {
        combine(self.encoding.product, value, run.zero, run.scale)
    }
}

/// The arithmetic of the format's library on one value.
#[inline]
pub(super) fn combine(product: Product, value: f32, zero: f32, scale: f32) -> f32 {
    match product {
        Product::Rounded(to) => round(round(value - zero, to) * scale, to),
        Product::Once(to) => round(value * scale, to),
        Product::Over127 => value * scale * OVER_127,
        Product::Shifted(to) => round(round(value * scale, to) - zero, to),
    }
}

/// Columns of the scales, where zeros are packed beside them.
fn groups(encoding: &Encoding, scales: Option<&Stored>) -> usize {
    match encoding.index {
        Index::Blocks { grid_columns, .. } => grid_columns,
        _ => scales.and_then(|scales| scales.shape.last().copied()).unwrap_or(1),
    }
}

/// 1 in every field of a word; three bits do not divide it and have none.
fn ones(bits: u8) -> u32 {
    match bits {
        2 => 0x5555_5555,
        4 => 0x1111_1111,
        8 => 0x0101_0101,
        _ => 0,
    }
}

/// Field `at` of a stream of bits in words.
fn stream(at: usize, bits: u8, word: impl Fn(usize) -> u32) -> f32 {
    let bits = u32::from(bits);
    let bit = (at as u64).saturating_mul(u64::from(bits));
    let (index, shift) = (usize::try_from(bit / 32).unwrap_or(usize::MAX), (bit % 32) as u32);
    let low = word(index) >> shift;
    let value = if shift + bits > 32 { low | word(index.saturating_add(1)) << (32 - shift) } else { low };
    small(value & mask(bits))
}

fn small(value: u32) -> f32 {
    f32::from(u16::try_from(value).unwrap_or(u16::MAX))
}

/// What each code stands for.
fn table<'p>(values: Values, stored: impl FnOnce() -> Result<Numbers<'p>>) -> Result<Vec<f32>> {
    let bytes = || 0..=u8::MAX;
    Ok(match values {
        Values::Unsigned => bytes().map(f32::from).collect(),
        Values::Signed(4) => (0..16u8).map(|code| f32::from(i16::from(code) - if code > 7 { 16 } else { 0 })).collect(),
        Values::Signed(_) => bytes().map(|code| f32::from(i8::from_le_bytes([code]))).collect(),
        Values::Offset(bits) => {
            let (count, half) = (1u16 << bits.clamp(1, 8), 1i16 << (bits.clamp(1, 8) - 1));
            (0..count).map(|code| f32::from(i16::try_from(code).unwrap_or(0) - half)).collect()
        }
        Values::E2M1 => values::E2M1.to_vec(),
        Values::E2M1OneZero => values::E2M1_ONE_ZERO.to_vec(),
        Values::E4M3 => bytes().map(values::e4m3).collect(),
        Values::E5M2 => bytes().map(values::e5m2).collect(),
        Values::Table => {
            let stored = stored()?;
            (0..16).map(|at| stored.get(at)).collect()
        }
    })
}

/// The element type that a float is computed in, by how it is stored.
pub(super) fn float(dtype: StoredType) -> Option<ElementType> {
    dtype.element().filter(|element| matches!(element, ElementType::F16 | ElementType::BF16 | ElementType::F32))
}
