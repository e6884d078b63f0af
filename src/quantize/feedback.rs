//! Rounding that knows what the layer's inputs look like: each column's error is made up for by the columns after it.
//!
//! For a row `w` and its quantised form `q`, the squared error of the layer's output over the calibration inputs is
//! `(w - q) H (w - q)^T` with `H` the mean of `x^T x`. GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate
//! Post-Training Quantization for Generative Pre-trained Transformers", 2022, arXiv:2210.17323) quantises the columns
//! in turn and moves the rest of the row to where the error is least.
//!
//! Here the same is computed without the inverse of `H`. With `H = L^T D L`, `L` unit lower triangular, the error is
//! `sum over k of D[k] (e[k] + sum over i < k of L[k, i] e[i])^2`, `e = w - q`. Its term `k` depends on no later column,
//! so each is made small in turn: column `k` is rounded from `w[k] + sum over i < k of L[k, i] e[i]`.

use std::ops::Range;

use pulp::Simd;
use rayon::prelude::*;

use super::block::{Fit, Grid, Range as Extremes, Rounding};
use super::inputs::Inputs;
use super::lanes::{LANES, Lanes};
use super::product::{WIDTH, add_products};
use super::{Blocks, MOST_LANES, Refused, RowsMut, Scheme, column_weights, gather, pack, row_count};

/// Rows of a matrix that share what is read of the factor.
const ROWS: usize = 4 * LANES;

/// Quantises a row-major matrix for the inputs that it meets. The scales are those of the scheme's algorithm for the
/// columns as they are when their turn comes, weighted by what is left of each column's importance.
///
/// # Errors
/// As [`super::quantize_rows`]; and inputs of another length, or for blocks of another size.
pub fn quantize_with_inputs(values: &[f32], inputs: &Inputs, scheme: &Scheme) -> Result<Blocks, String> {
    let columns = inputs.columns;
    let rows = row_count(values.len(), columns)?;
    if let Some(block) = inputs.block.filter(|block| *block != scheme.block_size) {
        return Err(format!("inputs for blocks of {block}, and not of {}", scheme.block_size));
    }
    let mut importance = vec![0.0; columns];
    for (column, pivot) in inputs.order.iter().zip(&inputs.pivots) {
        importance.iter_mut().skip(*column).take(1).for_each(|slot| *slot = *pivot);
    }
    let weights = column_weights(columns, Some(&importance), scheme)?;
    let mut blocks = Blocks::zeroed(rows, columns, scheme);
    blocks.rows_mut(columns, ROWS, scheme).zip(values.par_chunks(ROWS * columns)).enumerate().try_for_each(
        |(chunk, (out, values))| {
            let rows = Rows { values, inputs, weights: &weights, scheme, grid: Grid::new(scheme, false), out };
            pulp::Arch::new().dispatch(rows).map_err(|refused| refused.explain(chunk * ROWS, scheme))
        },
    )?;
    Ok(blocks)
}

/// Some rows of a matrix, block by block.
struct Rows<'a> {
    values: &'a [f32],
    inputs: &'a Inputs,
    weights: &'a [Lanes],
    scheme: &'a Scheme,
    grid: Grid,
    out: RowsMut<'a>,
}

/// Sixteen rows side by side: an element for each column, filled up to whole panels.
struct Group {
    /// Its first row among those of the tile.
    first: usize,
    /// Rows that are there; the others are zeros.
    rows: usize,
    values: Vec<Lanes>,
    /// What is to be rounded, as far as the errors before it are known.
    targets: Vec<Lanes>,
    errors: Vec<Lanes>,
}

impl Group {
    fn new(first: usize, values: &[f32], order: &[usize]) -> Self {
        let columns = order.len();
        let mut sides = vec![[0.0; LANES]; columns.next_multiple_of(WIDTH)];
        for (lane, row) in values.chunks(columns).enumerate() {
            for (side, column) in sides.iter_mut().zip(order) {
                let value = row.get(*column).copied().unwrap_or(0.0);
                side.iter_mut().skip(lane).take(1).for_each(|slot| *slot = value);
            }
        }
        let errors = vec![[0.0; LANES]; sides.len()];
        Self { first, rows: values.len() / columns, targets: sides.clone(), values: sides, errors }
    }

    /// Adds what the errors of the columns `from..to` make of the columns of a panel.
    #[inline(always)]
    fn feed<S: Simd>(&mut self, simd: S, panel: &[[f32; WIDTH]], at: usize, from: usize, to: usize) {
        let (errors, factors) = (self.errors.get(from..to), panel.get(from..to));
        let targets = self.targets.get_mut(at..).and_then(|targets| targets.first_chunk_mut::<WIDTH>());
        if let (Some(errors), Some(factors), Some(targets)) = (errors, factors, targets) {
            add_products(simd, errors, factors, targets);
        }
    }

    /// One row's targets from `start`, as a block; `order` says where each stands in the block that starts at `first`.
    #[inline(always)]
    fn row(&self, lane: usize, start: usize, order: &[usize], first: usize, block: &mut [f32; MOST]) {
        for (column, lanes) in order.iter().zip(self.targets.get(start..).unwrap_or_default()) {
            if let (Some(slot), Some(value)) = (block.get_mut(column - first), lanes.get(lane)) {
                *slot = *value;
            }
        }
    }
}

/// Columns of the largest block.
const MOST: usize = LANES * MOST_LANES;

impl pulp::WithSimd for Rows<'_> {
    type Output = Result<(), Refused>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) -> Self::Output {
        let (columns, size) = (self.inputs.columns, self.scheme.block_size);
        for (row, values) in self.values.chunks(columns).enumerate() {
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Refused::value(values).at(row));
            }
        }
        let groups = self.values.chunks(LANES * columns).enumerate();
        let mut groups: Vec<Group> =
            groups.map(|(i, values)| Group::new(i * LANES, values, &self.inputs.order)).collect();
        for start in (0..columns).step_by(size) {
            let end = columns.min(start + size);
            for at in (start..end).step_by(WIDTH) {
                // A panel stays in the cache for all groups.
                let panel = self.inputs.panel(at / WIDTH);
                for group in &mut groups {
                    group.feed(simd, panel, at, 0, start);
                }
            }
            for group in &mut groups {
                self.block(simd, start..end, group)?;
            }
        }
        Ok(())
    }
}

impl Rows<'_> {
    /// Quantises one block of sixteen rows, whose targets lack but the errors made in this block.
    #[inline(always)]
    fn block<S: Simd>(
        &mut self,
        simd: S,
        Range { start, end }: Range<usize>,
        group: &mut Group,
    ) -> Result<(), Refused> {
        let (size, grid) = (self.scheme.block_size, self.grid);
        // Its columns, of which the first one's multiple of the block's size says which block it is.
        let order = self.inputs.order.get(start..end).unwrap_or_default();
        let index = order.first().copied().unwrap_or(start) / size;
        let (first, lanes) = (index * size, size / LANES);
        let weights = self.weights.get(index * lanes..(index + 1) * lanes).unwrap_or_default();
        let (mut row, mut padded) = ([0.0; MOST], [[0.0; LANES]; MOST_LANES]);
        let mut fits = [Fit { scale: 0.0, zero: grid.middle }; LANES];
        for (lane, fit) in fits.iter_mut().enumerate().take(group.rows) {
            group.row(lane, start, order, first, &mut row);
            let values = row.get(..end - start).unwrap_or_default();
            let block = gather(values, &mut padded, size);
            let Some(range) = Extremes::of(block) else {
                return Err(Refused::value(values).behind(first).at(group.first + lane));
            };
            *fit = grid.fit(simd, block, weights, range);
            if !fit.scale.is_finite() {
                return Err(Refused::Scale { row: group.first + lane, column: first });
            }
        }
        let rounding = Rounding::new(&grid, &fits);
        for at in (start..end).step_by(WIDTH) {
            let panel = self.inputs.panel(at / WIDTH);
            group.feed(simd, panel, at, start, at);
            for (column, factors) in (at..end.min(at + WIDTH)).zip(panel.get(at..).unwrap_or_default()) {
                let (target, value) = (group.targets.get(column), group.values.get(column));
                let Some((target, value)) = target.zip(value) else { continue };
                let error = rounding.error(*target, value);
                let later = group.targets.get_mut(column + 1..).unwrap_or_default();
                for (target, factor) in later.iter_mut().zip(factors.iter().skip(column + 1 - at)) {
                    target.iter_mut().zip(&error).for_each(|(target, error)| *target += error * factor);
                }
                group.errors.iter_mut().skip(column).take(1).for_each(|slot| *slot = error);
            }
        }
        for (lane, fit) in fits.iter().enumerate().take(group.rows) {
            group.row(lane, start, order, first, &mut row);
            let block = gather(row.get(..end - start).unwrap_or_default(), &mut padded, size);
            self.store(group.first + lane, index, block, *fit);
        }
        Ok(())
    }

    #[inline(always)]
    fn store(&mut self, row: usize, index: usize, block: &[Lanes], fit: Fit) {
        let (columns, bytes) = (self.inputs.columns, self.scheme.block_bytes());
        let place = row * self.scheme.blocks(columns) + index;
        let data = self.out.data.get_mut(place * bytes..(place + 1) * bytes).unwrap_or_default();
        pack::store(block, &self.grid, fit, data);
        if let Some(scale) = self.out.scales.get_mut(place) {
            *scale = fit.scale;
        }
        let zeros = self.out.zeros.get_mut(row * self.scheme.row_zero_bytes(columns)..).unwrap_or_default();
        pack::set(zeros, index, self.scheme.bits, fit.zero);
    }
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
pub(super) mod tests {
    use super::super::inputs::{DAMPING, PANEL};
    use super::super::{Algorithm, dequantize_rows, quantize_rows};
    use super::*;

    /// Uniform between -1 and 1, the same in every run.
    pub(in super::super) fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            f32::from(u16::try_from(state >> 48).expect("16 bits")) / 32768.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// The mean of `x^T x` of inputs whose neighbours go together, some larger than others.
    fn moments(columns: usize) -> Vec<f32> {
        let mut sums = vec![0.0; columns * columns];
        for sample in 0..4 * columns {
            let raw = noise(columns + 3, sample as u64);
            let size = |column: usize| if column.is_multiple_of(7) { 3.0 } else { 1.0 };
            let x: Vec<f32> = (0..columns).map(|c| size(c) * raw[c..c + 4].iter().sum::<f32>()).collect();
            for (sums, a) in sums.chunks_mut(columns).zip(&x) {
                sums.iter_mut().zip(&x).for_each(|(sum, b)| *sum += a * b / (4 * columns) as f32);
            }
        }
        sums
    }

    /// `sum over rows of (w - q) H (w - q)^T`.
    fn output_error(values: &[f32], found: &[f32], moments: &[f32], columns: usize) -> f64 {
        let rows = values.chunks(columns).zip(found.chunks(columns));
        rows.map(|(values, found)| {
            let errors: Vec<f64> = values.iter().zip(found).map(|(a, b)| f64::from(a - b)).collect();
            let of = |row: &[f32]| row.iter().zip(&errors).map(|(h, e)| f64::from(*h) * e).sum::<f64>();
            moments.chunks(columns).zip(&errors).map(|(row, error)| of(row) * error).sum::<f64>()
        })
        .sum()
    }

    /// The mean of `x^T x` as one writes it.
    pub(in super::super) fn moments_of(inputs: &[f32], columns: usize) -> Vec<f64> {
        let mut sums = vec![0.0; columns * columns];
        for x in inputs.chunks(columns) {
            for (sums, a) in sums.chunks_mut(columns).zip(x) {
                sums.iter_mut().zip(x).for_each(|(sum, b)| *sum += f64::from(*a) * f64::from(*b));
            }
        }
        let count = (inputs.len() / columns) as f64;
        sums.into_iter().map(|sum| sum / count).collect()
    }

    /// With the damping of [`Inputs::new`].
    fn damped(moments: &[f32], columns: usize) -> Vec<f64> {
        let mut matrix: Vec<f64> = moments.iter().map(|x| f64::from(*x)).collect();
        let mean = (0..columns).map(|i| matrix[i * columns + i]).sum::<f64>() / columns as f64;
        (0..columns).for_each(|i| matrix[i * columns + i] += mean * f64::from(DAMPING));
        matrix
    }

    #[test]
    fn the_factors_make_the_matrix() {
        // more than one panel, and a short one
        let columns = 2 * PANEL + 9;
        let moments = moments(columns);
        let inputs = Inputs::new(moments.clone(), columns).expect("factors");
        let entry = |row: usize, column: usize| match row.cmp(&column) {
            std::cmp::Ordering::Less => 0.0,
            std::cmp::Ordering::Equal => 1.0,
            std::cmp::Ordering::Greater => f64::from(inputs.panel(row / WIDTH)[column][row % WIDTH]),
        };
        for (at, wanted) in damped(&moments, columns).into_iter().enumerate() {
            let (i, j) = (at / columns, at % columns);
            let pivots = inputs.pivots.iter().enumerate();
            let found: f64 = pivots.map(|(k, pivot)| entry(k, i) * f64::from(*pivot) * entry(k, j)).sum();
            assert!((found - wanted).abs() < 1e-4, "{i}, {j}: {found}, not {wanted}");
        }
    }

    /// The paper's algorithm as it is written there, with the inverse, for scales that are given.
    fn textbook(row: &[f32], moments: &[f32], scales: &[f32], size: usize) -> Vec<f64> {
        let columns = row.len();
        let mut inverse = invert(damped(moments, columns), columns);
        let mut row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        let mut found = Vec::new();
        for k in 0..columns {
            let scale = f64::from(scales[k / size]);
            let q = (row[k] / scale).round_ties_even().clamp(-8.0, 7.0) * scale;
            let error = (row[k] - q) / inverse[k * columns + k];
            found.push(q);
            for later in k..columns {
                row[later] -= error * inverse[k * columns + later];
            }
            // the column leaves: Gaussian elimination of its row and column
            for i in k + 1..columns {
                let factor = inverse[i * columns + k] / inverse[k * columns + k];
                for j in k + 1..columns {
                    inverse[i * columns + j] -= factor * inverse[k * columns + j];
                }
            }
        }
        found
    }

    /// Gauss-Jordan, without pivoting: the matrix is positive definite.
    fn invert(mut matrix: Vec<f64>, columns: usize) -> Vec<f64> {
        let mut inverse = vec![0.0; columns * columns];
        (0..columns).for_each(|i| inverse[i * columns + i] = 1.0);
        for k in 0..columns {
            let pivot = matrix[k * columns + k];
            for j in 0..columns {
                matrix[k * columns + j] /= pivot;
                inverse[k * columns + j] /= pivot;
            }
            for i in (0..columns).filter(|i| *i != k) {
                let factor = matrix[i * columns + k];
                for j in 0..columns {
                    matrix[i * columns + j] -= factor * matrix[k * columns + j];
                    inverse[i * columns + j] -= factor * inverse[k * columns + j];
                }
            }
        }
        inverse
    }

    #[test]
    fn rows_that_are_embeddings_stay_closer_to_themselves() {
        let columns = 96;
        let moments = moments(columns);
        let values = noise(32 * columns, 9);
        let scheme = Scheme::new(4, true, 32, Algorithm::Search).expect("a scheme");
        let errors = |tied: bool| {
            let inputs = Inputs::ordered(&moments, columns, 32, tied).expect("factors");
            let blocks = quantize_with_inputs(&values, &inputs, &scheme).expect("quantises");
            let found = dequantize_rows(&blocks, columns, &scheme).expect("dequantises");
            let own: f32 = values.iter().zip(&found).map(|(a, b)| (a - b) * (a - b)).sum();
            (own, output_error(&values, &found, &moments, columns))
        };
        let ((own, product), (tied_own, tied_product)) = (errors(false), errors(true));
        assert!(tied_own < 0.9 * own, "{tied_own}, without it {own}");
        assert!(product < tied_product && tied_product < 3.0 * product, "{tied_product}, without it {product}");
    }

    #[test]
    fn it_is_the_papers_algorithm() {
        let columns = 75;
        let moments = moments(columns);
        let values = noise(11 * columns, 5);
        let scheme = Scheme::new(4, true, 32, Algorithm::Nearest).expect("a scheme");
        let (plain, ordered) = (Inputs::new(moments.clone(), columns), Inputs::ordered(&moments, columns, 32, false));
        let (plain, ordered) = (plain.expect("factors"), ordered.expect("factors"));
        assert_eq!(plain.order, (0..columns).collect::<Vec<_>>());
        let blocks: Vec<Vec<usize>> =
            ordered.order.chunks(32).map(|block| block.iter().map(|c| c / 32).collect()).collect();
        assert!(blocks.iter().all(|block| block.iter().all(|of| *of == block[0])), "blocks stay together");
        assert_ne!(ordered.order, plain.order);
        for inputs in [plain, ordered] {
            let blocks = quantize_with_inputs(&values, &inputs, &scheme).expect("quantises");
            let found = dequantize_rows(&blocks, columns, &scheme).expect("dequantises");
            let in_order = |row: &[f32]| -> Vec<f32> { inputs.order.iter().map(|column| row[*column]).collect() };
            let moments: Vec<f32> =
                inputs.order.iter().flat_map(|i| in_order(&moments[i * columns..][..columns])).collect();
            let rows = values.chunks(columns).zip(found.chunks(columns)).zip(blocks.scales.chunks(3));
            for ((row, found), scales) in rows {
                let scales: Vec<f32> = inputs.order.iter().step_by(32).map(|column| scales[column / 32]).collect();
                for (a, b) in in_order(found).iter().zip(textbook(&in_order(row), &moments, &scales, 32)) {
                    assert!((f64::from(*a) - b).abs() < 1e-5, "{a}, not {b}");
                }
            }
        }
    }

    #[test]
    fn outputs_are_closer_than_by_searching() {
        let columns = 200;
        let moments = moments(columns);
        let diagonal: Vec<f32> = moments.iter().step_by(columns + 1).copied().collect();
        let values = noise(20 * columns, 9);
        let inputs = Inputs::new(moments.clone(), columns).expect("factors");
        for (bits, symmetric) in [(2, true), (2, false), (4, true), (4, false), (8, true), (8, false)] {
            let scheme = Scheme::new(bits, symmetric, 64, Algorithm::Search).expect("a scheme");
            let error = |blocks: Result<Blocks, String>| {
                let found = dequantize_rows(&blocks.expect("quantises"), columns, &scheme).expect("dequantises");
                output_error(&values, &found, &moments, columns)
            };
            let searched = error(quantize_rows(&values, columns, Some(&diagonal), &scheme));
            let fed_back = error(quantize_with_inputs(&values, &inputs, &scheme));
            assert!(fed_back < 0.6 * searched, "{scheme}: {fed_back} after {searched}");
        }
    }

    #[test]
    fn unrelated_inputs_leave_nothing_to_make_up_for() {
        let (columns, values) = (100, noise(9 * 100, 3));
        let mut moments = vec![0.0; columns * columns];
        moments.iter_mut().step_by(columns + 1).for_each(|value| *value = 2.0);
        for moments in [moments, vec![0.0; columns * columns]] {
            let inputs = Inputs::new(moments, columns).expect("factors");
            for symmetric in [true, false] {
                let scheme = Scheme::new(4, symmetric, 32, Algorithm::Search).expect("a scheme");
                let found = quantize_with_inputs(&values, &inputs, &scheme);
                assert_eq!(found, quantize_rows(&values, columns, None, &scheme), "{scheme}");
            }
        }
    }

    #[test]
    fn inputs_that_are_no_second_moments_are_refused() {
        assert!(Inputs::new(vec![1.0; 5], 2).is_err());
        assert!(Inputs::new(Vec::new(), 0).is_err());
        assert!(Inputs::new(vec![1.0, 0.0, 0.0, -1.0], 2).is_err());
        assert!(Inputs::new(vec![1.0, f32::NAN, 0.0, 1.0], 2).is_err());
        let inputs = Inputs::new(vec![1.0, 0.5, 0.5, 1.0], 2).expect("factors");
        let scheme = Scheme::new(4, true, 16, Algorithm::Search).expect("a scheme");
        let refused = quantize_with_inputs(&[0.0, 1.0, 2.0, f32::NAN], &inputs, &scheme).expect_err("refused");
        assert!(refused.contains("row 1, column 1"), "{refused}");
        assert!(quantize_with_inputs(&[0.0; 3], &inputs, &scheme).is_err());
        let other = Inputs::ordered(&[1.0, 0.5, 0.5, 1.0], 2, 32, false).expect("factors");
        let refused = quantize_with_inputs(&[0.0; 2], &other, &scheme).expect_err("another size of blocks");
        assert!(refused.contains("32"), "{refused}");
    }
}
