//! Several ways to quantise a model side by side: what each one saves and what it costs.
//!
//! Every build is compared with the float one over the same tokens, and their speeds are taken in turns in one run.
//! Where the builds come from is the caller's business.

mod chart;
mod display;
mod html;

use std::path::PathBuf;

use serde::Serialize;

use crate::bench::{self, Machine, Point, Spread};
use crate::error::Result;
use crate::recipe::Calibrated;
use crate::session::{Decoder, Options};
use crate::verify::{Loss, Window, compare_builds, size_on_disk};

pub use html::page;

/// A built directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is called.
    pub name: String,
    /// The directory.
    pub dir: PathBuf,
    /// What it was calibrated on, where that is known.
    pub calibration: Option<Calibration>,
}

/// The text that the float build read before a build was quantised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Calibration {
    /// What it is, for people: the name of its file.
    pub text: String,
    /// How much of it was read, and how.
    #[serde(flatten)]
    pub record: Calibrated,
}

/// The tokens over which builds are compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// What they are, for people: the name of a text.
    pub name: String,
    /// The tokens.
    pub windows: Vec<Window>,
}

/// How to compare.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Threads within an operator; 0 lets onnxruntime choose.
    pub threads: usize,
    /// How speed is measured; not at all without it.
    pub speed: Option<bench::Plan>,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// The tokens over which the builds were compared.
    pub tokens: String,
    /// Version of onnxruntime, where it is known.
    pub runtime: Option<String>,
    /// Where it ran.
    pub machine: Machine,
    /// The float build.
    pub reference: Reference,
    /// The others, in the order in which they were given.
    pub schemes: Vec<Scheme>,
}

/// The build that the others are compared with.
#[derive(Debug, Clone, Serialize)]
pub struct Reference {
    /// What it is called.
    pub name: String,
    /// Bytes of its graph and weights.
    pub bytes: u64,
    /// Its speed.
    pub speed: Option<Speed>,
}

/// A build that is compared.
#[derive(Debug, Clone, Serialize)]
pub struct Scheme {
    /// What it is called.
    pub name: String,
    /// What it was calibrated on, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// Bytes of its graph and weights.
    pub bytes: u64,
    /// What it lost.
    #[serde(flatten)]
    pub loss: Loss,
    /// Its speed.
    pub speed: Option<Speed>,
}

/// Tokens per second without a past.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Speed {
    /// Of a prompt.
    pub prefill_tokens_per_second: Spread,
    /// Of the tokens after it, one by one.
    pub decode_tokens_per_second: Spread,
}

impl Speed {
    fn of(points: &[Point]) -> Option<Self> {
        points.first().map(|point| Self {
            prefill_tokens_per_second: point.prefill_tokens_per_second,
            decode_tokens_per_second: point.decode_tokens_per_second,
        })
    }
}

/// Compares builds of one model with its float build. onnxruntime has to be loaded.
///
/// All of them are open at once, so that the reference runs once and speeds are taken in turns.
///
/// # Errors
/// A directory that does not open, a run that fails, or nothing to compare on.
pub fn run(
    model: String,
    runtime: Option<String>,
    reference: &Entry,
    entries: &[Entry],
    tokens: &Tokens,
    plan: &Plan,
) -> Result<Report> {
    let losses = losses(reference, entries, tokens, plan)?;
    let dirs: Vec<PathBuf> = [reference].into_iter().chain(entries).map(|entry| entry.dir.clone()).collect();
    let mut speeds = match &plan.speed {
        Some(speed) => bench::speeds(&dirs, speed)?.iter().map(|points| Speed::of(points)).collect(),
        None => vec![None; dirs.len()],
    }
    .into_iter();
    let reference = Reference {
        name: reference.name.clone(),
        bytes: size_on_disk(&reference.dir)?,
        speed: speeds.next().flatten(),
    };
    let mut schemes = Vec::new();
    for ((entry, loss), speed) in entries.iter().zip(losses).zip(speeds) {
        let (name, calibration) = (entry.name.clone(), entry.calibration.clone());
        schemes.push(Scheme { name, calibration, bytes: size_on_disk(&entry.dir)?, loss, speed });
    }
    Ok(Report { model, tokens: tokens.name.clone(), runtime, machine: Machine::this(), reference, schemes })
}

/// What each build lost. The sessions are closed again: those whose speed is measured return no hidden states.
fn losses(reference: &Entry, entries: &[Entry], tokens: &Tokens, plan: &Plan) -> Result<Vec<Loss>> {
    let open = |entry: &Entry| {
        Decoder::open(&entry.dir, &Options { threads: plan.threads, hidden_states: true, ..Options::default() })
    };
    let mut models = entries.iter().map(open).collect::<Result<Vec<_>>>()?;
    compare_builds(&mut open(reference)?, &mut models, &tokens.windows)
}

/// Bytes in megabytes.
fn megabytes(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let bytes = bytes as f64;
    bytes / 1e6
}
