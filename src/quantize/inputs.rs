//! What a layer's inputs look like, factored as `L^T D L` for the rounding that makes up for errors
//! ([`super::feedback`]).

use pulp::Simd;
use rayon::prelude::*;

use super::product::WIDTH;

/// What a layer's inputs look like: the mean of `x^T x` over them, factored. Layers with the same input share one.
#[derive(Debug, Clone)]
pub struct Inputs {
    pub(super) columns: usize,
    /// The columns in the order in which they are rounded.
    pub(super) order: Vec<usize>,
    /// The size of the blocks that the order keeps together, if it is not that of the columns.
    pub(super) block: Option<usize>,
    /// `L` in panels of [`WIDTH`] of its rows side by side, each up to its diagonal; there and beyond it are zeros.
    factor: Vec<[f32; WIDTH]>,
    /// `D`.
    pub(super) pivots: Vec<f32>,
}

/// Part of the mean diagonal that is added to the diagonal, as in the paper: inputs that were rarely seen at work
/// are not trusted to be idle, and the matrix becomes positive definite.
pub(super) const DAMPING: f32 = 0.01;
/// The same where rows of the matrix are embeddings too. There an error costs by its own size, whatever the inputs of
/// the product are; with inputs of no direction that would be as much as what it does to the product.
const TIED: f32 = 1.0;
/// Rows that are eliminated together: they stay in the cache while the others pass by.
pub(super) const PANEL: usize = 64;

impl Inputs {
    /// Factors the mean of `x^T x`, `[columns, columns]`, of which the lower triangle is read, for columns that are
    /// rounded from the first to the last. Takes `columns^3 / 3` multiplications and additions.
    ///
    /// # Errors
    /// Another length, a value that is not finite, or a negative one on the diagonal.
    pub fn new(second_moments: Vec<f32>, columns: usize) -> Result<Self, String> {
        check(&second_moments, columns)?;
        Ok(Self::factored(second_moments, (0..columns).collect(), None, DAMPING))
    }

    /// The same for blocks of one size: those with the largest inputs come first, and in each the columns with the
    /// largest ones, so that what matters most is rounded while there are still columns to make up for it. `tied` says
    /// that the rows of the matrix are embeddings too.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn ordered(second_moments: &[f32], columns: usize, block_size: usize, tied: bool) -> Result<Self, String> {
        check(second_moments, columns)?;
        let entry = |row: usize, column: usize| {
            let (low, high) = (row.min(column), row.max(column));
            second_moments.get(high * columns + low).copied().unwrap_or(0.0)
        };
        let mut blocks: Vec<Vec<usize>> = Vec::new();
        for start in (0..columns).step_by(block_size.max(1)) {
            let mut block: Vec<usize> = (start..columns.min(start + block_size)).collect();
            block.sort_by(|a, b| entry(*b, *b).total_cmp(&entry(*a, *a)));
            blocks.push(block);
        }
        let short = blocks.pop_if(|block| block.len() < block_size);
        let size = |block: &Vec<usize>| block.iter().map(|column| entry(*column, *column)).sum::<f32>();
        blocks.sort_by(|a, b| size(b).total_cmp(&size(a)));
        blocks.extend(short);
        let order = blocks.concat();
        let mut moments = vec![0.0; columns * columns];
        moments.par_chunks_mut(columns).zip(&order).enumerate().for_each(|(at, (slots, row))| {
            for (slot, column) in slots.iter_mut().zip(&order).take(at + 1) {
                *slot = entry(*row, *column);
            }
        });
        Ok(Self::factored(moments, order, Some(block_size), if tied { TIED } else { DAMPING }))
    }

    /// The factors of second moments that stand in the order of rounding.
    fn factored(mut factor: Vec<f32>, order: Vec<usize>, block: Option<usize>, part: f32) -> Self {
        let columns = order.len();
        #[expect(clippy::cast_precision_loss, reason = "a mean")]
        let mean = factor.iter().step_by(columns + 1).sum::<f32>() / columns as f32;
        // Without any input all columns cost the same.
        let damping = if mean > 0.0 { mean * part } else { 1.0 };
        factor.iter_mut().step_by(columns + 1).for_each(|value| *value += damping);
        let pivots = eliminate(&mut factor, columns, damping);
        Self { columns, order, block, factor: panels(&factor, columns), pivots }
    }

    /// Length of an input.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// A panel: for each column before its end, the elements of its rows.
    #[inline(always)]
    pub(super) fn panel(&self, index: usize) -> &[[f32; WIDTH]] {
        let start = WIDTH * index * (index + 1) / 2;
        self.factor.get(start..start + WIDTH * (index + 1)).unwrap_or_default()
    }
}

fn check(second_moments: &[f32], columns: usize) -> Result<(), String> {
    if columns == 0 || second_moments.len() != columns * columns {
        return Err(format!("{} second moments, not {columns} x {columns}", second_moments.len()));
    }
    if let Some(at) = second_moments.iter().position(|value| !value.is_finite()) {
        return Err(format!("the second moment of columns {} and {} is not finite", at / columns, at % columns));
    }
    match second_moments.iter().step_by(columns + 1).position(|value| *value < 0.0) {
        Some(column) => Err(format!("the second moment of column {column} is negative")),
        None => Ok(()),
    }
}

/// The strict lower triangle of a matrix in panels.
fn panels(matrix: &[f32], columns: usize) -> Vec<[f32; WIDTH]> {
    let count = columns.div_ceil(WIDTH);
    let mut packed = vec![[0.0; WIDTH]; WIDTH * count * (count + 1) / 2];
    let mut rest = packed.as_mut_slice();
    for (index, rows) in matrix.chunks(WIDTH * columns).enumerate() {
        let Some((panel, after)) = rest.split_at_mut_checked(WIDTH * (index + 1)) else { break };
        for (offset, row) in rows.chunks(columns).enumerate() {
            for (slots, value) in panel.iter_mut().zip(row).take(WIDTH * index + offset) {
                slots.iter_mut().skip(offset).take(1).for_each(|slot| *slot = *value);
            }
        }
        rest = after;
    }
    packed
}

/// Turns the lower triangle of a positive definite matrix into `L` and returns `D`, from the last row to the first.
/// No pivot is below `least`, the smallest eigenvalue, but for rounding.
fn eliminate(matrix: &mut [f32], columns: usize, least: f32) -> Vec<f32> {
    let mut pivots = vec![0.0; columns];
    let mut end = columns;
    while end > 0 {
        let start = end.saturating_sub(PANEL);
        let (before, rest) = matrix.split_at_mut(start * columns);
        let panel = rest.get_mut(..(end - start) * columns).unwrap_or_default();
        let panel_pivots = pivots.get_mut(start..end).unwrap_or_default();
        for last in (0..end - start).rev() {
            let (others, row) = panel.split_at_mut(last * columns);
            let (length, row) = (start + last, row.get(..columns).unwrap_or_default());
            let pivot = row.get(length).copied().unwrap_or(least).max(least);
            if let Some(slot) = panel_pivots.get_mut(last) {
                *slot = pivot;
            }
            for (index, other) in others.chunks_mut(columns).enumerate() {
                pulp::Arch::new().dispatch(Subtract { row: other, index: start + index, rows: row, pivots: &[pivot] });
            }
        }
        let (panel, panel_pivots) = (&*panel, &*panel_pivots);
        before.par_chunks_mut(columns).enumerate().for_each(|(index, row)| {
            pulp::Arch::new().dispatch(Subtract { row, index, rows: panel, pivots: panel_pivots });
        });
        end = start;
    }
    matrix
        .par_chunks_mut(columns)
        .zip(&pivots)
        .for_each(|(row, pivot)| row.iter_mut().for_each(|value| *value /= pivot));
    pivots
}

/// Takes the eliminated rows from a row before them, up to its diagonal.
struct Subtract<'a> {
    row: &'a mut [f32],
    /// Which row it is.
    index: usize,
    rows: &'a [f32],
    pivots: &'a [f32],
}

impl pulp::WithSimd for Subtract<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let columns = self.row.len();
        let Some(row) = self.row.get_mut(..=self.index) else { return };
        for (other, pivot) in self.rows.chunks(columns).zip(self.pivots).rev() {
            let factor = other.get(self.index).copied().unwrap_or(0.0) / pivot;
            let other = other.get(..row.len()).unwrap_or_default();
            let ((values, rest), (others, others_rest)) = (S::as_mut_simd_f32s(row), S::as_simd_f32s(other));
            let factors = simd.splat_f32s(factor);
            for (value, other) in values.iter_mut().zip(others) {
                *value = simd.sub_f32s(*value, simd.mul_f32s(factors, *other));
            }
            for (value, other) in rest.iter_mut().zip(others_rest) {
                *value -= factor * other;
            }
        }
    }
}
