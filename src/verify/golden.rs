//! Verification against a golden.

use std::path::Path;

use super::cost::Cost;
use super::metrics::{Comparison, Logits};
use super::report::{Kind, Outcome, Perplexity, Report, Verdict};
use super::scenario::{Prompt, Scenario, compare_rows, continue_along, run, steps_of};
use super::tolerance::Bars;
use super::{
    Allowed, GREEDY_TOKENS, Options, WINDOW, consistency, cost, divergence, element_of, failed, folder_of,
    judge_greedy, judged, perplexity, promised,
};
use crate::element::ElementType;
use crate::error::Result;
use crate::golden::{Evaluation, Golden};
use crate::session::{Decoder, Floats};
use crate::tokenizer::Tokenizer;

/// Runs every scenario and compares it with what the reference computed.
pub fn against_golden(model: &Path, golden: &Golden, options: &Options) -> Result<Report> {
    let mut decoder = Decoder::open(model, &options.judged_session())?;
    let element = element_of(model, &decoder);
    let half = |element: ElementType| matches!(element, ElementType::F16 | ElementType::BF16);
    let computes = decoder.slots().iter().any(|slot| half(slot.element));
    let bars = Bars::of(&golden.halves, element, computes, options);
    let prompt = Prompt {
        ids: golden.input_ids.clone(),
        mask: golden.attention_mask.clone(),
        positions: golden.position_ids.clone(),
    };
    let mut report = Report {
        kind: Kind::Golden,
        model: decoder.file().to_path_buf(),
        reference: Some(golden.path.clone()),
        element,
        tolerance: options.tolerance(element),
        scenarios: Vec::new(),
        perplexity: Vec::new(),
        cost: Cost::of(model, options),
        placement: None,
        divergence: None,
        notes: Vec::new(),
    };
    options.place(&mut decoder, &prompt, &mut report);
    let reference = Logits::from_tensor(&golden.logits);
    let (scenarios, note) = promised(model);
    report.notes.extend(note);
    for scenario in scenarios.iter().copied() {
        let (allowed, note) = bars.of_scenario(scenario.recorded_as());
        let outcome = check(&mut decoder, golden, &reference, &prompt, scenario, allowed);
        let outcome = outcome.unwrap_or_else(|e| failed(scenario.name(), "golden", &e));
        report.scenarios.push(outcome.with_note(note));
    }
    let (allowed, note) = bars.of_scenario("greedy");
    let greedy = check_greedy(&mut decoder, golden, &prompt, (element, allowed));
    report.scenarios.extend(greedy.map(|outcome| outcome.with_note(note)));
    if let Some(bar) = report.cost.as_ref().map(|cost| cost.bar) {
        report.scenarios.iter_mut().for_each(|outcome| bar.judge(outcome));
        report.scenarios.extend(consistency::own_runs(&mut decoder, &prompt, &scenarios)?);
    }
    check_texts(&mut decoder, model, golden, options, &mut report)?;
    drop(decoder);
    cost::add(model, Some(golden), &prompt, options, &mut report)?;
    // Every layer of a quantised build departs; its cost says by how much.
    if !report.holds() && report.cost.is_none() {
        find_divergence(model, golden, &prompt, options, &mut report);
    }
    Ok(report)
}

/// One scenario: by the full pass, and where the reference's own cached run is another, by whichever is closer.
fn check(
    decoder: &mut Decoder,
    golden: &Golden,
    reference: &Logits,
    prompt: &Prompt,
    scenario: Scenario,
    allowed: Allowed,
) -> Result<Outcome> {
    let rows = scenario.rows(prompt);
    let got = run(decoder, prompt, scenario)?.logits;
    let full = compare_rows(&got, reference, prompt, rows);
    let cached = match scenario {
        Scenario::Decode => golden.logits_steps.as_ref(),
        Scenario::Chunks => golden.logits_chunks.as_ref(),
        _ => None,
    };
    let cached_differs = golden.logits_steps.is_some() || golden.logits_chunks.is_some();
    if let Some(other) = cached.and_then(|t: &Floats| compare_rows(&got, &Logits::from_tensor(t), prompt, rows)) {
        if full.is_none_or(|f| closer(&other, &f)) {
            let mut outcome = judged(scenario.name(), "golden, cached", Some(other), allowed);
            outcome.note = Some("compared with the reference's cached run, which differs from its full pass".into());
            return Ok(outcome);
        }
    } else if cached_differs && full.is_some_and(|f| !allowed.admits(&f)) && scenario.decodes_batch() {
        return check_row_of_batch(decoder, prompt, (scenario, &got), allowed);
    }
    Ok(judged(scenario.name(), "golden", full, allowed))
}

fn closer(this: &Comparison, that: &Comparison) -> bool {
    that.max.is_nan() || this.max < that.max
}

/// A cached batch of a model whose cached run differs from its full pass has no reference in the golden.
/// What must hold all the same: the first row, which has no padding, comes out as it does alone in the same pieces.
fn check_row_of_batch(
    decoder: &mut Decoder,
    prompt: &Prompt,
    (scenario, got): (Scenario, &Logits),
    allowed: Allowed,
) -> Result<Outcome> {
    let alone = super::scenario::run_in_pieces_alone(decoder, prompt, scenario)?;
    let comparison = compare_rows(got, &alone.logits, prompt, 1);
    let mut outcome = judged(scenario.name(), "own first row", comparison, allowed);
    outcome.note = Some(
        "the reference's cached run differs from its full pass, and the golden has none for a batch: \
                         the first row is compared with its own run alone"
            .into(),
    );
    Ok(outcome)
}

fn check_greedy(
    decoder: &mut Decoder,
    golden: &Golden,
    prompt: &Prompt,
    (element, allowed): (ElementType, Allowed),
) -> Option<Outcome> {
    let ids = golden.greedy_ids.as_ref()?.get(prompt.ids.columns..)?;
    let logits = golden.greedy_logits.as_ref().map(steps_of).unwrap_or_default();
    let count = ids.len().min(GREEDY_TOKENS);
    Some(match continue_along(decoder, prompt, ids.get(..count).unwrap_or(ids)) {
        Ok(got) => judge_greedy("greedy", "golden", &got, ids, &logits, element, allowed),
        Err(error) => failed("greedy", "golden", &error),
    })
}

/// The text that the golden was scored on, and the user's.
fn check_texts(
    decoder: &mut Decoder,
    model: &Path,
    golden: &Golden,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let folders = [folder_of(model), golden.path.parent().unwrap_or(model)];
    let own = folders.iter().find(|f| f.join("tokenizer.json").is_file()).copied();
    let tolerance = report.cost.as_ref().map_or(report.tolerance, |cost| cost.bar.perplexity);
    if let Some(Evaluation { text, nll_per_token, window }) = golden.evaluation() {
        let window = window.unwrap_or(WINDOW);
        let measured: Option<Result<Perplexity>> = own.filter(|_| text.is_file()).map(|folder| {
            perplexity::measure(decoder, &Tokenizer::open(folder)?, &text, window, Some(nll_per_token), tolerance)
        });
        match measured {
            Some(Ok(measured)) => report.perplexity.push(measured),
            Some(Err(error)) => {
                report.notes.push(format!("perplexity was not checked: {}: {}", error.subject, error.found));
            }
            None => {
                report.notes.push(format!("perplexity was not checked: needs {} and a tokenizer.json", text.display()));
            }
        }
    }
    // A reference build says more about a quantised model than its perplexity alone.
    let alone = report.cost.is_none() || options.reference.is_none();
    if let Some(text) = options.text.as_ref().filter(|_| alone) {
        let tokenizer = Tokenizer::open(own.unwrap_or(folder_of(model)))?;
        report.perplexity.push(perplexity::measure(decoder, &tokenizer, text, WINDOW, None, tolerance)?);
    }
    Ok(())
}

/// Names the first layer that departs in the first scenario that failed.
fn find_divergence(model: &Path, golden: &Golden, prompt: &Prompt, options: &Options, report: &mut Report) {
    let fails = |s: &Scenario| {
        report.scenarios.iter().any(|o| o.scenario == s.name() && o.verdict == Verdict::Fails && o.comparison.is_some())
    };
    let scenario = Scenario::ALL.into_iter().find(fails).unwrap_or(Scenario::Prefill);
    if report.scenarios.iter().any(|o| o.scenario == scenario.name() && o.against == "golden, cached") {
        report
            .notes
            .push("the golden's hidden states are those of the full pass: the departing layer is not named".into());
        return;
    }
    let failed = report.scenarios.iter().find(|o| o.scenario == scenario.name());
    let tolerance = failed.and_then(|o| o.allowed).map_or(report.tolerance, |allowed| allowed.max);
    let found = Decoder::open(model, &options.session(true))
        .and_then(|mut decoder| divergence::against_golden(&mut decoder, golden, prompt, scenario, tolerance));
    match found {
        Ok(divergence) => report.divergence = Some(divergence),
        Err(error) => report.notes.push(format!("the model did not run with its hidden states: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::scenario::{continue_greedily, run_rows_alone};
    use super::*;
    use crate::golden::{Finding, HalfError, HalfErrors};
    use crate::runtime::{Search, ensure};
    use crate::session::IntMatrix;
    use crate::toy::{Fault, write};

    fn options() -> Options {
        Options { threads: 1, ..Options::default() }
    }

    /// A toy, and the golden of the toy without its fault.
    fn toy(folder: &Path, fault: Fault) -> Golden {
        ensure(&Search::default(), &mut |_| {}).unwrap();
        let matrix = |value: fn(i64, i64) -> i64| {
            let data = (0..3).flat_map(|r| (0..24).map(move |c| value(c - 5 * r, c))).collect();
            IntMatrix::new(3, 24, data).unwrap()
        };
        let prompt = Prompt {
            ids: matrix(|p, c| if p < 0 { 0 } else { (c * 7 + p) % 16 }),
            mask: matrix(|p, _| i64::from(p >= 0)),
            positions: matrix(|p, _| p.max(0)),
        };
        write(folder, Fault::None);
        let mut decoder = Decoder::open(folder, &options().session(true)).unwrap();
        let alone = run_rows_alone(&mut decoder, &prompt).unwrap();
        let greedy = continue_greedily(&mut decoder, &prompt, GREEDY_TOKENS, false).unwrap();
        let tensor = |rows: usize, table: &Logits| Floats {
            shape: vec![rows, 24, 16],
            data: table.positions.iter().take(rows * 24).flat_map(|p| p.clone().unwrap_or(vec![0.0; 16])).collect(),
        };
        // Windows overwrites no file that a session has mapped.
        drop(decoder);
        write(folder, fault);
        Golden {
            path: folder.join("golden.safetensors"),
            logits: tensor(3, &alone.logits),
            greedy_ids: Some([prompt.ids.row(0), &greedy.ids].concat()),
            greedy_logits: Some(Floats { shape: vec![1, GREEDY_TOKENS, 16], data: greedy.logits.concat() }),
            hidden_states: alone.hidden_states.iter().map(|(_, h)| tensor(1, h)).collect(),
            logits_steps: None,
            logits_chunks: None,
            halves: crate::golden::Halves::default(),
            metadata: std::collections::HashMap::default(),
            input_ids: prompt.ids,
            attention_mask: prompt.mask,
            position_ids: prompt.positions,
        }
    }

    #[test]
    fn a_right_model_holds_and_a_wrong_one_fails_where_it_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let golden = toy(folder.path(), Fault::None);
        let report = against_golden(folder.path(), &golden, &options()).unwrap();
        assert!(report.holds(), "{report}");
        assert_eq!((report.kind, report.scenarios.len()), (Kind::Golden, 8));

        let golden = toy(folder.path(), Fault::IgnoresMask);
        let report = against_golden(folder.path(), &golden, &options()).unwrap();
        assert_eq!(report.failures(), ["batch-left", "batch-decode", "batch-decode-right"], "{report}");
    }

    /// The report on a toy that says it holds its weights in float16, and whose golden is off by 1e-3 of the largest logit.
    fn rounded(own: Option<f64>) -> Report {
        let folder = tempfile::tempdir().unwrap();
        let mut golden = toy(folder.path(), Fault::None);
        std::fs::write(folder.path().join("hf2onnx.json"), r#"{"dtype": "f16"}"#).unwrap();
        let largest = golden.logits.data.iter().fold(0.0_f32, |most, l| most.max(l.abs()));
        for logit in golden.logits.data.iter_mut().step_by(2) {
            *logit += 1e-3 * largest;
        }
        golden.halves.float16 = own.map(|max| {
            let finding = Finding::Error(HalfError { max, error: 1.0, typical: 1.0 });
            let names = Scenario::ALL.iter().map(|scenario| scenario.name().to_owned());
            HalfErrors { rounded: names.map(|name| (name, finding.clone())).collect(), ..HalfErrors::default() }
        });
        against_golden(folder.path(), &golden, &options()).unwrap()
    }

    #[test]
    fn what_was_recorded_is_allowed_and_the_fixed_tolerance_where_nothing_was() {
        let report = rounded(Some(9e-4));
        assert!(report.holds(), "{report}");
        assert!(report.scenarios[0].allowed.is_some_and(|allowed| (allowed.max - 1.09e-3).abs() < 1e-9));
        assert!(report.to_string().contains("times what rounding matrices to f16"), "{report}");
        let report = rounded(Some(7e-4));
        assert_eq!(report.failures(), Scenario::ALL.map(Scenario::name), "{report}");
        // Beyond its bar in `max` alone, as single positions are.
        assert!(report.to_string().contains("only single positions"), "{report}");
        let report = rounded(None);
        assert!(report.holds() && report.scenarios.iter().all(|outcome| outcome.allowed.is_none()), "{report}");
    }

    #[test]
    fn a_hidden_state_that_departs_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut golden = toy(folder.path(), Fault::None);
        for values in [&mut golden.logits.data, &mut golden.hidden_states[0].data] {
            values[16 * 3] += 1.0;
        }
        let report = against_golden(folder.path(), &golden, &options()).unwrap();
        let divergence = report.divergence.unwrap();
        assert_eq!((divergence.hidden_state, divergence.position), (Some(0), Some((0, 3))));
        assert!(divergence.message.contains("embedding"), "{}", divergence.message);
    }

    #[test]
    fn where_the_reference_differs_through_its_cache_the_closer_of_its_runs_counts() {
        let folder = tempfile::tempdir().unwrap();
        let mut golden = toy(folder.path(), Fault::None);
        let first_row: Vec<f32> = golden.logits.data.iter().take(24 * 16).copied().collect();
        let cached = Floats { shape: vec![1, 24, 16], data: first_row };
        golden.logits_steps = Some(cached.clone());
        golden.logits_chunks = Some(cached);
        golden.logits.data.iter_mut().for_each(|l| *l += 0.5);
        let report = against_golden(folder.path(), &golden, &options()).unwrap();
        let of = |name: &str| {
            let outcome = report.scenarios.iter().find(|s| s.scenario == name).unwrap();
            (outcome.against.as_str(), outcome.verdict)
        };
        assert_eq!(of("prefill"), ("golden", Verdict::Fails));
        assert_eq!(of("decode"), ("golden, cached", Verdict::Holds));
        assert_eq!(of("chunks"), ("golden, cached", Verdict::Holds));
        assert_eq!(of("batch-decode"), ("own first row", Verdict::Holds));
        assert_eq!(of("batch-decode-right"), ("own first row", Verdict::Holds));
        assert_eq!(of("greedy"), ("golden", Verdict::Holds));
    }
}
