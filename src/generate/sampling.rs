//! Choosing the next token by its score.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::logits::softmax;
use crate::verify::metrics::argmax;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The likeliest token, always.
    Likeliest,
    /// At random, as likely as the scores have it.
    Drawn {
        /// Where the random numbers start.
        seed: u64,
    },
}

/// Chooses tokens, one after the other.
#[derive(Debug)]
pub(super) struct Chooser(Option<ChaCha8Rng>);

impl Chooser {
    pub(super) fn new(choice: Choice) -> Self {
        Self(match choice {
            Choice::Likeliest => None,
            Choice::Drawn { seed } => Some(ChaCha8Rng::seed_from_u64(seed)),
        })
    }

    /// The next token; none if no score allows any.
    pub(super) fn next(&mut self, scores: &[f32]) -> Option<usize> {
        if !scores.iter().any(|score| *score > f32::NEG_INFINITY) {
            return None;
        }
        let Some(random) = &mut self.0 else { return Some(argmax(scores)) };
        let weights: Vec<f64> = softmax(scores).into_iter().map(f64::from).map(|weight| weight.max(0.0)).collect();
        let mut left = random.random::<f64>() * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a rest behind the last.
        Some(drawn.unwrap_or_else(|| argmax(scores)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_and_the_first_of_equals() {
        let mut likeliest = Chooser::new(Choice::Likeliest);
        assert_eq!(likeliest.next(&[0.5, 2.0, 2.0, f32::NAN]), Some(1));
        assert_eq!(likeliest.next(&[f32::NEG_INFINITY, f32::NEG_INFINITY, -9.0]), Some(2));
        for choice in [Choice::Likeliest, Choice::Drawn { seed: 1 }] {
            assert_eq!(Chooser::new(choice).next(&[f32::NEG_INFINITY, f32::NAN]), None);
        }
    }

    #[test]
    fn shares_follow_the_probabilities_and_the_seed_repeats_them() {
        let scores: Vec<f32> = [0.7_f32, 0.0, 0.3].iter().map(|p| p.ln()).collect();
        let draw = |seed| {
            let mut chooser = Chooser::new(Choice::Drawn { seed });
            (0..2000).map(|_| chooser.next(&scores).unwrap()).collect::<Vec<_>>()
        };
        let drawn = draw(7);
        let last = drawn.iter().filter(|token| **token == 2).count();
        assert!((540..660).contains(&last), "{last}");
        assert!(!drawn.contains(&1), "what has no probability is not drawn");
        assert_eq!(drawn, draw(7));
        assert_ne!(drawn, draw(8));
    }
}
