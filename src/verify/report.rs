//! What a verification found, as JSON and as a table.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use serde::ser::SerializeStruct as _;

use super::cost::Cost;
use super::metrics::Comparison;
use super::tolerance::Allowed;
use crate::element::ElementType;
use crate::session::Placement;

/// What the model was compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// With what the reference computed.
    Golden,
    /// With itself, run in other ways, and perhaps with another lowering.
    Consistency,
}

impl Kind {
    /// The kind's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Golden => "golden",
            Self::Consistency => "consistency",
        }
    }

    /// What a report that holds says of the model: only a golden is the model's own code.
    fn verdict(self) -> &'static str {
        match self {
            Self::Golden => "verified (golden)",
            Self::Consistency => "self-consistent, not compared with the model's own code",
        }
    }

    /// What the check is called.
    fn check(self) -> &'static str {
        match self {
            Self::Golden => "golden verification",
            Self::Consistency => "self-consistency",
        }
    }
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Within the tolerance.
    Holds,
    /// Two tokens whose logits are closer than the tolerance changed places.
    NearTie,
    /// Not within the tolerance.
    Fails,
    /// There was nothing to compare.
    NotCompared,
}

impl Verdict {
    /// Holds or fails, for a number against its tolerance.
    pub fn of(difference: f64, tolerance: f64) -> Self {
        // Written so that NaN fails.
        if difference <= tolerance { Self::Holds } else { Self::Fails }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::NearTie => "near tie",
            Self::Fails => "FAILS",
            Self::NotCompared => "not compared",
        }
    }
}

/// The greedy tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Greedy {
    /// Tokens before the first difference.
    pub matched: usize,
    /// Tokens that were compared.
    pub of: usize,
    /// How far apart two tokens that differ are in the reference's logits, relative to the largest logit: at the first
    /// difference, or the widest where every step was compared.
    pub margin: Option<f64>,
}

/// One scenario.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Its name.
    pub scenario: String,
    /// What it was compared with.
    pub against: String,
    /// The differences.
    #[serde(flatten)]
    pub comparison: Option<Comparison>,
    /// What these differences may come to, where it is derived for this scenario.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed: Option<Allowed>,
    /// The tokens, for a greedy continuation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub greedy: Option<Greedy>,
    /// The verdict.
    pub verdict: Verdict,
    /// What else there is to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Perplexity over a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Perplexity {
    /// The text.
    pub text: PathBuf,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Mean negative log-likelihood per token, in nats.
    pub nll_per_token: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// The reference's perplexity.
    pub reference: Option<f64>,
    /// Relative difference from it.
    pub difference: Option<f64>,
    /// The verdict.
    pub verdict: Verdict,
}

/// The first layer that departs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// The scenario that was run again with its hidden states.
    pub scenario: String,
    /// Number of the hidden state; none when all agree or none could be compared.
    pub hidden_state: Option<usize>,
    /// Row and column of the largest difference there.
    pub position: Option<(usize, usize)>,
    /// The largest difference there, relative to the largest reference value.
    pub difference: Option<f64>,
    /// The largest difference before it, likewise.
    pub before: Option<f64>,
    /// All of it in words.
    pub message: String,
}

/// What a verification found.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// What the model was compared with.
    pub kind: Kind,
    /// The model's file.
    pub model: PathBuf,
    /// The golden, or the other lowering.
    pub reference: Option<PathBuf>,
    /// What the model computes in.
    pub element: ElementType,
    /// Largest difference allowed, relative to the largest logit, where a scenario has no bar of its own.
    pub tolerance: f64,
    /// The scenarios.
    pub scenarios: Vec<Outcome>,
    /// Perplexities.
    pub perplexity: Vec<Perplexity>,
    /// What quantisation cost, in a quantised build: then its bar judges, not the tolerance.
    pub cost: Option<Cost>,
    /// On which provider the nodes run, if that was asked for.
    pub placement: Option<Placement>,
    /// The first layer that departs, if something failed.
    pub divergence: Option<Divergence>,
    /// Checks that could not be made.
    pub notes: Vec<String>,
}

impl Report {
    /// True if something was compared and nothing failed.
    pub fn holds(&self) -> bool {
        let scenarios = self.scenarios.iter().map(|s| s.verdict);
        let mut all = scenarios.chain(self.perplexity.iter().map(|p| p.verdict));
        let compared = self.scenarios.iter().any(|s| matches!(s.verdict, Verdict::Holds | Verdict::NearTie));
        compared && all.all(|v| v != Verdict::Fails) && self.cost.as_ref().is_none_or(|cost| cost.failures().is_empty())
    }

    /// The scenarios and texts that failed.
    pub fn failures(&self) -> Vec<String> {
        let failed = self.scenarios.iter().filter(|s| s.verdict == Verdict::Fails);
        let names = failed.map(|s| s.scenario.clone());
        names
            .chain(self.perplexity.iter().filter(|p| p.verdict == Verdict::Fails).map(|_| "perplexity".into()))
            .chain(self.cost.iter().flat_map(Cost::failures))
            .collect()
    }
}

impl Serialize for Report {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut s = serializer.serialize_struct("Report", 13)?;
        s.serialize_field("kind", &self.kind)?;
        s.serialize_field("verdict", &self.verdict())?;
        s.serialize_field("holds", &self.holds())?;
        s.serialize_field("model", &self.model)?;
        s.serialize_field("reference", &self.reference)?;
        s.serialize_field("dtype", &self.element.to_string())?;
        s.serialize_field("tolerance", &self.tolerance)?;
        s.serialize_field("scenarios", &self.scenarios)?;
        s.serialize_field("perplexity", &self.perplexity)?;
        s.serialize_field("cost", &self.cost)?;
        s.serialize_field("placement", &self.placement)?;
        s.serialize_field("divergence", &self.divergence)?;
        s.serialize_field("notes", &self.notes)?;
        s.end()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} of {} ({})", self.kind.check(), self.model.display(), self.element)?;
        if let Some(reference) = &self.reference {
            writeln!(f, "against {}", reference.display())?;
        }
        let header = ["scenario", "max", "mean", "KL mean", "KL max", "top-1", "greedy", "verdict"].map(str::to_owned);
        let mut rows = vec![header.to_vec()];
        rows.extend(self.scenarios.iter().map(Outcome::cells));
        write_table(f, &rows)?;
        write!(f, "differences are relative to the largest reference logit; ")?;
        match &self.cost {
            Some(cost) => writeln!(f, "{} is allowed", cost.bar)?,
            None => self.write_allowed(f)?,
        }
        for outcome in &self.scenarios {
            if let Some(note) = &outcome.note {
                writeln!(f, "{}: {note}", outcome.scenario)?;
            }
        }
        for p in &self.perplexity {
            write!(f, "perplexity over {} ({} tokens): {:.4}", p.text.display(), p.tokens, p.perplexity)?;
            if let (Some(reference), Some(difference)) = (p.reference, p.difference) {
                write!(f, ", reference {reference:.4}, relative difference {difference:.1e}: {}", p.verdict.as_str())?;
            }
            writeln!(f)?;
        }
        if let Some(cost) = &self.cost {
            write!(f, "{cost}")?;
        }
        if let Some(placement) = &self.placement {
            write!(f, "{placement}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        if let Some(divergence) = &self.divergence {
            writeln!(f, "first divergence: {}", divergence.message)?;
        }
        f.write_str(&self.verdict())
    }
}

impl Report {
    /// The report in a line.
    pub fn verdict(&self) -> String {
        let kind = self.kind;
        match self.failures().as_slice() {
            [] if self.holds() => kind.verdict().to_owned(),
            [] => format!("not verified ({}): nothing could be compared", kind.as_str()),
            failed => format!("not verified ({}): {}", kind.as_str(), failed.join(", ")),
        }
    }

    /// What float builds may be off by: one number, or those that were derived, scenario by scenario.
    fn write_allowed(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let derived: Vec<(&Outcome, Allowed)> = self.scenarios.iter().filter_map(|o| Some((o, o.allowed?))).collect();
        let Some((_, first)) = derived.first() else { return writeln!(f, "{:.0e} is allowed", self.tolerance) };
        writeln!(f, "allowed is {}:", first.basis.words(self.element))?;
        let header = ["scenario", "max", "of", "error", "of", "median", "of", ""].map(str::to_owned);
        let mut rows = vec![header.to_vec()];
        rows.extend(derived.iter().map(|(outcome, allowed)| outcome.allowed_cells(allowed)));
        write_table(f, &rows)?;
        if self.scenarios.iter().any(Outcome::strays) {
            let hint = "only single positions are off by more: a router of experts that chose others there does that";
            writeln!(f, "{hint}")?;
        }
        Ok(())
    }
}

impl Outcome {
    /// With something more to say.
    pub(super) fn with_note(self, more: Option<String>) -> Self {
        let notes: Vec<String> = self.note.into_iter().chain(more).collect();
        Self { note: (!notes.is_empty()).then(|| notes.join("; ")), ..self }
    }

    /// Beyond what is allowed, but not at most positions.
    fn strays(&self) -> bool {
        let typical = self.comparison.map(|c| c.typical).zip(self.allowed.and_then(|allowed| allowed.typical));
        self.verdict == Verdict::Fails && typical.is_some_and(|(typical, most)| typical <= most)
    }

    fn allowed_cells(&self, allowed: &Allowed) -> Vec<String> {
        let cell = |number: Option<f64>| number.map_or("-".into(), |number| format!("{number:.1e}"));
        let own = |pick: fn(&Comparison) -> f64| cell(self.comparison.as_ref().map(pick));
        vec![
            self.scenario.clone(),
            own(|c| c.max),
            cell(Some(allowed.max)),
            own(|c| c.error),
            cell(allowed.error),
            own(|c| c.typical),
            cell(allowed.typical),
            String::new(),
        ]
    }

    fn cells(&self) -> Vec<String> {
        let number =
            |pick: fn(&Comparison) -> f64| self.comparison.as_ref().map_or("-".into(), |c| format!("{:.1e}", pick(c)));
        vec![
            self.scenario.clone(),
            number(|c| c.max),
            number(|c| c.mean),
            number(|c| c.kl_mean),
            number(|c| c.kl_max),
            self.comparison.as_ref().map_or("-".into(), |c| format!("{:.1} %", 100.0 * c.top1)),
            self.greedy.as_ref().map_or(String::new(), |g| format!("{}/{}", g.matched, g.of)),
            self.verdict.as_str().into(),
        ]
    }
}

/// Columns as wide as their widest cell; the first and the last flush left, numbers flush right.
fn write_table(f: &mut fmt::Formatter<'_>, rows: &[Vec<String>]) -> fmt::Result {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::from(" ");
        for (c, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let left = c == 0 || c + 1 == columns;
            let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
            let (before, after) = if left { ("", padding.as_str()) } else { (padding.as_str(), "") };
            line.extend([" ", before, cell, after, " "]);
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdicts: &[Verdict]) -> Report {
        let comparison = Comparison {
            positions: 24,
            max: 1.2e-6,
            mean: 1e-7,
            kl_mean: 0.0,
            kl_max: 3e-9,
            top1: 1.0,
            error: 0.0,
            typical: 0.0,
            information: 4.0,
        };
        let outcome = |v: &Verdict| Outcome {
            scenario: "prefill".into(),
            against: "golden".into(),
            comparison: Some(comparison),
            allowed: None,
            greedy: None,
            verdict: *v,
            note: None,
        };
        Report {
            kind: Kind::Golden,
            model: "model.onnx".into(),
            reference: None,
            element: ElementType::F32,
            tolerance: 1e-4,
            scenarios: verdicts.iter().map(outcome).collect(),
            perplexity: Vec::new(),
            cost: None,
            placement: None,
            divergence: None,
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_report_holds_when_something_was_compared_and_nothing_failed() {
        assert!(report(&[Verdict::Holds, Verdict::NearTie, Verdict::NotCompared]).holds());
        assert!(!report(&[Verdict::Holds, Verdict::Fails]).holds());
        assert!(!report(&[Verdict::NotCompared]).holds());
        assert!(!report(&[]).holds());
        assert_eq!(Verdict::of(f64::NAN, 1.0), Verdict::Fails);
    }

    #[test]
    fn the_table_is_aligned_and_json_says_whether_it_holds() {
        let text = report(&[Verdict::Holds]).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1].find("verdict"), lines[2].find("holds"), "{text}");
        assert!(text.ends_with("verified (golden)"));
        let itself = Report { kind: Kind::Consistency, ..report(&[Verdict::Holds]) };
        let (text, json) = (itself.to_string(), serde_json::to_value(&itself).unwrap());
        assert!(text.ends_with("self-consistent, not compared with the model's own code"), "{text}");
        assert!(!text.contains("verified") && !json.to_string().contains("verified"), "{text} {json}");
        let json = serde_json::to_value(report(&[Verdict::Fails])).unwrap();
        assert_eq!(json["holds"], false);
        assert_eq!(json["kind"], "golden");
        assert_eq!(json["scenarios"][0]["verdict"], "fails");
        assert_eq!(json["scenarios"][0]["kl_max"], 3e-9);
    }
}
