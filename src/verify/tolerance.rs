//! What a float build may be off by.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Options;
use super::metrics::Comparison;
use super::report::Verdict;
use crate::element::ElementType;
use crate::golden::{Finding, HalfError, Halves};

/// How many times the reference's own error a build that computes in a half type may be off by: it rounds elsewhere than
/// the reference, as often.
const COMPUTED: f64 = 2.0;
/// The same for a build that only stores matrices in it. They are the reference's to the last bit, but for those that are
/// rounded after something was folded into them: the golden cases come to 1.05 times its error at most.
const ROUNDED: f64 = 1.1;

/// The largest difference that is no error, relative to the largest reference logit, where the golden says no better.
///
/// Correct float32 graphs agree to about 1e-6. float16 rounds to 5e-4, bfloat16, of three bits less, to 4e-3.
pub fn tolerance(element: ElementType) -> f64 {
    match element {
        ElementType::F16 => 2e-3,
        ElementType::BF16 => 1.6e-2,
        _ => 1e-4,
    }
}

/// Where a bar comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// The element type's [`tolerance`], or one that the caller gave.
    Fixed,
    /// The reference's own error, computing in the type.
    Computed,
    /// The reference's own error, its matrices rounded to the type.
    Rounded,
}

impl Basis {
    /// The bar in words, for a build in a type.
    pub(super) fn words(self, element: ElementType) -> String {
        match self {
            Self::Fixed => "a fixed difference".into(),
            Self::Computed => format!("{COMPUTED} times what the reference in {element} is off by"),
            Self::Rounded => format!("{ROUNDED} times what rounding matrices to {element} puts the reference off by"),
        }
    }
}

/// What one scenario may be off by, in the numbers of a [`Comparison`].
///
/// Which token's router chooses another expert in half precision is chance, and one that does takes that position far
/// off. So what single positions decide, `max` and `error`, is derived from the worst of the reference's scenarios,
/// which run the same tokens; `typical` from the same scenario.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Allowed {
    /// Where it comes from.
    pub basis: Basis,
    /// Largest difference, relative to the largest reference logit.
    pub max: f64,
    /// Largest error of all logits, relative to their norm.
    pub error: Option<f64>,
    /// Largest error of the median position's logits.
    pub typical: Option<f64>,
}

impl Allowed {
    /// A largest difference alone.
    pub(super) fn fixed(max: f64) -> Self {
        Self { basis: Basis::Fixed, max, error: None, typical: None }
    }

    /// What a report shows beside an outcome: the fixed one stands above all of them.
    pub(super) fn if_derived(self) -> Option<Self> {
        (self.basis != Basis::Fixed).then_some(self)
    }

    fn derived(basis: Basis, own: &HalfError) -> Self {
        // Float32 rounds as well, which is all that is left where a checkpoint is in the type.
        let float = tolerance(ElementType::F32);
        let bar = |error: f64| match basis {
            Basis::Rounded => ROUNDED * error + float,
            Basis::Computed | Basis::Fixed => (COMPUTED * error).max(float),
        };
        Self { basis, max: bar(own.max), error: Some(bar(own.error)), typical: Some(bar(own.typical)) }
    }

    /// Whether the numbers are within it; NaN is not.
    pub fn admits(&self, comparison: &Comparison) -> bool {
        let within = |number: f64, most: Option<f64>| most.is_none_or(|most| number <= most);
        comparison.max <= self.max && within(comparison.error, self.error) && within(comparison.typical, self.typical)
    }

    pub(super) fn verdict(&self, comparison: Option<&Comparison>) -> Verdict {
        match comparison {
            None => Verdict::NotCompared,
            Some(comparison) if self.admits(comparison) => Verdict::Holds,
            Some(_) => Verdict::Fails,
        }
    }
}

/// The bars of a verification's scenarios.
#[derive(Debug)]
pub(super) struct Bars<'g> {
    fixed: f64,
    derived: Option<(Basis, &'g BTreeMap<String, Finding>)>,
}

impl<'g> Bars<'g> {
    /// Those of a build whose weights are in `element`, and whose graph computes in it or, where not, in float32.
    pub(super) fn of(halves: &'g Halves, element: ElementType, computes: bool, options: &Options) -> Self {
        let errors = halves.of(element).filter(|_| options.tolerance.is_none());
        let derived =
            errors.map(
                |errors| {
                    if computes { (Basis::Computed, &errors.computed) } else { (Basis::Rounded, &errors.rounded) }
                },
            );
        Self { fixed: options.tolerance(element), derived }
    }

    /// A scenario's bar, and why it is not the one of its kind that it could be.
    pub(super) fn of_scenario(&self, name: &str) -> (Allowed, Option<String>) {
        let fixed = Allowed::fixed(self.fixed);
        let Some((basis, findings)) = self.derived else { return (fixed, None) };
        match findings.get(name) {
            Some(Finding::Error(own)) => {
                let worst = findings.values().fold(*own, |worst, finding| match finding {
                    Finding::Error(e) => {
                        HalfError { max: worst.max.max(e.max), error: worst.error.max(e.error), ..worst }
                    }
                    Finding::None(_) => worst,
                });
                (Allowed::derived(basis, &worst), None)
            }
            Some(Finding::None(reason)) => (fixed, Some(format!("the reference itself gives no bar: {reason}"))),
            None => (fixed, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::HalfErrors;

    fn comparison(max: f64, error: f64, typical: f64) -> Comparison {
        let (kl_mean, kl_max, mean) = (0.0, 0.0, 0.0);
        Comparison { positions: 24, max, mean, kl_mean, kl_max, top1: 1.0, error, typical, information: 4.0 }
    }

    #[test]
    fn twice_the_references_own_error_is_allowed_and_no_more() {
        let allowed = Allowed::derived(Basis::Computed, &HalfError { max: 2e-3, error: 1e-3, typical: 8e-4 });
        assert!(allowed.admits(&comparison(4e-3, 2e-3, 1.6e-3)));
        for beyond in [(4.1e-3, 2e-3, 1.6e-3), (4e-3, 2.1e-3, 1.6e-3), (4e-3, 2e-3, 1.7e-3)] {
            assert!(!allowed.admits(&comparison(beyond.0, beyond.1, beyond.2)), "{beyond:?}");
        }
        for wrong in [(f64::NAN, 0.0, 0.0), (0.0, f64::NAN, 0.0), (0.0, 0.0, f64::NAN)] {
            assert!(!allowed.admits(&comparison(wrong.0, wrong.1, wrong.2)));
        }
        assert_eq!(allowed.verdict(None), Verdict::NotCompared);
        // A checkpoint that is in the type already: float32's own rounding stays.
        let nothing = Allowed::derived(Basis::Rounded, &HalfError { max: 0.0, error: 0.0, typical: 0.0 });
        assert!(nothing.admits(&comparison(1e-5, 1e-5, 1e-5)) && !nothing.admits(&comparison(2e-4, 1e-5, 1e-5)));
    }

    #[test]
    fn a_bar_is_of_its_scenario_its_type_and_what_the_graph_computes_in() {
        let own = |max: f64| Finding::Error(HalfError { max, error: max, typical: max });
        let errors = HalfErrors {
            computed: BTreeMap::from([
                ("prefill".into(), own(3e-3)),
                ("greedy".into(), own(4e-3)),
                ("decode".into(), Finding::None("inf".into())),
            ]),
            rounded: BTreeMap::from([("prefill".into(), own(1e-3))]),
        };
        let halves = Halves { float16: Some(errors), bfloat16: None };
        let of = |element, computes, tolerance| {
            let options = Options { tolerance, ..Options::default() };
            Bars::of(&halves, element, computes, &options).of_scenario("prefill").0
        };
        let computed = of(ElementType::F16, true, None);
        assert_eq!((computed.basis, computed.max, computed.typical), (Basis::Computed, 8e-3, Some(6e-3)));
        assert!((of(ElementType::F16, false, None).max - 1.2e-3).abs() < 1e-9);
        assert_eq!(of(ElementType::F16, true, Some(0.1)), Allowed::fixed(0.1));
        assert_eq!(of(ElementType::BF16, true, None), Allowed::fixed(1.6e-2));
        assert_eq!(of(ElementType::F32, false, None), Allowed::fixed(1e-4));
        let bars = Bars::of(&halves, ElementType::F16, true, &Options::default());
        let (allowed, note) = bars.of_scenario("decode");
        assert!(allowed == Allowed::fixed(2e-3) && note.unwrap().contains("inf"));
        assert_eq!(bars.of_scenario("chunks"), (Allowed::fixed(2e-3), None));
    }
}
