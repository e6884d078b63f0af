//! Choosing the next token.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::verify::metrics::argmax;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only this many of the likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities add up to this; 1 is all.
    pub top_p: f32,
    /// Lowers the logits of tokens that occurred; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Where the random numbers start.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Chooses tokens, one after the other.
#[derive(Debug)]
pub struct Sampler {
    settings: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// A sampler that starts at the seed.
    pub fn new(settings: Sampling) -> Self {
        Self { settings, random: ChaCha8Rng::seed_from_u64(settings.seed) }
    }

    /// The next token; `seen` is the prompt and all that was generated.
    pub fn next(&mut self, mut logits: Vec<f32>, seen: &[i64]) -> usize {
        penalise(&mut logits, seen, self.settings.repetition_penalty);
        if self.settings.temperature <= 0.0 {
            return argmax(&logits);
        }
        let candidates = self.candidates(&logits);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = self.random.random::<f64>() * total;
        for (token, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        candidates.first().map_or(0, |(token, _)| *token)
    }

    /// The tokens to choose among with their weights, likeliest first: temperature, then top-k, then top-p.
    fn candidates(&self, logits: &[f32]) -> Vec<(usize, f64)> {
        let mut order: Vec<(usize, f32)> = logits.iter().copied().enumerate().filter(|(_, l)| !l.is_nan()).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.settings.top_k > 0 {
            order.truncate(self.settings.top_k);
        }
        let largest = order.first().map_or(0.0, |(_, l)| *l);
        let weight = |l: f32| (f64::from(l - largest) / f64::from(self.settings.temperature)).exp();
        let mut weights: Vec<(usize, f64)> = order.into_iter().map(|(token, l)| (token, weight(l))).collect();
        let enough = weights.iter().map(|(_, w)| w).sum::<f64>() * f64::from(self.settings.top_p);
        let mut sum = 0.0;
        // The token that crosses the border stays, and so does the first whatever the border.
        let keep = weights.iter().take_while(|(_, w)| {
            let before = sum;
            sum += w;
            before < enough
        });
        let keep = keep.count().max(1);
        weights.truncate(keep);
        weights
    }
}

/// Divides the positive logits of tokens that occurred and multiplies the negative ones.
fn penalise(logits: &mut [f32], seen: &[i64], penalty: f32) {
    if (penalty - 1.0).abs() < f32::EPSILON {
        return;
    }
    let mut done = std::collections::HashSet::new();
    for id in seen.iter().filter_map(|id| usize::try_from(*id).ok()) {
        if let Some(logit) = logits.get_mut(id).filter(|_| done.insert(id)) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_k: usize, top_p: f32) -> Sampler {
        Sampler::new(Sampling { temperature, top_k, top_p, ..Sampling::greedy() })
    }

    #[test]
    fn temperature_zero_takes_the_likeliest_and_the_first_of_equals() {
        assert_eq!(sampler(0.0, 0, 1.0).next(vec![0.5, 2.0, 2.0, f32::NAN], &[]), 1);
    }

    #[test]
    fn top_k_and_top_p_cut_where_they_should() {
        let logits: Vec<f32> = [0.5_f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let tokens = |s: &Sampler| s.candidates(&logits).iter().map(|(t, _)| *t).collect::<Vec<_>>();
        assert_eq!(tokens(&sampler(1.0, 0, 1.0)), [0, 1, 2, 3]);
        assert_eq!(tokens(&sampler(1.0, 2, 1.0)), [0, 1]);
        assert_eq!(tokens(&sampler(1.0, 0, 0.7)), [0, 1]);
        assert_eq!(tokens(&sampler(1.0, 0, 0.81)), [0, 1, 2]);
        assert_eq!(tokens(&sampler(1.0, 0, 0.0)), [0]);
        // A low temperature sharpens before top-p looks.
        assert_eq!(tokens(&sampler(0.1, 0, 0.9)), [0]);
    }

    #[test]
    fn shares_follow_the_probabilities_and_the_seed_repeats_them() {
        let logits: Vec<f32> = [0.7_f32, 0.3].iter().map(|p| p.ln()).collect();
        let draw = |seed| {
            let mut s = Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::greedy() });
            (0..2000).map(|_| s.next(logits.clone(), &[])).collect::<Vec<_>>()
        };
        let ones = draw(7).iter().sum::<usize>();
        assert!((540..660).contains(&ones), "{ones}");
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn repetition_is_penalised_once_per_token_whatever_the_sign() {
        let mut logits = vec![2.0, -2.0, 1.0];
        penalise(&mut logits, &[0, 0, 1, 99, -1], 2.0);
        assert_eq!(logits, [1.0, -4.0, 1.0]);
    }
}
