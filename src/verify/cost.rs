//! What quantisation cost a build, against the float reference.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::bar::{Bar, Quantisation, cache_of};
use super::layers::LayerError;
use super::metrics::Logits;
use super::quality::{Loss, Quality, Tally, compare_builds};
use super::report::{Report, Verdict};
use super::scenario::{Prompt, run_rows_alone};
use super::windows::{WINDOW, Window, text_windows};
use super::{Options, folder_of};
use crate::error::{Error, Result};
use crate::golden::Golden;
use crate::session::Decoder;
use crate::tokenizer::Tokenizer;

/// Layers that are printed.
const SHOWN: usize = 5;

/// What quantisation cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// The scheme's name.
    pub scheme: String,
    /// What it may cost.
    pub bar: Bar,
    /// Bytes of the graph and its weights.
    pub bytes: u64,
    /// What was compared.
    pub compared: Vec<Compared>,
    /// Errors of the layers' outputs, largest increase first: the parameters that cost most.
    pub layers: Vec<LayerError>,
}

/// A comparison with the float reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    /// With what: the golden's rows, or a text.
    pub on: String,
    /// How close the model is.
    #[serde(flatten)]
    pub quality: Quality,
    /// Whether it is close enough.
    pub verdict: Verdict,
}

impl Cost {
    /// A cost of which nothing is known yet; `None` for a float build, unless the caller holds it to a bar.
    pub(super) fn of(model: &Path, options: &Options) -> Option<Self> {
        let (says, cache) = (Quantisation::of(model), cache_of(model));
        let of_weights = says.as_ref().map(|says| Bar::of_bits(says.bits));
        let bar = options.bar.or(of_weights).or_else(|| cache.map(Bar::of_cache))?;
        let weights = says.map(|says| says.scheme);
        let schemes: Vec<String> = weights.into_iter().chain(cache.map(|kind| format!("an {kind} cache"))).collect();
        let scheme = if schemes.is_empty() { format!("{} bits", bar.bits) } else { schemes.join(" and ") };
        let bytes = size_on_disk(folder_of(model)).unwrap_or(0);
        Some(Self { scheme, bar, bytes, compared: Vec::new(), layers: Vec::new() })
    }

    /// What is not close enough.
    pub fn failures(&self) -> Vec<String> {
        let failed = self.compared.iter().filter(|compared| compared.verdict == Verdict::Fails);
        failed.map(|compared| compared.on.clone()).collect()
    }

    fn enter(&mut self, on: &str, loss: Loss) {
        let verdict = self.bar.verdict(&loss.quality);
        self.compared.push(Compared { on: on.into(), quality: loss.quality, verdict });
        if !loss.layers.is_empty() {
            self.layers = loss.layers;
        }
    }
}

/// Adds to a report what the golden's rows, and a reference build, say about the cost.
pub(super) fn add(
    model: &Path,
    golden: Option<&Golden>,
    prompt: &Prompt,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let Some(mut cost) = report.cost.take() else {
        if options.reference.is_some() {
            report.notes.push("--reference is for quantised builds: this one is held to its tolerance".into());
        }
        return Ok(());
    };
    let loss = golden.map(|golden| on_rows(model, golden, prompt, options)).transpose()?.flatten();
    if let Some(loss) = loss {
        cost.enter("golden rows", loss);
    }
    if let Some(reference) = &options.reference {
        let (on, loss) = on_build(model, reference, prompt, options)?;
        cost.enter(&on, loss);
    } else if options.text.is_some() {
        report.notes.push("the text has no reference: give the float build, with --reference DIR".into());
    }
    report.cost = Some(cost);
    Ok(())
}

/// Every row alone, against the golden's logits and, in the first row, its hidden states.
fn on_rows(model: &Path, golden: &Golden, prompt: &Prompt, options: &Options) -> Result<Option<Loss>> {
    let mut decoder = Decoder::open(model, &options.session(true))?;
    let got = run_rows_alone(&mut decoder, prompt)?;
    let want = Logits::from_tensor(&golden.logits);
    let mut tally = Tally::default();
    for (row, column) in places(prompt) {
        if let (Some(want), Some(got)) = (want.at(row, column), got.logits.at(row, column)) {
            tally.add_position(want, got);
        }
    }
    for (number, want) in golden.hidden_states.iter().map(Logits::from_tensor).enumerate() {
        let Some((_, got)) = got.hidden_states.iter().find(|(other, _)| *other == number) else { continue };
        for (row, column) in places(prompt).filter(|(row, _)| *row == 0) {
            if let (Some(want), Some(got)) = (want.at(row, column), got.at(row, column)) {
                tally.add_hidden_position(number, want, got);
            }
        }
    }
    Ok(tally.finish())
}

/// The places of a prompt at which a token stands.
fn places(prompt: &Prompt) -> impl Iterator<Item = (usize, usize)> {
    let all = (0..prompt.ids.rows).flat_map(|row| (0..prompt.ids.columns).map(move |column| (row, column)));
    all.filter(|(row, column)| prompt.live(*row, *column))
}

/// Against a float build of the same model, over the user's text or, without one, the prompt's rows.
fn on_build(model: &Path, reference: &Path, prompt: &Prompt, options: &Options) -> Result<(String, Loss)> {
    let (on, windows) = match &options.text {
        Some(text) => {
            let folder =
                [folder_of(model), folder_of(reference)].into_iter().find(|f| f.join("tokenizer.json").is_file());
            let tokenizer = Tokenizer::open(folder.unwrap_or(folder_of(model)))?;
            (text.display().to_string(), text_windows(&tokenizer, text, WINDOW)?)
        }
        None => ("rows, reference build".to_owned(), prompt_windows(prompt)),
    };
    let mut reference = Decoder::open(reference, &options.session(true))?;
    let mut models = [Decoder::open(model, &options.session(true))?];
    let loss = compare_builds(&mut reference, &mut models, &windows)?.pop();
    loss.map(|loss| (on, loss))
        .ok_or_else(|| Error::new(crate::error::Code::VerificationFailed, model.display()).found("nothing to compare"))
}

/// The rows of a prompt without their padding, as windows that nobody meant to be predicted.
pub fn prompt_windows(prompt: &Prompt) -> Vec<Window> {
    let row = |row: usize| {
        let live = prompt.ids.row(row).iter().enumerate().filter(|(column, _)| prompt.live(row, *column));
        Window::without_targets(live.map(|(_, id)| *id).collect())
    };
    (0..prompt.ids.rows).map(row).filter(|window| !window.ids.is_empty()).collect()
}

/// Bytes of a model's graph and weights: the files in the folder `onnx`, or of a single-folder model all that are
/// beside the graph and named after it.
///
/// # Errors
/// A folder that can not be read.
pub fn size_on_disk(directory: &Path) -> Result<u64> {
    let onnx = directory.join("onnx");
    let (folder, all) = if onnx.is_dir() { (onnx, true) } else { (directory.to_path_buf(), false) };
    let mut bytes = 0;
    for path in files(&folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
        if all || name.contains(".onnx") || ["safetensors", "data"].contains(&kind) {
            bytes += fs::metadata(&path).map_err(|e| Error::io(&path, &e))?.len();
        }
    }
    Ok(bytes)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io(folder, &e))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(|e| Error::io(folder, &e)));
    let paths = paths.collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.is_file()).collect())
}

impl fmt::Display for Cost {
    /// Some lines, each ended.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[expect(clippy::cast_precision_loss, reason = "a size for people")]
        let megabytes = self.bytes as f64 / 1e6;
        writeln!(f, "quantised ({}): {megabytes:.2} MB on disk", self.scheme)?;
        for Compared { on, quality, verdict } in &self.compared {
            writeln!(f, "against the float reference on {on}: {quality}: {}", verdict.as_str())?;
        }
        if !self.layers.is_empty() {
            let shown = self.layers.iter().take(SHOWN).map(LayerError::to_string).collect::<Vec<_>>();
            writeln!(f, "what costs most: {}", shown.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Display for LayerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:+.2} % to {:.2} %", self.name, 100.0 * self.increase, 100.0 * self.error)
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "KL {:.2e} mean, {:.2e} 99th percentile, {:.2e} largest; top-1 {:.1} %; logits off by {:.2} % \
             ({:.2e} mean, {:.2e} largest)",
            self.kl_mean,
            self.kl_p99,
            self.kl_max,
            100.0 * self.top1,
            100.0 * self.error,
            self.logit_mean,
            self.logit_max,
        )?;
        match &self.perplexity {
            Some(p) => {
                write!(f, "; perplexity {:.3}, reference {:.3} ({:+.2} %)", p.model, p.reference, 100.0 * p.change)
            }
            None => Ok(()),
        }
    }
}
