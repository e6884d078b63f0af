//! What a layer's inputs look like, added up as they are seen.

use pulp::Simd;
use rayon::prelude::*;

use super::Inputs;
use super::lanes::{LANES, Lanes};
use super::product::{WIDTH, add_products};

/// The sum of `x^T x` over inputs `x`. The same inputs in the same pieces make the same bits on any number of threads.
#[derive(Debug, Clone)]
pub struct Moments {
    columns: usize,
    inputs: usize,
    /// Row-major; what is far right of the diagonal stays zero.
    sums: Vec<f32>,
}

impl Moments {
    /// No inputs yet, of this length.
    pub fn new(columns: usize) -> Self {
        Self { columns, inputs: 0, sums: vec![0.0; columns * columns] }
    }

    /// Adds inputs `[count, columns]`: `count * columns^2 / 2` multiplications and additions.
    ///
    /// # Errors
    /// Values that are not inputs of this length.
    pub fn add(&mut self, inputs: &[f32]) -> Result<(), String> {
        let columns = self.columns;
        self.inputs += super::row_count(inputs.len(), columns)?;
        let panel = |index: usize| -> Vec<Lanes> {
            let rows = inputs.chunks(columns).map(|row| row.get(index * LANES..).unwrap_or_default());
            rows.map(|row| std::array::from_fn(|lane| row.get(lane).copied().unwrap_or(0.0))).collect()
        };
        let panels: Vec<Vec<Lanes>> = (0..columns.div_ceil(LANES)).into_par_iter().map(panel).collect();
        self.sums.par_chunks_mut(LANES * columns).enumerate().for_each(|(index, sums)| {
            let Some((own, before)) = panels.get(..=index).and_then(<[_]>::split_last) else { return };
            for (half, sums) in sums.chunks_mut(WIDTH * columns).enumerate() {
                let factors = own.iter().filter_map(|lanes| lanes.as_chunks::<WIDTH>().0.get(half)).copied();
                let factors: Vec<[f32; WIDTH]> = factors.collect();
                let panels = before.iter().chain([own]).enumerate();
                for (at, lanes) in panels {
                    let found = pulp::Arch::new().dispatch(Tile { lanes, factors: &factors });
                    for (sums, found) in sums.chunks_mut(columns).zip(found) {
                        let place = sums.get_mut(at * LANES..).unwrap_or_default();
                        place.iter_mut().zip(found).for_each(|(sum, found)| *sum += found);
                    }
                }
            }
        });
        Ok(())
    }

    /// Their mean, factored for blocks of one size; `tied` if the matrix is a table of embeddings too.
    ///
    /// # Errors
    /// No inputs, or some that are not finite.
    pub fn finish(mut self, block_size: usize, tied: bool) -> Result<Inputs, String> {
        if self.inputs == 0 {
            return Err("no inputs were seen".to_owned());
        }
        #[expect(clippy::cast_precision_loss, reason = "a mean")]
        let count = self.inputs as f32;
        self.sums.iter_mut().for_each(|sum| *sum /= count);
        Inputs::ordered(&self.sums, self.columns, block_size, tied)
    }
}

/// Products of [`WIDTH`] columns with sixteen others.
struct Tile<'a> {
    lanes: &'a [Lanes],
    factors: &'a [[f32; WIDTH]],
}

impl pulp::WithSimd for Tile<'_> {
    type Output = [Lanes; WIDTH];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let mut sums = [[0.0; LANES]; WIDTH];
        add_products(simd, self.lanes, self.factors, &mut sums);
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::super::feedback::tests::{moments_of, noise};
    use super::*;

    #[test]
    fn sums_are_those_of_the_products_and_do_not_depend_on_the_threads() {
        // Neither whole panels nor whole pieces.
        let columns = 2 * LANES + 5;
        let inputs = noise(83 * columns, 7);
        let add = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            let mut moments = Moments::new(columns);
            pool.install(|| inputs.chunks(40 * columns).for_each(|part| moments.add(part).expect("inputs")));
            moments
        };
        let (found, again) = (add(1), add(3));
        assert_eq!(found.sums, again.sums);
        let wanted = moments_of(&inputs, columns);
        for (at, (found, wanted)) in found.sums.iter().zip(&wanted).enumerate() {
            let (row, column) = (at / columns, at % columns);
            let found = f64::from(*found) / 83.0;
            assert!(column > row || (found - wanted).abs() < 1e-6, "{row}, {column}: {found}, not {wanted}");
        }
        assert!(found.finish(16, false).is_ok());
    }

    #[test]
    fn what_are_no_inputs() {
        assert!(Moments::new(3).add(&[1.0; 4]).is_err());
        assert!(Moments::new(3).finish(16, false).is_err());
        let mut odd = Moments::new(2);
        odd.add(&[1.0, f32::NAN]).expect("they have the length");
        assert!(odd.finish(16, false).is_err());
    }
}
