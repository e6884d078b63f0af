//! Figures as a table.

use std::fmt;

use super::{Report, Spread};
use crate::runtime::Provider;

const LABEL: usize = 18;
const CELL: usize = 28;

impl fmt::Display for Report {
    /// A line for each figure, a column for each directory and one for their ratio: median (smallest to largest).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = self.runtime.as_deref().unwrap_or("of unknown version");
        let machine = &self.machine;
        let cpu = machine.cpu.as_deref().unwrap_or(&machine.platform);
        let cores = machine.cores.map_or_else(String::new, |cores| format!(", {cores} cores"));
        let threads = self.threads.map_or_else(String::new, |threads| format!(", {threads} threads"));
        let provider = match self.provider {
            Provider::Cpu => String::new(),
            Provider::Cuda => ", on the GPU".to_owned(),
        };
        writeln!(f, "onnxruntime {version} on {cpu}{cores}{threads}{provider}")?;
        let batch = if self.batch == 1 { String::new() } else { format!("{} rows, ", self.batch) };
        writeln!(
            f,
            "{batch}{} prompt tokens, {} new ones, {} rounds: median (smallest to largest)\n",
            self.prompt_tokens, self.new_tokens, self.repeat
        )?;
        let mut head: Vec<String> = self.models.iter().map(|model| model.dir.display().to_string()).collect();
        head.extend(self.ratio.as_ref().map(|_| "left / right".to_owned()));
        line(f, "", &head)?;
        let shared = |shared: bool| if shared { "one for past and present" } else { "past and present apart" };
        line(f, "caches", &self.models.iter().map(|m| shared(m.shared_buffers).to_owned()).collect::<Vec<_>>())?;
        let ratio = |of: Option<Spread>| of.map(|spread| cell(spread, 1.0, 2));
        let mut row = |label: &str, of: Vec<Option<Spread>>, by: Option<Spread>, scale: f64, digits: usize| {
            let unknown = || "unknown".to_owned();
            let mut cells: Vec<String> =
                of.into_iter().map(|spread| spread.map_or_else(unknown, |s| cell(s, scale, digits))).collect();
            cells.extend(ratio(by));
            line(f, label, &cells)
        };
        let models = &self.models;
        let by = self.ratio.as_ref();
        row("load ms", models.iter().map(|m| Some(m.load_seconds)).collect(), by.map(|r| r.load_seconds), 1e3, 1)?;
        let mib = 1.0 / f64::from(1 << 20);
        row("peak memory MiB", models.iter().map(|m| m.peak_bytes).collect(), by.and_then(|r| r.peak_bytes), mib, 1)?;
        if models.iter().any(|m| m.peak_device_bytes.is_some()) {
            let cells = models.iter().map(|m| m.peak_device_bytes).collect();
            row("GPU memory MiB", cells, by.and_then(|r| r.peak_device_bytes), mib, 1)?;
        }
        let pasts = models.first().map_or(&[] as &[_], |model| &model.points);
        for (index, point) in pasts.iter().enumerate() {
            row(&format!("past {}", point.past), Vec::new(), None, 1.0, 0)?;
            let of = |get: fn(&super::Point) -> Spread| {
                let cells = models.iter().map(|m| m.points.get(index).map(get)).collect::<Vec<_>>();
                (cells, by.and_then(|ratio| ratio.points.get(index)).map(get))
            };
            for (label, get, scale) in [
                ("  first token ms", (|p| p.first_token_seconds) as fn(&super::Point) -> Spread, 1e3),
                ("  prefill tokens/s", |p| p.prefill_tokens_per_second, 1.0),
                ("  decode tokens/s", |p| p.decode_tokens_per_second, 1.0),
            ] {
                let (cells, by) = of(get);
                row(label, cells, by, scale, 1)?;
            }
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

fn cell(spread: Spread, scale: f64, digits: usize) -> String {
    let [min, median, max] = [spread.min, spread.median, spread.max].map(|value| value * scale);
    format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
}

fn line(f: &mut fmt::Formatter<'_>, label: &str, cells: &[String]) -> fmt::Result {
    let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:<CELL$}")).collect();
    writeln!(f, "{}", format!("{label:<LABEL$}  {}", cells.join("  ")).trim_end())
}
