//! Verification without a reference: every way of running a model has to give what the full run gives.

use std::path::Path;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::bar::Bar;
use super::cost::Cost;
use super::metrics::Logits;
use super::report::{Kind, Outcome, Report};
use super::scenario::{Continuation, Prompt, Scenario, compare_rows, continue_greedily, run, run_rows_alone};
use super::{
    Allowed, GREEDY_TOKENS, Options, WINDOW, cost, divergence, element_of, failed, folder_of, judge_greedy, judged,
    perplexity, promised,
};
use crate::error::{Code, Error, Result};
use crate::session::{Decoder, IntMatrix};
use crate::tokenizer::Tokenizer;

/// Length of the longest row; longer where a window could be shorter than the prompt only then.
const COLUMNS: usize = 24;
/// Padding of the rows.
const PADDING: [usize; 3] = [0, 5, 11];
/// The longest window that a prompt is made longer for.
const LONGEST_WINDOW: usize = 256;

/// Everything that one model computed.
struct Results {
    scenarios: Vec<(Scenario, Result<Logits>)>,
    greedy: Result<Continuation>,
}

/// Compares cached, chunked and padded runs of a model with its full run, and all of them with another lowering's.
pub fn consistency(model: &Path, other: Option<&Path>, options: &Options) -> Result<Report> {
    let mut decoder = Decoder::open(model, &options.judged_session())?;
    let element = element_of(model, &decoder);
    let tolerance = options.tolerance(element);
    let prompt = random_prompt(folder_of(model))?;
    let own = run_rows_alone(&mut decoder, &prompt)?.logits;
    let recomputed = continue_greedily(&mut decoder, &prompt, GREEDY_TOKENS, false);
    let (scenarios, note) = promised(model);
    let results = run_all(&mut decoder, &prompt, &scenarios);
    let mut report = Report {
        kind: Kind::Consistency,
        model: decoder.file().to_path_buf(),
        reference: other.map(Path::to_path_buf),
        element,
        tolerance,
        scenarios: Vec::new(),
        perplexity: Vec::new(),
        cost: Cost::of(model, options),
        placement: None,
        divergence: None,
        notes: note.into_iter().collect(),
    };
    options.place(&mut decoder, &prompt, &mut report);
    for (scenario, got) in results.scenarios.iter().filter(|(s, _)| *s != Scenario::Prefill) {
        report.scenarios.push(against(scenario.name(), "full run", got, &own, &prompt, *scenario, tolerance));
    }
    report.scenarios.push(greedy("greedy", "full run", &results.greedy, &recomputed, &report));
    let alone = report.cost.is_none() || options.reference.is_none();
    if let Some(text) = options.text.as_ref().filter(|_| alone) {
        let tokenizer = Tokenizer::open(folder_of(model))?;
        report.perplexity.push(perplexity::measure(&mut decoder, &tokenizer, text, WINDOW, None, tolerance)?);
    }
    drop(decoder);
    if let Some(other) = other {
        compare_with(other, &results, &prompt, options, &mut report)?;
    }
    judge_quantised(&mut report);
    cost::add(model, None, &prompt, options, &mut report)?;
    if !report.holds() && report.cost.is_none() {
        find_divergence(model, other, &prompt, options, &mut report);
    }
    Ok(report)
}

/// Every way of running a quantised model against its rows run alone. The bar of a scheme is wide, that of one set of
/// weights against itself is not: what is wrong with a cache or with padding shows here.
pub(super) fn own_runs(decoder: &mut Decoder, prompt: &Prompt, scenarios: &[Scenario]) -> Result<Vec<Outcome>> {
    let own = run_rows_alone(decoder, prompt)?.logits;
    let judged = scenarios.iter().filter(|scenario| **scenario != Scenario::Prefill).map(|scenario| {
        let got = run(decoder, prompt, *scenario).map(|run| run.logits);
        let name = format!("{}, itself", scenario.name());
        let mut outcome = against(&name, "full run", &got, &own, prompt, *scenario, 0.0);
        Bar::of_bits(8).judge(&mut outcome);
        outcome
    });
    Ok(judged.collect())
}

/// A quantised build is held to its bar where the other is a float one. Its own runs have the same weights: they differ
/// by what rounding activations to 8 bits does when they come in other company.
fn judge_quantised(report: &mut Report) {
    let Some(bar) = report.cost.as_ref().map(|cost| cost.bar) else { return };
    for outcome in &mut report.scenarios {
        let bar = if outcome.against == "primitive" { bar } else { Bar::of_bits(8) };
        bar.judge(outcome);
    }
}

fn run_all(decoder: &mut Decoder, prompt: &Prompt, scenarios: &[Scenario]) -> Results {
    let scenarios = scenarios.iter().map(|&s| (s, run(decoder, prompt, s).map(|r| r.logits))).collect();
    Results { scenarios, greedy: continue_greedily(decoder, prompt, GREEDY_TOKENS, true) }
}

/// Adds a comparison of every scenario with the same scenario of another lowering.
fn compare_with(
    other: &Path,
    results: &Results,
    prompt: &Prompt,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let mut decoder = Decoder::open(other, &options.session(false))?;
    let scenarios: Vec<Scenario> = results.scenarios.iter().map(|(scenario, _)| *scenario).collect();
    let theirs = run_all(&mut decoder, prompt, &scenarios);
    for ((scenario, got), (_, want)) in results.scenarios.iter().zip(&theirs.scenarios) {
        let name = format!("{}, primitive", scenario.name());
        report.scenarios.push(match want {
            Ok(want) => against(&name, "primitive", got, want, prompt, *scenario, report.tolerance),
            Err(error) => failed(&name, "primitive", error),
        });
    }
    let outcome = greedy("greedy, primitive", "primitive", &results.greedy, &theirs.greedy, report);
    report.scenarios.push(outcome);
    Ok(())
}

fn against(
    name: &str,
    whom: &str,
    got: &Result<Logits>,
    want: &Logits,
    prompt: &Prompt,
    scenario: Scenario,
    tolerance: f64,
) -> Outcome {
    match got {
        Ok(got) => {
            judged(name, whom, compare_rows(got, want, prompt, scenario.rows(prompt)), Allowed::fixed(tolerance))
        }
        Err(error) => failed(name, whom, error),
    }
}

fn greedy(name: &str, whom: &str, got: &Result<Continuation>, want: &Result<Continuation>, report: &Report) -> Outcome {
    match (got, want) {
        (Ok(got), Ok(want)) => {
            judge_greedy(name, whom, got, &want.ids, &want.logits, report.element, Allowed::fixed(report.tolerance))
        }
        (Err(error), _) | (_, Err(error)) => failed(name, whom, error),
    }
}

/// Names the first layer that departs: from the other lowering if that is what failed, else from the full run.
fn find_divergence(model: &Path, other: Option<&Path>, prompt: &Prompt, options: &Options, report: &mut Report) {
    let fails = |s: &Scenario| report.failures().iter().any(|f| f.split(',').next() == Some(s.name()));
    let scenario = Scenario::ALL.into_iter().find(fails).unwrap_or(Scenario::Prefill);
    let with_other = report.scenarios.iter().any(|o| {
        o.against == "primitive" && o.verdict == super::Verdict::Fails && o.scenario.starts_with(scenario.name())
    });
    let find = || -> Result<super::Divergence> {
        let mut decoder = Decoder::open(model, &options.session(true))?;
        let got = run(&mut decoder, prompt, scenario)?;
        if let Some(other) = other.filter(|_| with_other) {
            drop(decoder);
            let want = run(&mut Decoder::open(other, &options.session(true))?, prompt, scenario)?;
            return Ok(divergence::between(
                &got,
                &want,
                prompt,
                scenario,
                "the primitive lowering's",
                report.tolerance,
            ));
        }
        let want = run_rows_alone(&mut decoder, prompt)?;
        Ok(divergence::between(&got, &want, prompt, scenario, "the full run's", report.tolerance))
    };
    match find() {
        Ok(divergence) => report.divergence = Some(divergence),
        Err(error) => report.notes.push(format!("the model did not run with its hidden states: {error}")),
    }
}

/// Three rows of tokens drawn from the model's vocabulary, the same for each run.
fn random_prompt(folder: &Path) -> Result<Prompt> {
    let path = folder.join("config.json");
    let text = crate::regular::read(&path, crate::regular::CONFIGURATION).map_err(|e| Error::io(&path, &e))?;
    let config: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|e| Error::new(Code::ConfigInvalid, path.display()).found(e).expected("JSON"))?;
    let number = |key: &str| {
        let value = config.get(key).or_else(|| config.get("text_config")?.get(key));
        value.and_then(serde_json::Value::as_i64).filter(|n| *n > 0)
    };
    let vocabulary = number("vocab_size").ok_or_else(|| {
        Error::new(Code::ConfigMissingKey, format!("{}: vocab_size", path.display()))
            .expected("the size of the vocabulary")
    })?;
    let window = number("sliding_window").and_then(|w| usize::try_from(w).ok()).filter(|w| *w <= LONGEST_WINDOW);
    let columns = window.map_or(COLUMNS, |w| COLUMNS.max(w + 8));
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let (mut ids, mut mask, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for padding in PADDING {
        for column in 0..columns {
            let position = column.checked_sub(padding);
            ids.push(random.random_range(0..vocabulary));
            mask.push(i64::from(position.is_some()));
            positions.push(i64::try_from(position.unwrap_or(0)).unwrap_or(0));
        }
    }
    let matrix = |data| IntMatrix { rows: PADDING.len(), columns, data };
    Ok(Prompt { ids: matrix(ids), mask: matrix(mask), positions: matrix(positions) })
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::runtime::{Search, ensure};
    use crate::toy::{Fault, write};

    fn verify(fault: Fault, other: Option<Fault>) -> Report {
        ensure(&Search::default(), &mut |_| {}).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (own, second) = (folder.path().join("own"), folder.path().join("other"));
        write(&own, fault);
        write(&second, other.unwrap_or(Fault::None));
        consistency(&own, other.map(|_| second.as_path()), &Options { threads: 1, ..Options::default() }).unwrap()
    }

    #[test]
    fn a_right_decoder_is_consistent_and_a_wrong_one_is_not() {
        let report = verify(Fault::None, None);
        assert!(report.holds(), "{report}");
        assert_eq!((report.kind, report.scenarios.len()), (Kind::Consistency, 7));
        let report = verify(Fault::IgnoresMask, None);
        assert_eq!(report.failures(), ["batch-left", "batch-decode", "batch-decode-right"], "{report}");
        let report = verify(Fault::DoublesCache, None);
        assert_eq!(report.failures(), ["decode", "chunks", "batch-decode", "batch-decode-right", "greedy"], "{report}");
        // The embedding is the toy's only hidden state, and it is right: opened in memory, with its weights beside it.
        let divergence = report.divergence.unwrap();
        assert!(divergence.message.contains("in decode every hidden state agrees"), "{}", divergence.message);
    }

    #[test]
    fn another_lowering_is_compared_scenario_by_scenario() {
        let report = verify(Fault::None, Some(Fault::None));
        assert!(report.holds(), "{report}");
        assert_eq!(report.scenarios.iter().filter(|s| s.against == "primitive").count(), 8);
        let report = verify(Fault::None, Some(Fault::DoublesCache));
        let prefill = report.scenarios.iter().find(|s| s.scenario == "prefill, primitive").unwrap();
        assert_eq!(prefill.verdict, Verdict::Holds);
        assert!(report.failures().contains(&"decode, primitive".to_owned()), "{report}");
    }
}
