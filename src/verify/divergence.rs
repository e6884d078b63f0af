//! Where a wrong model goes wrong: the first hidden state that departs from the reference's.

use super::metrics::{Logits, largest_difference};
use super::report::Divergence;
use super::scenario::{Prompt, Run, Scenario, run, run_rows_alone};
use crate::error::Result;
use crate::golden::Golden;
use crate::session::Decoder;

/// Hidden states with their numbers.
type Numbered = [(usize, Logits)];

/// Runs the failing scenario again with hidden states and compares them with the golden's, or, where the golden has
/// none (rows other than the first), with those of each row run alone.
pub(super) fn against_golden(
    decoder: &mut Decoder,
    golden: &Golden,
    prompt: &Prompt,
    scenario: Scenario,
    tolerance: f64,
) -> Result<Divergence> {
    let got = run(decoder, prompt, scenario)?;
    let wanted: Vec<(usize, Logits)> = golden.hidden_states.iter().map(Logits::from_tensor).enumerate().collect();
    if scenario.rows(prompt) == 1 {
        return Ok(first(&got.hidden_states, &wanted, prompt, scenario, "the golden's", tolerance));
    }
    let alone = run_rows_alone(decoder, prompt)?;
    Ok(first(&got.hidden_states, &alone.hidden_states, prompt, scenario, "those of each row run alone", tolerance))
}

/// Compares two runs of a scenario.
pub(super) fn between(
    got: &Run,
    want: &Run,
    prompt: &Prompt,
    scenario: Scenario,
    whose: &str,
    tolerance: f64,
) -> Divergence {
    first(&got.hidden_states, &want.hidden_states, prompt, scenario, whose, tolerance)
}

fn first(
    got: &Numbered,
    want: &Numbered,
    prompt: &Prompt,
    scenario: Scenario,
    whose: &str,
    tolerance: f64,
) -> Divergence {
    let name = scenario.name();
    let last = want.iter().map(|(i, _)| *i).max().unwrap_or(0);
    let mut before: Option<f64> = None;
    let mut compared = 0;
    for (number, wanted) in want {
        let Some((_, values)) = got.iter().find(|(i, _)| i == number) else { continue };
        let Some((difference, position)) = worst(values, wanted, prompt) else { continue };
        compared += 1;
        if difference <= tolerance {
            before = Some(before.map_or(difference, |b| b.max(difference)));
            continue;
        }
        let place = layer_name(*number, last);
        let until = before.map_or(String::new(), |b| format!("; everything before it agrees to {b:.1e}"));
        let (row, column) = position;
        return Divergence {
            scenario: name.into(),
            hidden_state: Some(*number),
            position: Some(position),
            difference: Some(difference),
            before,
            message: format!(
                "in {name}, {place} departs by {difference:.1e} of the largest value, most at row {row}, column {column}{until}"
            ),
        };
    }
    let message = match (compared, before) {
        (0, _) => format!("unknown: in {name} the model and the reference have no hidden states in common"),
        (_, agree) => format!(
            "in {name} every hidden state agrees with {whose} to {:.1e}: the difference is in the logits' projection",
            agree.unwrap_or(0.0)
        ),
    };
    Divergence { scenario: name.into(), hidden_state: None, position: None, difference: None, before, message }
}

/// The hidden state's place in words.
fn layer_name(number: usize, last: usize) -> String {
    match number {
        0 => "the embedding's output (hidden_states.0)".into(),
        n if n == last => format!("the output of layer {} with the final norm (hidden_states.{n})", n - 1),
        n => format!("the output of layer {} (hidden_states.{n})", n - 1),
    }
}

/// The largest difference over the live positions, relative to the largest reference value, and where it is.
fn worst(got: &Logits, want: &Logits, prompt: &Prompt) -> Option<(f64, (usize, usize))> {
    let mut worst: Option<(f64, (usize, usize))> = None;
    let mut largest = 0.0_f64;
    for (row, column) in (0..prompt.ids.rows).flat_map(|r| (0..prompt.ids.columns).map(move |c| (r, c))) {
        let (Some(g), Some(w)) = (got.at(row, column), want.at(row, column)) else { continue };
        if !prompt.live(row, column) {
            continue;
        }
        let difference = largest_difference(g, w);
        largest = w.iter().fold(largest, |m, w| m.max(f64::from(w.abs())));
        // NaN is the worst there is.
        if worst.is_none_or(|(most, _)| !most.is_nan() && (difference.is_nan() || difference > most)) {
            worst = Some((difference, (row, column)));
        }
    }
    let scale = if largest > 0.0 { largest } else { 1.0 };
    worst.map(|(difference, place)| (difference / scale, place))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::IntMatrix;

    fn table(values: &[f32]) -> Logits {
        Logits { columns: values.len(), positions: values.iter().map(|v| Some(vec![*v, 8.0])).collect() }
    }

    fn prompt() -> Prompt {
        let row = || IntMatrix::from_row(vec![1, 1]);
        Prompt { ids: row(), mask: row(), positions: row() }
    }

    #[test]
    fn the_first_departing_layer_is_named_with_its_place() {
        let want = [(0, table(&[1.0, 1.0])), (1, table(&[2.0, 2.0])), (2, table(&[3.0, 3.0]))];
        let got = [(0, table(&[1.0, 1.0])), (1, table(&[2.0, 2.8])), (2, table(&[9.0, 9.0]))];
        let d = first(&got, &want, &prompt(), Scenario::Prefill, "the golden's", 1e-4);
        assert_eq!((d.hidden_state, d.position), (Some(1), Some((0, 1))));
        assert!((d.difference.unwrap() - 0.1).abs() < 1e-6);
        assert!(d.message.contains("layer 0"), "{}", d.message);
    }

    #[test]
    fn agreement_points_at_the_projection_and_nothing_in_common_is_said() {
        let want = [(0, table(&[1.0, 1.0]))];
        let d = first(&want, &want, &prompt(), Scenario::Decode, "the golden's", 1e-4);
        assert!(d.hidden_state.is_none() && d.message.contains("projection"), "{}", d.message);
        let d = first(&[], &want, &prompt(), Scenario::Decode, "the golden's", 1e-4);
        assert!(d.message.contains("no hidden states in common"));
        let got = [(0, table(&[1.0, f32::NAN]))];
        let d = first(&got, &want, &prompt(), Scenario::Prefill, "the golden's", 1e-4);
        assert_eq!(d.position, Some((0, 1)));
    }
}
