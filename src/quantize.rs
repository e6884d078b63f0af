//! Quantisation of weight matrices: floats to small integers with a scale for each block of a row.
//!
//! Pure arithmetic, in the layout that `com.microsoft.MatMulNBits`, `GatherBlockQuantized` and `QMoE` read:
//! a matrix `[rows, columns]` (a linear layer's `[out, in]`, as checkpoints store it) is cut along its rows into blocks
//! of consecutive columns; the last one may be short. A weight is `(integer - zero point) * scale` in float32.
//!
//! Scales may be negative: the operators only multiply by them, and a symmetric grid has one integer more below its
//! zero point than above, which is worth having on the side of the larger extreme.
//!
//! Results do not depend on the machine or on the number of threads: every sum has one order, and no instruction
//! set fuses a multiplication with an addition.
#![expect(clippy::inline_always, reason = "only what is inlined is compiled for each instruction set")]

use std::fmt;

use pulp::Simd;
use rayon::prelude::*;

use self::block::{Grid, Range};
use self::lanes::{LANES, Lanes};

pub use self::feedback::quantize_with_inputs;
pub use self::inputs::Inputs;
pub use self::moments::Moments;

mod block;
mod feedback;
mod inputs;
mod lanes;
mod moments;
mod pack;
mod product;

/// How the scale, and the zero point where there is one, of a block is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// The smallest grid that holds the block: its largest magnitude, or its smallest and largest value.
    Nearest,
    /// The grid of the least weighted squared error, among the plain one, others around it, and what least squares
    /// make of them. Never worse than [`Algorithm::Nearest`] by that measure.
    Search,
    /// None: integers, scales and zero points are those that a quantised checkpoint holds.
    Stored,
}

/// What the zero points of stored integers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroPoints {
    /// `2^(bits - 1)` throughout, and not stored.
    Implicit,
    /// Integers of as many bits.
    Integers,
    /// Floats of the type of the scales.
    Floats,
}

/// How scales are stored. The integers are chosen for the scale that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleType {
    /// 32 bits.
    Float32,
    /// IEEE half precision.
    Float16,
    /// bfloat16.
    BFloat16,
}

/// A way to write matrices as integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    bits: u8,
    symmetric: bool,
    float_zeros: bool,
    block_size: usize,
    algorithm: Algorithm,
    scales: ScaleType,
}

impl Scheme {
    /// A scheme of 2, 4 or 8 bits and blocks of 16, 32, 64, 128 or 256 columns. A symmetric one stores no zero points:
    /// they are `2^(bits - 1)`.
    ///
    /// # Errors
    /// Any other number of bits, or any other block size.
    pub fn new(bits: u8, symmetric: bool, block_size: usize, algorithm: Algorithm) -> Result<Self, String> {
        if !matches!(bits, 2 | 4 | 8) {
            return Err(format!("{bits} bits: 2, 4 or 8 can be written"));
        }
        if !matches!(block_size, 16 | 32 | 64 | 128 | 256) {
            return Err(format!("blocks of {block_size}: 16, 32, 64, 128 or 256 can be written"));
        }
        Ok(Self { bits, symmetric, float_zeros: false, block_size, algorithm, scales: ScaleType::Float32 })
    }

    /// How a checkpoint stores a matrix already.
    ///
    /// # Errors
    /// As [`Self::new`]: what can not be written.
    pub fn stored(bits: u8, block_size: usize, zeros: ZeroPoints, scales: ScaleType) -> Result<Self, String> {
        let scheme = Self::new(bits, zeros == ZeroPoints::Implicit, block_size, Algorithm::Stored)?;
        Ok(Self { float_zeros: zeros == ZeroPoints::Floats, scales, ..scheme })
    }

    /// The same with scales stored in another type.
    #[must_use]
    pub fn with_scales(self, scales: ScaleType) -> Self {
        Self { scales, ..self }
    }

    /// The same with another algorithm.
    #[must_use]
    pub fn with_algorithm(self, algorithm: Algorithm) -> Self {
        Self { algorithm, ..self }
    }

    /// The same without zero points.
    #[must_use]
    pub fn symmetric(self) -> Self {
        Self { symmetric: true, float_zeros: false, ..self }
    }

    /// The same in the largest blocks, of its own size or less, that suit; none if none do. What a checkpoint stores keeps
    /// its blocks.
    #[must_use]
    pub fn in_blocks_that(self, suit: impl Fn(&Self) -> bool) -> Option<Self> {
        let smaller = |scheme: &Self| {
            let divisible = scheme.block_size > LANES && scheme.algorithm != Algorithm::Stored;
            divisible.then_some(Self { block_size: scheme.block_size / 2, ..*scheme })
        };
        std::iter::successors(Some(self), smaller).find(suit)
    }

    /// Bits of a weight.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// True where no zero points are stored.
    pub fn is_symmetric(&self) -> bool {
        self.symmetric
    }

    /// True where zero points are floats, one for each scale.
    pub fn has_float_zeros(&self) -> bool {
        self.float_zeros
    }

    /// Columns of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// How scales and zero points are found.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// How scales are stored.
    pub fn scales(&self) -> ScaleType {
        self.scales
    }

    /// Blocks of a row.
    pub fn blocks(&self, columns: usize) -> usize {
        columns.div_ceil(self.block_size)
    }

    /// Bytes of a row of integers, the last block whole.
    pub fn row_bytes(&self, columns: usize) -> usize {
        self.blocks(columns) * self.block_bytes()
    }

    /// Bytes of a row of zero points; none where they are implicit.
    pub fn row_zero_bytes(&self, columns: usize) -> usize {
        if self.symmetric { 0 } else { (self.blocks(columns) * usize::from(self.bits)).div_ceil(8) }
    }

    fn block_bytes(&self) -> usize {
        self.block_size * usize::from(self.bits) / 8
    }
}

impl fmt::Display for Scheme {
    /// `int4 symmetric, blocks of 32`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let symmetry = match (self.symmetric, self.float_zeros) {
            (true, _) => "symmetric",
            (false, false) => "asymmetric",
            (false, true) => "with float zero points",
        };
        write!(f, "int{} {symmetry}, blocks of {}", self.bits, self.block_size)
    }
}

impl ScaleType {
    /// The nearest value of this type, ties to even; infinite where there is none.
    ///
    /// The same as `half` rounds, but without branches: a search rounds sixteen scales a block.
    #[inline(always)]
    fn round(self, x: f32) -> f32 {
        let bits = x.to_bits();
        match self {
            Self::Float32 => x,
            Self::BFloat16 => f32::from_bits((bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) & 0xffff_0000),
            Self::Float16 => {
                let normal = f32::from_bits((bits.wrapping_add(0xfff + ((bits >> 13) & 1))) & !0x1fff);
                // Below 2^-14 the spacing is 2^-24, which is that of float32 between 0.5 and 1.
                let small = (x.abs() + 0.5) - 0.5;
                let rounded = if x.abs() < 6.103_515_6e-5 { small.copysign(x) } else { normal };
                if rounded.abs() > 65504.0 { f32::INFINITY.copysign(x) } else { rounded }
            }
        }
    }
}

impl fmt::Display for ScaleType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::BFloat16 => "bfloat16",
        })
    }
}

/// A quantised matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    /// Integers, `[rows, blocks, block_size * bits / 8]`: the lowest bits hold the first column, and a short last block
    /// ends with its zero point.
    pub data: Vec<u8>,
    /// `[rows, blocks]`, values of the scheme's type of scales.
    pub scales: Vec<f32>,
    /// `[rows, ceil(blocks * bits / 8)]`, packed as the integers are; none in a symmetric scheme.
    pub zero_points: Option<Vec<u8>>,
}

/// Quantises a row-major matrix of `columns` columns.
///
/// `importance` says what an error in each column costs: the mean square of the activation that the column is
/// multiplied with, which makes the weighted squared error that of the layer's output for uncorrelated inputs. Only
/// its ratios within a block count. Without it, columns cost the same. [`Algorithm::Nearest`] has no use for it.
///
/// # Errors
/// A value that is not finite or beyond 2^126 (by row and column), a scale that its type can not hold, and
/// lengths that do not fit.
pub fn quantize_rows(
    values: &[f32],
    columns: usize,
    importance: Option<&[f32]>,
    scheme: &Scheme,
) -> Result<Blocks, String> {
    if scheme.algorithm == Algorithm::Stored {
        return Err("the integers of a checkpoint are not found anew".to_owned());
    }
    let rows = row_count(values.len(), columns)?;
    let weights = column_weights(columns, importance, scheme)?;
    let grid = Grid::new(scheme, importance.is_none());
    let mut blocks = Blocks::zeroed(rows, columns, scheme);
    // Some 64 Ki values at a time: enough for a core to be worth its while.
    let step = ((1 << 16) / columns).clamp(1, rows.max(1));
    blocks.rows_mut(columns, step, scheme).zip(values.par_chunks(step * columns)).enumerate().try_for_each(
        |(chunk, (out, values))| {
            let job = Job { values, columns, weights: &weights, scheme, grid, out };
            lanes::by_eight(job).map_err(|refused| refused.explain(chunk * step, scheme))
        },
    )?;
    Ok(blocks)
}

/// The weights that the operators compute with: `(integer - zero point) * scale`, row-major without the padding.
///
/// # Errors
/// Lengths that do not fit a matrix of that many columns.
pub fn dequantize_rows(blocks: &Blocks, columns: usize, scheme: &Scheme) -> Result<Vec<f32>, String> {
    let (count, bits) = (scheme.blocks(columns), scheme.bits);
    let rows = row_count(blocks.scales.len(), count)?;
    let zeros = blocks.zero_points.as_deref().unwrap_or_default();
    let expected = (rows * scheme.row_bytes(columns), rows * scheme.row_zero_bytes(columns));
    if (blocks.data.len(), zeros.len()) != expected {
        return Err(format!(
            "{} bytes of integers and {} of zero points, not {expected:?}",
            blocks.data.len(),
            zeros.len()
        ));
    }
    let mut values = vec![0.0; rows * columns];
    let (data, scales) = (blocks.data.chunks(scheme.row_bytes(columns)), blocks.scales.chunks(count));
    for (row, ((out, data), scales)) in values.chunks_mut(columns).zip(data).zip(scales).enumerate() {
        let zeros = zeros.get(row * scheme.row_zero_bytes(columns)..).unwrap_or_default();
        let parts = out.chunks_mut(scheme.block_size).zip(data.chunks(scheme.block_bytes())).zip(scales);
        for (block, ((out, data), scale)) in parts.enumerate() {
            let zero = if scheme.symmetric { 1 << (bits - 1) } else { pack::get(zeros, block, bits) };
            for (index, value) in out.iter_mut().enumerate() {
                *value = (f32::from(pack::get(data, index, bits)) - f32::from(zero)) * scale;
            }
        }
    }
    Ok(values)
}

/// Packs integers that a checkpoint stores already: `codes`, row-major, one a byte, and a scale and a zero point for
/// each block. Float zero points are not packed, they are as they came.
///
/// # Errors
/// An integer or an integer zero point that the scheme's bits do not hold, and lengths that do not fit.
pub fn pack_rows(
    codes: &[u8],
    scales: Vec<f32>,
    zeros: &[f32],
    columns: usize,
    scheme: &Scheme,
) -> Result<Blocks, String> {
    let rows = row_count(codes.len(), columns)?;
    let (count, bits) = (scheme.blocks(columns), scheme.bits);
    if (scales.len(), zeros.len()) != (rows * count, rows * count) {
        return Err(format!(
            "{} scales and {} zero points for {rows} rows of {count} blocks",
            scales.len(),
            zeros.len()
        ));
    }
    let top = u8::MAX >> (8 - bits);
    if let Some(odd) = codes.iter().find(|code| **code > top) {
        return Err(format!("the integer {odd}, which {bits} bits do not hold"));
    }
    let held = |zero: &f32| match (scheme.symmetric, scheme.float_zeros) {
        (_, true) => zero.is_finite(),
        (true, _) => zero.to_bits() == f32::from(1u8 << (bits - 1)).to_bits(),
        _ => (0.0..=f32::from(top)).contains(zero) && zero.fract() == 0.0,
    };
    if let Some(odd) = zeros.iter().find(|zero| !held(zero)) {
        return Err(format!("the zero point {odd}, which a scheme of {scheme} does not hold"));
    }
    let mut blocks = Blocks::zeroed(rows, columns, scheme);
    let zero_bytes = scheme.row_zero_bytes(columns);
    for (row, (codes, data)) in codes.chunks(columns).zip(blocks.data.chunks_mut(scheme.row_bytes(columns))).enumerate()
    {
        for (index, code) in codes.iter().enumerate() {
            pack::set(data, index, bits, f32::from(*code));
        }
        let zeros = zeros.get(row * count..(row + 1) * count).unwrap_or_default();
        // A short last block ends with its zero point.
        let last = zeros.last().copied().filter(|_| !scheme.float_zeros).unwrap_or(0.0);
        for index in columns..count * scheme.block_size {
            pack::set(data, index, bits, last);
        }
        if let Some(packed) = blocks.zero_points.as_deref_mut().filter(|_| !scheme.float_zeros) {
            let packed = packed.get_mut(row * zero_bytes..(row + 1) * zero_bytes).unwrap_or_default();
            for (index, zero) in zeros.iter().enumerate() {
                pack::set(packed, index, bits, *zero);
            }
        }
    }
    Ok(Blocks { scales, ..blocks })
}

/// Which value can not be written.
#[derive(Debug, Clone, Copy)]
enum Refused {
    /// The value itself.
    Value { row: usize, column: usize, value: f32 },
    /// The scale of the block that starts here.
    Scale { row: usize, column: usize },
}

impl Refused {
    fn explain(self, first_row: usize, scheme: &Scheme) -> String {
        match self {
            Self::Value { row, column, value } => {
                format!("row {}, column {column} holds {value}, which can not be quantised", first_row + row)
            }
            Self::Scale { row, column } => format!(
                "the block at row {}, column {column} needs a scale that {} can not hold",
                first_row + row,
                scheme.scales
            ),
        }
    }
}

/// Rows to quantise, and where they go.
struct Job<'a> {
    values: &'a [f32],
    columns: usize,
    weights: &'a [Lanes],
    scheme: &'a Scheme,
    grid: Grid,
    out: RowsMut<'a>,
}

/// Where their blocks go.
struct RowsMut<'a> {
    data: &'a mut [u8],
    scales: &'a mut [f32],
    zeros: &'a mut [u8],
}

impl Blocks {
    fn zeroed(rows: usize, columns: usize, scheme: &Scheme) -> Self {
        let zeros = (!scheme.symmetric).then(|| vec![0; rows * scheme.row_zero_bytes(columns)]);
        Self {
            data: vec![0; rows * scheme.row_bytes(columns)],
            scales: vec![0.0; rows * scheme.blocks(columns)],
            zero_points: zeros,
        }
    }

    /// Every `step` rows.
    fn rows_mut<'a>(
        &'a mut self,
        columns: usize,
        step: usize,
        scheme: &Scheme,
    ) -> impl IndexedParallelIterator<Item = RowsMut<'a>> {
        let count = self.scales.len().div_ceil(step * scheme.blocks(columns));
        let zeros = self.zero_points.as_deref_mut().unwrap_or_default();
        let zero_bytes = step * scheme.row_zero_bytes(columns);
        // A symmetric matrix has nothing to cut, but as many pieces.
        let mut pieces: Vec<&mut [u8]> = zeros.chunks_mut(zero_bytes.max(1)).collect();
        pieces.resize_with(count, Default::default);
        let data = self.data.par_chunks_mut(step * scheme.row_bytes(columns));
        let scales = self.scales.par_chunks_mut(step * scheme.blocks(columns));
        data.zip(scales).zip(pieces).map(|((data, scales), zeros)| RowsMut { data, scales, zeros })
    }
}

/// Compiled once for each instruction set; they only differ in speed.
impl pulp::WithSimd for Job<'_> {
    type Output = Result<(), Refused>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let (grid, columns, scheme) = (self.grid, self.columns, self.scheme);
        let data = self.out.data.chunks_mut(scheme.row_bytes(columns));
        let scales = self.out.scales.chunks_mut(scheme.blocks(columns));
        let mut zeros = self.out.zeros.chunks_mut(scheme.row_zero_bytes(columns).max(1));
        for (row, ((values, data), scales)) in self.values.chunks(columns).zip(data).zip(scales).enumerate() {
            let mut out = RowsMut { data, scales, zeros: zeros.next().unwrap_or_default() };
            quantize_row(simd, values, self.weights, scheme, &grid, &mut out).map_err(|refused| refused.at(row))?;
        }
        Ok(())
    }
}

#[inline(always)]
fn quantize_row<S: Simd>(
    simd: S,
    values: &[f32],
    weights: &[Lanes],
    scheme: &Scheme,
    grid: &Grid,
    out: &mut RowsMut<'_>,
) -> Result<(), Refused> {
    let size = scheme.block_size;
    let mut padded = [[0.0; LANES]; MOST_LANES];
    let blocks = values.chunks(size).zip(weights.chunks(size / LANES));
    let outs = out.data.chunks_mut(scheme.block_bytes()).zip(out.scales.iter_mut());
    for (index, ((part, weights), (data, scale))) in blocks.zip(outs).enumerate() {
        let block = gather(part, &mut padded, size);
        let Some(range) = Range::of(block) else { return Err(Refused::value(values)) };
        let fit = grid.fit(simd, block, weights, range);
        if !fit.scale.is_finite() {
            return Err(Refused::Scale { row: 0, column: index * size });
        }
        *scale = fit.scale;
        pack::store(block, grid, fit, data);
        pack::set(out.zeros, index, scheme.bits, fit.zero);
    }
    Ok(())
}

impl Refused {
    /// The first value of a row that can not be written.
    #[cold]
    fn value(values: &[f32]) -> Self {
        let odd = values.iter().position(|value| value.is_nan() || value.abs() > block::LARGEST);
        let column = odd.unwrap_or(0);
        Self::Value { row: 0, column, value: values.get(column).copied().unwrap_or(f32::NAN) }
    }

    /// The same behind other columns.
    #[cold]
    fn behind(self, columns: usize) -> Self {
        match self {
            Self::Value { row, column, value } => Self::Value { row, column: columns + column, value },
            Self::Scale { row, column } => Self::Scale { row, column: columns + column },
        }
    }

    #[cold]
    fn at(self, row: usize) -> Self {
        match self {
            Self::Value { column, value, .. } => Self::Value { row, column, value },
            Self::Scale { column, .. } => Self::Scale { row, column },
        }
    }
}

/// Lanes of the largest block.
const MOST_LANES: usize = 256 / LANES;

/// A block as lanes, filled up with zeros.
#[inline(always)]
fn gather<'a>(values: &[f32], padded: &'a mut [Lanes; MOST_LANES], size: usize) -> &'a [Lanes] {
    let (whole, rest) = values.as_chunks::<LANES>();
    let used = padded.get_mut(..size / LANES).unwrap_or_default();
    for (lanes, chunk) in used.iter_mut().zip(whole) {
        *lanes = *chunk;
    }
    if values.len() < size {
        for lanes in used.iter_mut().skip(whole.len()) {
            *lanes = [0.0; LANES];
        }
        if let Some(lanes) = used.get_mut(whole.len()) {
            lanes.iter_mut().zip(rest).for_each(|(lane, value)| *lane = *value);
        }
    }
    used
}

fn row_count(length: usize, columns: usize) -> Result<usize, String> {
    match length.checked_div(columns) {
        Some(rows) if rows * columns == length => Ok(rows),
        _ => Err(format!("{length} values are not rows of {columns}")),
    }
}

/// What an error in each column costs, relative to the most important column of its block; zeros where a block is short.
fn column_weights(columns: usize, importance: Option<&[f32]>, scheme: &Scheme) -> Result<Vec<Lanes>, String> {
    let ones;
    let importance = if let Some(importance) = importance {
        importance
    } else {
        ones = vec![1.0; columns];
        &ones
    };
    if importance.len() != columns {
        return Err(format!("{} importances for {columns} columns", importance.len()));
    }
    if let Some((column, odd)) = importance.iter().enumerate().find(|(_, x)| !x.is_finite() || **x < 0.0) {
        return Err(format!("column {column} has the importance {odd}"));
    }
    let mut weights = Vec::with_capacity(scheme.blocks(columns) * scheme.block_size / LANES);
    for block in importance.chunks(scheme.block_size) {
        let most = block.iter().copied().fold(0.0, f32::max);
        let mut relative = vec![0.0; scheme.block_size];
        for (relative, importance) in relative.iter_mut().zip(block) {
            // An input that was never seen at work still gets a little: it may be at work elsewhere.
            *relative = if most > 0.0 { (importance / most).max(LEAST) } else { 1.0 };
        }
        weights.extend(relative.as_chunks::<LANES>().0);
    }
    Ok(weights)
}

/// Least weight of a column, relative to the largest of its block.
const LEAST: f32 = 1e-6;

#[cfg(test)]
mod tests;
