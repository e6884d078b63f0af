//! The report as a table.

use std::fmt;

use super::{Calibration, Report, Speed, megabytes};
use crate::verify::PerplexityChange;

/// Layers that are named.
const LAYERS: usize = 3;

/// The heads of the columns.
pub(super) const HEADS: [&str; 9] =
    ["scheme", "MB", "KL mean", "KL p99", "KL max", "top-1", "perplexity", "change", "decode t/s"];

impl Report {
    /// A row for the reference and one for each scheme, as in [`HEADS`].
    pub(super) fn rows(&self) -> Vec<[String; 9]> {
        let nothing = || "-".to_owned();
        let perplexity = |of: Option<f64>| of.map_or_else(nothing, |p| format!("{p:.3}"));
        let reference = &self.reference;
        let known = self.schemes.iter().find_map(|scheme| scheme.loss.quality.perplexity);
        let mut rows = vec![[
            reference.name.clone(),
            format!("{:.2}", megabytes(reference.bytes)),
            nothing(),
            nothing(),
            nothing(),
            nothing(),
            perplexity(known.map(|p| p.reference)),
            nothing(),
            decode(reference.speed.as_ref()),
        ]];
        for scheme in &self.schemes {
            let quality = &scheme.loss.quality;
            let change = |p: PerplexityChange| format!("{:+.2} %", 100.0 * p.change);
            rows.push([
                scheme.name.clone(),
                format!("{:.2}", megabytes(scheme.bytes)),
                small(quality.kl_mean),
                small(quality.kl_p99),
                small(quality.kl_max),
                format!("{:.1} %", 100.0 * quality.top1),
                perplexity(quality.perplexity.map(|p| p.model)),
                quality.perplexity.map_or_else(nothing, change),
                decode(scheme.speed.as_ref()),
            ]);
        }
        rows
    }

    /// What was compared, and where.
    pub(super) fn setting(&self) -> String {
        let positions = self.schemes.first().map_or(0, |scheme| scheme.loss.quality.positions);
        let version = self.runtime.as_deref().unwrap_or("of unknown version");
        let cpu = self.machine.cpu.as_deref().unwrap_or(&self.machine.platform);
        let cores = self.machine.cores.map_or_else(String::new, |cores| format!(", {cores} cores"));
        format!("{} positions of {}; onnxruntime {version} on {cpu}{cores}", positions, self.tokens)
    }

    /// A sentence for each text that schemes were calibrated on.
    pub(super) fn calibrations(&self) -> Vec<String> {
        let mut texts: Vec<(&Calibration, Vec<&str>)> = Vec::new();
        for scheme in &self.schemes {
            let Some(calibration) = &scheme.calibration else { continue };
            match texts.iter_mut().find(|(known, _)| *known == calibration) {
                Some((_, names)) => names.push(&scheme.name),
                None => texts.push((calibration, vec![&scheme.name])),
            }
        }
        let sentence = |(Calibration { text, record }, names): &(&Calibration, Vec<&str>)| {
            let (names, method) = (names.join(", "), record.method.to_uppercase());
            format!("calibrated ({method}) on {} tokens of {text}: {names}", record.tokens)
        };
        texts.iter().map(sentence).collect()
    }
}

fn decode(speed: Option<&Speed>) -> String {
    speed.map_or_else(|| "-".to_owned(), |speed| format!("{:.1}", speed.decode_tokens_per_second.median))
}

/// A number of nats.
pub(super) fn small(value: f64) -> String {
    if value == 0.0 || value >= 1e-4 { format!("{value:.5}") } else { format!("{value:.1e}") }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.model, self.setting())?;
        for sentence in self.calibrations() {
            writeln!(f, "{sentence}")?;
        }
        writeln!(f)?;
        let mut rows = vec![HEADS.map(str::to_owned)];
        rows.extend(self.rows());
        let width = |column: usize| rows.iter().map(|row| row.get(column).map_or(0, |c| c.chars().count())).max();
        let widths: Vec<usize> = (0..HEADS.len()).map(|column| width(column).unwrap_or(0)).collect();
        for row in &rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
                let (before, after) = if column == 0 { ("", padding.as_str()) } else { (padding.as_str(), "") };
                line.extend([before, cell, after, "  "]);
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        writeln!(
            f,
            "\nKL(reference || scheme) in nats; what costs most, by how much each layer adds to its input's error:"
        )?;
        for scheme in &self.schemes {
            let layers: Vec<String> = scheme.loss.layers.iter().take(LAYERS).map(ToString::to_string).collect();
            writeln!(f, "{}: {}", scheme.name, if layers.is_empty() { "-".to_owned() } else { layers.join(", ") })?;
        }
        Ok(())
    }
}
