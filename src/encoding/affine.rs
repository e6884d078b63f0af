//! The affine form: integers, scales and zero points of blocks along the inputs, as `MatMulNBits` and `QMoE` take them.

use std::ops::Range;

use super::decode::{OVER_127, Reader, combine};
use super::form::{Index, Layout, Logical, Product, Scales, Values, Zeros};
use super::parts::{Numbers, Parts, Role};
use crate::error::{Code, Error, Result};

/// The largest block that a scale of a whole row is repeated over.
const ROW_BLOCK: usize = 128;

/// That an encoding has an affine form, and which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affine {
    /// Bits of a code: 2, 4 or 8.
    pub bits: u8,
    /// Columns of a block, a power of two of at least 16; the last block may be shorter.
    pub block: usize,
    /// Which kind of zero points it has.
    pub zeros: ZeroKind,
    /// The columns have to be permuted, with [`order`].
    pub ordered: bool,
    /// True where [`AffineRows::value`] is [`super::decode_rows`] to the last bit. False for `LLM.int8`, whose library
    /// multiplies by the scale and by 1 / 127 in turn: folded into one scale, the last bit may differ.
    pub exact: bool,
    /// How the format's library combines code, zero point and scale.
    product: Product,
}

/// What the zero points of an affine form are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroKind {
    /// All 2^(bits - 1), which `MatMulNBits` assumes.
    Middle,
    /// Integers.
    Integers,
    /// Floats.
    Floats,
}

/// Rows of the affine form.
#[derive(Debug, Clone, PartialEq)]
pub struct AffineRows {
    /// One code a byte, unsigned, [rows, K]; permuted where the form is ordered.
    pub codes: Vec<u8>,
    /// [rows, blocks].
    pub scales: Vec<f32>,
    /// [rows, blocks].
    pub zeros: Vec<f32>,
    affine: Affine,
    columns: usize,
}

impl AffineRows {
    /// Blocks of a row.
    pub fn blocks(&self) -> usize {
        self.columns.div_ceil(self.affine.block)
    }

    /// The value of the element in row `n` of these, column `k`, as the format's library computes it; None outside.
    pub fn value(&self, n: usize, k: usize) -> Option<f32> {
        let code = n.checked_mul(self.columns).filter(|_| k < self.columns)?.checked_add(k)?;
        let block = n.checked_mul(self.blocks())?.checked_add(k / self.affine.block)?;
        let (code, zero) = (self.codes.get(code)?, self.zeros.get(block)?);
        let scale = self.scales.get(block)?;
        match self.affine.product {
            Product::Over127 => Some((f32::from(*code) - zero) * scale),
            product => Some(combine(product, f32::from(*code), *zero, *scale)),
        }
    }
}

/// The affine form of a logical tensor, or why it has none.
pub fn affine(logical: &Logical) -> std::result::Result<Affine, String> {
    let encoding = &logical.encoding;
    let columns = logical.columns();
    let bits = code_bits(logical)?;
    if let Some(reason) = inexpressible(logical) {
        return Err(reason.to_owned());
    }
    let whole_row = columns.clamp(16, ROW_BLOCK).next_power_of_two();
    let block = match encoding.index {
        Index::One => whole_row,
        Index::Blocks { columns: block, .. } | Index::Transposed { group: block } if block >= columns => whole_row,
        Index::Blocks { columns: block, .. } | Index::Transposed { group: block } => block,
        Index::Flat { block } if columns.is_multiple_of(block) => block,
        Index::Flat { .. } => return Err("its groups cross the rows".to_owned()),
        Index::Ordered => match logical.part(Role::Scales).and_then(|scales| scales.shape.first()) {
            Some(0 | 1) | None => whole_row,
            Some(groups) => columns.div_ceil(*groups).checked_next_power_of_two().unwrap_or(usize::MAX),
        },
        Index::Cyclic { .. } => return Err("its groups run across the rows (axis 0)".to_owned()),
        Index::Experts { .. } => return Err("its blocks run across the rows".to_owned()),
    };
    if !block.is_power_of_two() || block < 16 {
        return Err(format!("groups of {block}: MatMulNBits takes powers of two from 16 on"));
    }
    let zeros = match (encoding.zeros, encoding.values) {
        (Zeros::None, Values::Unsigned) => ZeroKind::Integers,
        (Zeros::None, _) => ZeroKind::Middle,
        (Zeros::Stored, Values::Unsigned) => ZeroKind::Floats,
        _ => ZeroKind::Integers,
    };
    Ok(Affine {
        bits,
        block,
        zeros,
        ordered: encoding.index == Index::Ordered,
        exact: encoding.product != Product::Over127,
        product: encoding.product,
    })
}

fn code_bits(logical: &Logical) -> std::result::Result<u8, String> {
    let (values, layout) = (logical.encoding.values, logical.encoding.layout);
    let bits = match (values, layout) {
        (Values::Unsigned, Layout::Awq) => 4,
        (Values::Offset(bits) | Values::Signed(bits), _)
        | (Values::Unsigned, Layout::Rows { bits, .. } | Layout::Columns { bits } | Layout::Slices { bits, .. }) => {
            bits
        }
        (Values::Unsigned, Layout::Bytes) => 8,
        _ => return Err("its codes are floats, not integers".to_owned()),
    };
    match bits {
        2 | 4 | 8 => Ok(bits),
        _ => Err(format!("{bits} bits: MatMulNBits on CPU has 2, 4 and 8")),
    }
}

fn inexpressible(logical: &Logical) -> Option<&'static str> {
    let encoding = &logical.encoding;
    if matches!(encoding.product, Product::Shifted(_)) {
        return Some("it subtracts a float shift from the product, for which a zero point would have to be rounded");
    }
    if !matches!(encoding.scales, Scales::Plain) {
        return Some("its scales are computed, not stored");
    }
    None
}

/// Rows of the affine form. `order` is [`order`]'s answer, where the form is ordered.
pub fn affine_rows(
    logical: &Logical,
    parts: &dyn Parts,
    rows: Range<usize>,
    order: Option<&[usize]>,
) -> Result<AffineRows> {
    let affine = affine(logical).map_err(|reason| none(logical, &reason))?;
    let reader = Reader::new(logical, parts, &rows)?;
    let columns = logical.columns();
    let mut codes = vec![0; reader.count(&rows)?];
    reader.codes.fill(&rows, &mut codes);
    // Signed codes are moved up by half their range, and so are their zero points.
    let half = match logical.encoding.values {
        Values::Signed(bits) | Values::Offset(bits) => Some(1u8 << (bits.clamp(1, 8) - 1)),
        _ => None,
    };
    if let (Values::Signed(bits), Some(half)) = (logical.encoding.values, half) {
        let mask = if bits == 4 { 15 } else { 255 };
        for code in &mut codes {
            *code = code.wrapping_add(half) & mask;
        }
    }
    let blocks = columns.div_ceil(affine.block);
    let mut made = AffineRows { codes, scales: Vec::new(), zeros: Vec::new(), affine, columns };
    for n in rows {
        for block in 0..blocks {
            let first = block * affine.block;
            let column = order.map_or(Some(first), |order| order.get(first).copied());
            let run = reader.run(n, column.ok_or_else(|| none(logical, "the order is not of its columns"))?);
            let folded = if affine.exact { run.scale } else { run.scale * OVER_127 };
            made.scales.push(folded);
            made.zeros.push(run.zero + half.map_or(0.0, f32::from));
        }
    }
    if let Some(order) = order {
        permute(&mut made.codes, columns, order);
    }
    Ok(made)
}

fn permute(codes: &mut [u8], columns: usize, order: &[usize]) {
    let mut row = vec![0; columns];
    for codes in codes.chunks_mut(columns.max(1)) {
        for (slot, from) in row.iter_mut().zip(order) {
            *slot = codes.get(*from).copied().unwrap_or(0);
        }
        codes.copy_from_slice(row.get(..codes.len()).unwrap_or_default());
    }
}

/// The permutation that makes the groups of an ordered form contiguous: column j of its codes is column `order[j]` of the
/// weight. An error where a group has not as many columns as a block, so that no permutation does it.
pub fn order(logical: &Logical, parts: &dyn Parts) -> Result<Option<Vec<usize>>> {
    let Some(tensor) = logical.part(Role::Order).filter(|_| logical.encoding.index == Index::Ordered) else {
        return Ok(None);
    };
    let affine = affine(logical).map_err(|reason| none(logical, &reason))?;
    let groups = Numbers::read(parts, tensor)?;
    let mut columns: Vec<usize> = (0..logical.columns()).collect();
    columns.sort_by_key(|column| groups.word(*column));
    let one_group =
        logical.part(Role::Scales).and_then(|scales| scales.shape.first()).is_none_or(|groups| *groups <= 1);
    let mut whole = columns.chunks(affine.block).enumerate();
    let fits = whole.all(|(group, columns)| columns.iter().all(|column| groups.word(*column) as usize == group));
    if !fits && !one_group {
        return Err(none(logical, "its groups have not all as many columns as a block"));
    }
    Ok(Some(columns))
}

fn none(logical: &Logical, reason: &str) -> Error {
    Error::new(Code::QuantizationUnsupported, format!("tensor {}", logical.name))
        .found(format!("{}: {reason}", logical.encoding.format))
        .expected("integers with scales and zero points of blocks")
        .help("decode it to floats")
}
