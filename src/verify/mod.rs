//! Verification: a built model is run in onnxruntime and compared with what the reference computed, or, where there is
//! no reference, with itself run in other ways. A report never claims more than the kind of comparison that was made.

mod bar;
mod consistency;
mod cost;
mod divergence;
mod golden;
mod layers;
pub mod metrics;
mod perplexity;
mod quality;
mod report;
pub mod scenario;
mod tolerance;
mod windows;

use std::path::{Path, PathBuf};

use crate::element::ElementType;
use crate::runtime::Provider;
use crate::session::{self, Decoder};

pub use bar::{Bar, Quantisation};
pub use consistency::consistency;
pub use cost::{Compared, Cost, prompt_windows, size_on_disk};
pub use golden::against_golden;
pub use layers::LayerError;
pub use quality::{Loss, PerplexityChange, Quality, Tally, compare_builds};
pub use report::{Divergence, Greedy, Kind, Outcome, Perplexity, Report, Verdict};
pub use tolerance::{Allowed, Basis, tolerance};
pub use windows::{WINDOW, Window, text_windows};

use metrics::{Comparison, compare};
use scenario::{Continuation, Prompt, Scenario};

/// Tokens that a greedy continuation is checked for.
const GREEDY_TOKENS: usize = 16;

/// How to verify.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Threads for onnxruntime; 0 lets it choose.
    pub threads: usize,
    /// A text whose perplexity is measured too.
    pub text: Option<PathBuf>,
    /// Replaces the tolerance of the model's element type.
    pub tolerance: Option<f64>,
    /// A float build of the same model, which a quantised one is compared with on the text.
    pub reference: Option<PathBuf>,
    /// Replaces the bar of the model's quantisation; a float build is then judged as if it were quantised.
    pub bar: Option<Bar>,
    /// Where onnxruntime runs the model.
    pub provider: Provider,
    /// Options of the provider, by onnxruntime's names.
    pub provider_options: Vec<(String, String)>,
    /// Also says on which provider each node runs.
    pub placement: bool,
    /// Runs with past and present in one buffer, where they may be; see [`session::Options::in_place`].
    pub in_place: bool,
}

impl Options {
    fn session(&self, hidden_states: bool) -> session::Options {
        session::Options {
            threads: self.threads,
            hidden_states,
            provider: self.provider,
            provider_options: self.provider_options.clone(),
            placement: false,
            in_place: self.in_place,
        }
    }

    /// The session that is judged.
    fn judged_session(&self) -> session::Options {
        session::Options { placement: self.placement, ..self.session(false) }
    }

    /// Adds to a report where the nodes of the judged session run, if that is asked for.
    fn place(&self, decoder: &mut Decoder, prompt: &Prompt, report: &mut Report) {
        if !self.placement {
            return;
        }
        match decoder.placement(prompt.ids.data.first().copied().unwrap_or(0)) {
            Ok(placement) => report.placement = Some(placement),
            Err(error) => report.notes.push(format!("on which provider the nodes run is unknown: {error}")),
        }
    }

    fn tolerance(&self, element: ElementType) -> f64 {
        self.tolerance.unwrap_or_else(|| tolerance(element))
    }
}

/// The folder of a directory or of a file in one.
fn folder_of(model: &Path) -> &Path {
    if model.is_dir() { model } else { model.parent().unwrap_or(model) }
}

/// What a model's weights are rounded to: what its directory says, or the narrowest type that its graph shows.
fn element_of(model: &Path, decoder: &Decoder) -> ElementType {
    let manifest = crate::read::json_file(&folder_of(model).join("hf2onnx.json"));
    let dtype =
        manifest.ok().and_then(|manifest| manifest.get("dtype").and_then(serde_json::Value::as_str).map(str::to_owned));
    match dtype.as_deref() {
        Some("f16") => ElementType::F16,
        Some("bf16") => ElementType::BF16,
        _ => decoder.element(),
    }
}

/// The scenarios that a model is held to, and a note where they are not all: a directory that was built for right
/// padding alone promises nothing about rows padded on the left.
fn promised(model: &Path) -> (Vec<Scenario>, Option<String>) {
    let manifest = crate::read::json_file(&folder_of(model).join("hf2onnx.json"));
    let right_only = manifest.is_ok_and(|manifest| manifest.get("padding").is_some_and(|padding| padding == "right"));
    if !right_only {
        return (Scenario::ALL.to_vec(), None);
    }
    let (left, kept): (Vec<Scenario>, Vec<Scenario>) = Scenario::ALL.into_iter().partition(|s| s.pads_left());
    let names: Vec<&str> = left.iter().map(|scenario| scenario.name()).collect();
    (kept, Some(format!("built with --padding right: {} left out", names.join(", "))))
}

/// An outcome from differences alone.
fn judged(scenario: &str, against: &str, comparison: Option<Comparison>, allowed: Allowed) -> Outcome {
    Outcome {
        scenario: scenario.into(),
        against: against.into(),
        comparison,
        allowed: allowed.if_derived(),
        greedy: None,
        verdict: allowed.verdict(comparison.as_ref()),
        note: comparison.is_none().then(|| "no position's logits could be compared".into()),
    }
}

/// An outcome for a scenario that did not run.
fn failed(scenario: &str, against: &str, error: &crate::error::Error) -> Outcome {
    Outcome {
        scenario: scenario.into(),
        against: against.into(),
        comparison: None,
        allowed: None,
        greedy: None,
        verdict: Verdict::Fails,
        note: Some(error.to_string()),
    }
}

/// Judges a greedy continuation: the tokens exactly, but in half precision two logits closer than what
/// is allowed may change places.
fn judge_greedy(
    name: &str,
    against: &str,
    got: &Continuation,
    want_ids: &[i64],
    want_logits: &[Vec<f32>],
    element: ElementType,
    allowed: Allowed,
) -> Outcome {
    let of = got.ids.len().min(want_ids.len());
    let matched = got.ids.iter().zip(want_ids).take(of).take_while(|(g, w)| g == w).count();
    // The step of the first difference still has the same tokens before it; the steps behind it only where they were given.
    let same = if got.given { of } else { (matched + 1).min(of) };
    let pairs = got.logits.iter().zip(want_logits).take(same);
    let comparison = compare(pairs.map(|(g, w)| (g.as_slice(), w.as_slice())));
    let differ = |step: &usize| got.ids.get(*step) != want_ids.get(*step);
    let margins = (matched..same).filter(differ).map(|step| margin(got, want_ids, want_logits, step));
    // The widest; unknown where one is.
    let margin = margins.reduce(|a, b| Some(a?.max(b?))).flatten();
    let close = comparison.is_none_or(|c| allowed.admits(&c));
    let half = matches!(element, ElementType::F16 | ElementType::BF16);
    let tie = half && margin.is_some_and(|m| m < allowed.max);
    let (verdict, note) = match (matched == of, close, tie) {
        (_, false, _) => (Verdict::Fails, None),
        (true, true, _) => (Verdict::Holds, None),
        (false, true, true) => (
            Verdict::NearTie,
            margin.map(|m| format!("token {matched} is a near tie: the two logits are {m:.1e} apart")),
        ),
        (false, true, false) => (
            Verdict::Fails,
            margin.map(|m| format!("token {matched} differs; the reference's two logits are {m:.1e} apart")),
        ),
    };
    let greedy = Some(Greedy { matched, of, margin });
    let allowed = allowed.if_derived();
    Outcome { scenario: name.into(), against: against.into(), comparison, allowed, greedy, verdict, note }
}

/// How much higher the reference puts its own token than the model's at a step, relative to the largest logit.
fn margin(got: &Continuation, want_ids: &[i64], want_logits: &[Vec<f32>], step: usize) -> Option<f64> {
    let logits = want_logits.get(step)?;
    let of = |id: &i64| logits.get(usize::try_from(*id).ok()?).copied().map(f64::from);
    let largest = want_logits.iter().flatten().fold(0.0_f32, |m, l| m.max(l.abs()));
    Some((of(want_ids.get(step)?)? - of(got.ids.get(step)?)?) / f64::from(if largest > 0.0 { largest } else { 1.0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(got: &[f32], want: &[f32], element: ElementType) -> Outcome {
        let id = |l: &[f32]| vec![i64::try_from(metrics::argmax(l)).unwrap()];
        let continuation = Continuation { ids: id(got), logits: vec![got.to_vec()], given: false };
        judge_greedy(
            "greedy",
            "golden",
            &continuation,
            &id(want),
            &[want.to_vec()],
            element,
            Allowed::fixed(tolerance(element)),
        )
    }

    #[test]
    fn where_the_tokens_were_given_the_steps_behind_a_near_tie_are_compared() {
        let want = [[1.0_f32, 0.9999], [1.0, 0.5]];
        let follow = |second: [f32; 2], given: bool| {
            let logits = vec![vec![0.9999, 1.0], second.to_vec()];
            let ids = logits.iter().map(|l| i64::try_from(metrics::argmax(l)).unwrap()).collect();
            let got = Continuation { ids, logits, given };
            let allowed = Allowed::fixed(tolerance(ElementType::F16));
            judge_greedy("greedy", "golden", &got, &[0, 0], &want.map(|w| w.to_vec()), ElementType::F16, allowed)
        };
        assert_eq!(follow([1.0, 0.5], true).verdict, Verdict::NearTie);
        assert_eq!(follow([0.4, 0.5], true).verdict, Verdict::Fails);
        let own = follow([0.4, 0.5], false);
        assert_eq!((own.verdict, own.comparison.unwrap().positions), (Verdict::NearTie, 1));
    }

    #[test]
    fn a_flip_between_near_equal_logits_is_a_near_tie_in_float16_and_an_error_in_float32() {
        let (got, want) = ([1.0005_f32, 1.0], [1.0_f32, 1.0004]);
        let half = judge(&got, &want, ElementType::F16);
        assert_eq!(half.verdict, Verdict::NearTie);
        assert!((half.greedy.unwrap().margin.unwrap() - 4e-4).abs() < 1e-6);
        assert_eq!(judge(&[1.00001, 1.0], &[1.0, 1.00001], ElementType::F32).verdict, Verdict::Fails);
        assert_eq!(judge(&[1.0, 0.5], &[1.0, 0.5], ElementType::F32).verdict, Verdict::Holds);
        // The same token from logits that are far off is no agreement.
        assert_eq!(judge(&[1.1, 0.5], &[1.0, 0.5], ElementType::F16).verdict, Verdict::Fails);
    }
}
