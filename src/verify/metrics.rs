//! How far two sets of logits are from each other.

use serde::Serialize;

use crate::session::Floats;

/// Logits by row and position; positions that a graph left out are absent.
#[derive(Debug, Clone)]
pub struct Logits {
    /// Number of columns of a row.
    pub columns: usize,
    /// Each position's logits, row by row.
    pub positions: Vec<Option<Vec<f32>>>,
}

impl Logits {
    /// A table without any logits.
    pub fn absent(rows: usize, columns: usize) -> Self {
        Self { columns, positions: vec![None; rows * columns] }
    }

    /// All positions of a tensor `[rows, columns, vocabulary]`.
    pub fn from_tensor(tensor: &Floats) -> Self {
        let [_, columns, vocabulary] = *tensor.shape.as_slice() else { return Self::absent(0, 0) };
        let positions = tensor.data.chunks_exact(vocabulary.max(1)).map(|p| Some(p.to_vec())).collect();
        Self { columns, positions }
    }

    /// Enters what a run over the columns `from..from + new` returned: all of them, or the last ones.
    pub fn enter(&mut self, tensor: &Floats, from: usize, new: usize) {
        let (returned, vocabulary) = match *tensor.shape.as_slice() {
            [_, positions, vocabulary] => (positions, vocabulary),
            [_, vocabulary] => (1, vocabulary),
            _ => return,
        };
        if returned == 0 || vocabulary == 0 {
            return;
        }
        let first = from + new.saturating_sub(returned);
        for (k, values) in tensor.data.chunks_exact(vocabulary).enumerate() {
            let (row, column) = (k / returned, first + k % returned);
            if let Some(place) = self.positions.get_mut(row * self.columns + column) {
                *place = Some(values.to_vec());
            }
        }
    }

    /// One position's logits.
    pub fn at(&self, row: usize, column: usize) -> Option<&[f32]> {
        self.positions.get(row * self.columns + column)?.as_deref()
    }
}

/// The differences over some positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    /// Positions that were compared.
    pub positions: usize,
    /// Largest absolute difference, relative to the largest reference logit.
    pub max: f64,
    /// Mean absolute difference, likewise.
    pub mean: f64,
    /// Mean Kullback-Leibler divergence of the model's distribution from the reference's, in nats.
    pub kl_mean: f64,
    /// The largest one.
    pub kl_max: f64,
    /// Share of positions where both put the same token first.
    pub top1: f64,
    /// Norm of the difference by that of the reference's logits, both without their means, which change no probability.
    pub error: f64,
    /// Median of that over the positions, each by itself: what single positions that are far off do not move.
    pub typical: f64,
    /// Mean of [`information`] over the reference's positions.
    pub information: f64,
}

/// Compares pairs of (model's, reference's) logits; `None` when there are none.
pub fn compare<'a>(pairs: impl Iterator<Item = (&'a [f32], &'a [f32])>) -> Option<Comparison> {
    let (mut count, mut values) = (0_u32, 0.0_f64);
    let (mut max, mut sum, mut largest) = (0.0_f64, 0.0_f64, 0.0_f64);
    let (mut kl_sum, mut kl_max, mut same) = (0.0_f64, 0.0_f64, 0_u32);
    let (mut energy, mut known, mut each) = (Energy::default(), 0.0, Vec::new());
    for (got, want) in pairs {
        // A graph may pad its vocabulary; entries that the reference has not are not compared.
        for (g, w) in got.iter().zip(want) {
            let difference = f64::from((g - w).abs());
            // `max` would drop a NaN, which must count as the worst there is.
            max = if difference.is_nan() || difference > max { difference } else { max };
            sum += difference;
            largest = largest.max(f64::from(w.abs()));
            values += 1.0;
        }
        if got.len() < want.len() {
            max = f64::NAN;
        }
        let kl = divergence(want, got);
        kl_sum += kl;
        kl_max = if kl.is_nan() || kl > kl_max { kl } else { kl_max };
        same += u32::from(argmax(got.get(..want.len()).unwrap_or(got)) == argmax(want));
        let own = Energy::of(want, got);
        each.push(own.error());
        energy += own;
        known += information(want);
        count += 1;
    }
    if count == 0 {
        return None;
    }
    let scale = if largest > 0.0 { largest } else { 1.0 };
    Some(Comparison {
        positions: count as usize,
        max: max / scale,
        mean: sum / values.max(1.0) / scale,
        kl_mean: kl_sum / f64::from(count),
        kl_max,
        top1: f64::from(same) / f64::from(count),
        error: energy.error(),
        typical: median(each),
        information: known / f64::from(count),
    })
}

/// The middle number, the upper one of an even count; NaN counts as the largest.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

/// True where both are the same infinity, as in the logits of tokens that a model excludes: there is no difference.
pub(super) fn both_exclude(want: f32, got: f32) -> bool {
    want.is_infinite() && got.is_infinite() && want.is_sign_negative() == got.is_sign_negative()
}

/// Squared norms, each of values without their mean.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Energy {
    /// Of the reference.
    pub(super) reference: f64,
    /// Of the difference from it.
    pub(super) difference: f64,
}

impl Energy {
    /// The energies of one position's logits.
    pub(super) fn of(want: &[f32], got: &[f32]) -> Self {
        let (mut count, mut values, mut differences) = (0.0_f64, (0.0_f64, 0.0_f64), (0.0_f64, 0.0_f64));
        for (w, g) in want.iter().zip(got).filter(|(w, g)| !both_exclude(**w, **g)) {
            let (w, d) = (f64::from(*w), f64::from(*g) - f64::from(*w));
            values = (values.0 + w, values.1 + w * w);
            differences = (differences.0 + d, differences.1 + d * d);
            count += 1.0;
        }
        let without_mean = |(sum, squares): (f64, f64)| {
            let rest = squares - sum * sum / f64::max(count, 1.0);
            // Rounding may leave a tiny negative number; NaN stays.
            if rest < 0.0 { 0.0 } else { rest }
        };
        Self { reference: without_mean(values), difference: without_mean(differences) }
    }

    /// Norm of the difference by that of the reference; 0 where both are 0.
    pub(super) fn error(&self) -> f64 {
        if self.difference == 0.0 { 0.0 } else { (self.difference / self.reference).sqrt() }
    }
}

impl std::ops::AddAssign for Energy {
    fn add_assign(&mut self, other: Self) {
        self.reference += other.reference;
        self.difference += other.difference;
    }
}

/// Kullback-Leibler divergence KL(softmax(want) || softmax(got)) in nats.
pub(super) fn divergence(want: &[f32], got: &[f32]) -> f64 {
    let got = got.get(..want.len()).unwrap_or(got);
    let (normal_want, normal_got) = (log_sum_exp(want), log_sum_exp(got));
    let terms = want.iter().zip(got).map(|(w, g)| {
        let log_want = f64::from(*w) - normal_want;
        let probability = log_want.exp();
        // The limit, where a difference of infinities would be no number.
        if probability == 0.0 { 0.0 } else { probability * (log_want - (f64::from(*g) - normal_got)) }
    });
    // Rounding may leave a tiny negative number; NaN stays.
    let sum: f64 = terms.sum();
    if sum < 0.0 { 0.0 } else { sum }
}

/// What a distribution says: by how many nats its entropy lies below that of a uniform choice.
pub(super) fn information(logits: &[f32]) -> f64 {
    let normal = log_sum_exp(logits);
    let terms = logits.iter().map(|logit| {
        let log = f64::from(*logit) - normal;
        if log == f64::NEG_INFINITY { 0.0 } else { log.exp() * log }
    });
    terms.sum::<f64>() + f64::from(u32::try_from(logits.len()).unwrap_or(u32::MAX)).ln()
}

/// log(sum(exp(x))).
pub fn log_sum_exp(values: &[f32]) -> f64 {
    let largest = f64::from(values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if !largest.is_finite() {
        return largest;
    }
    values.iter().map(|v| (f64::from(*v) - largest).exp()).sum::<f64>().ln() + largest
}

/// Index of the first largest value.
pub fn argmax(values: &[f32]) -> usize {
    let better = |best: (usize, f32), (i, v): (usize, &f32)| if *v > best.1 { (i, *v) } else { best };
    values.iter().enumerate().fold((0, f32::NEG_INFINITY), better).0
}

/// Largest absolute difference; NaN where a value is, or where the sizes differ.
pub fn largest_difference(got: &[f32], want: &[f32]) -> f64 {
    if got.len() != want.len() {
        return f64::NAN;
    }
    let differences = got.iter().zip(want).map(|(g, w)| f64::from((g - w).abs()));
    differences.fold(0.0, |most, d| if most.is_nan() || d <= most { most } else { d })
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    #[test]
    fn differences_are_relative_to_the_largest_reference_logit() {
        let (got, want) = ([1.0_f32, 2.0, -4.2], [1.0_f32, 2.1, -4.0]);
        let c = compare([(&got[..], &want[..])].into_iter()).unwrap();
        assert_relative_eq!(c.max, 0.2 / 4.0, epsilon = 1e-6);
        assert_relative_eq!(c.mean, 0.3 / 3.0 / 4.0, epsilon = 1e-6);
        assert_relative_eq!(c.top1, 1.0);
        assert_eq!(c.positions, 1);
    }

    #[test]
    fn divergence_is_that_of_the_definition() {
        // p = (1/2, 1/2), q = (3/4, 1/4): KL(p || q) = ln(2/sqrt(3)).
        let (got, want) = ([3.0_f32.ln(), 0.0], [5.0_f32, 5.0]);
        assert_relative_eq!(divergence(&want, &got), (2.0 / 3.0_f64.sqrt()).ln(), epsilon = 1e-6);
        assert_relative_eq!(divergence(&want, &want), 0.0);
    }

    #[test]
    fn nan_is_never_close_and_a_padded_vocabulary_is_cut() {
        let c = compare([(&[f32::NAN, 1.0][..], &[0.0_f32, 1.0][..])].into_iter()).unwrap();
        assert!(c.max.is_nan() && c.kl_max.is_nan());
        let c = compare([(&[0.0_f32, 1.0, 99.0][..], &[0.0_f32, 1.0][..])].into_iter()).unwrap();
        assert_relative_eq!(c.max, 0.0);
        assert_relative_eq!(c.top1, 1.0);
        assert!(compare(std::iter::empty()).is_none());
    }

    #[test]
    fn a_single_position_that_is_far_off_moves_the_error_and_not_the_typical_one() {
        let (want, near, far) = ([1.0_f32, -1.0], [1.01_f32, -1.01], [3.0_f32, -3.0]);
        let c = compare([near, far, near].iter().map(|got| (&got[..], &want[..]))).unwrap();
        assert_relative_eq!(c.typical, 0.01, epsilon = 1e-6);
        assert_relative_eq!(c.error, ((2.0 * 1e-4 + 4.0) / 3.0_f64).sqrt(), epsilon = 1e-6);
        assert_relative_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), 3.0);
        assert!(median(vec![1.0, f64::NAN]).is_nan());
    }

    #[test]
    fn pieces_are_entered_where_they_belong() {
        let mut table = Logits::absent(2, 4);
        let piece = |positions: usize, values: &[f32]| Floats { shape: vec![2, positions, 1], data: values.to_vec() };
        table.enter(&piece(2, &[1.0, 2.0, 3.0, 4.0]), 0, 2);
        // Only the last position of a piece of two columns.
        table.enter(&piece(1, &[5.0, 6.0]), 2, 2);
        assert_eq!(table.at(0, 1), Some(&[2.0_f32][..]));
        assert_eq!(table.at(1, 0), Some(&[3.0_f32][..]));
        assert_eq!(table.at(0, 2), None);
        assert_eq!(table.at(1, 3), Some(&[6.0_f32][..]));
    }
}
