//! Speed and memory of built directories, as their users would meet them: default sessions, no tokenizer.
//!
//! Two directories are measured in turns within one run, because the speed of a machine drifts: the ratio of two
//! neighbours says more than the quotient of two runs. Memory and load time are taken in processes of their own
//! ([`alone`]), since sessions that share a process share its memory.

mod device;
mod display;
mod machine;
mod spread;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Code, Error, Result};
use crate::generate::config::GenerationConfig;
use crate::runtime::Provider;
use crate::session::{Decoder, Mark, Options, Row};

pub use machine::Machine;
pub use spread::Spread;

use device::DeviceMemory;
use machine::PeakMemory;

/// Tokens that a cache is filled by at once.
const FILL: usize = 512;
/// Most rows that are run together.
const MOST_ROWS: usize = 4096;
/// Time in which the threads of the session before come to rest.
const REST: Duration = Duration::from_millis(20);

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded after it, one by one.
    pub new_tokens: usize,
    /// How often.
    pub repeat: usize,
    /// Processes of their own for load time and memory, one at least; no more than rounds.
    pub loads: usize,
    /// Tokens that are in the cache before the prompt; each is measured by itself.
    pub past: Vec<usize>,
    /// Rows that are run together.
    pub batch: usize,
    /// Keep past and present apart even where they may be one buffer.
    pub apart: bool,
    /// How sessions are opened.
    pub session: Options,
}

/// The figures of one directory, or of two.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of onnxruntime, where it is known.
    pub runtime: Option<String>,
    /// Where it ran.
    pub machine: Machine,
    /// On which provider.
    pub provider: Provider,
    /// Rows that were run together.
    pub batch: usize,
    /// Threads that were asked for; without it as many as onnxruntime chooses.
    pub threads: Option<usize>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded after it.
    pub new_tokens: usize,
    /// Rounds.
    pub repeat: usize,
    /// The directories.
    pub models: Vec<Model>,
    /// The first directory's figures by the second one's, round by round.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<Ratio>,
    /// What could not be measured.
    pub notes: Vec<String>,
}

/// The figures of one directory.
#[derive(Debug, Serialize)]
pub struct Model {
    /// The directory.
    pub dir: PathBuf,
    /// True if past and present were one buffer.
    pub shared_buffers: bool,
    /// Seconds until the session was open, each time in a process of its own.
    pub load_seconds: Spread,
    /// Most bytes of physical memory of a process that loads the model, runs the prompt and decodes.
    pub peak_bytes: Option<Spread>,
    /// Most bytes of a GPU's memory that the same process takes; nothing on the processor, and where it is not known.
    pub peak_device_bytes: Option<Spread>,
    /// Speed, for each number of tokens in the cache.
    pub points: Vec<Point>,
}

/// Speed with a number of tokens in the cache.
#[derive(Debug, Serialize)]
pub struct Point {
    /// That number.
    pub past: usize,
    /// Seconds from the prompt to the first new token.
    pub first_token_seconds: Spread,
    /// Tokens of the prompt per second, of all rows together.
    pub prefill_tokens_per_second: Spread,
    /// Later tokens per second, of all rows together.
    pub decode_tokens_per_second: Spread,
}

/// The first directory by the second one: above 1 in tokens per second, the first one is faster.
#[derive(Debug, Serialize)]
pub struct Ratio {
    /// Of the seconds until the session was open.
    pub load_seconds: Spread,
    /// Of the most memory.
    pub peak_bytes: Option<Spread>,
    /// Of the most memory of a GPU.
    pub peak_device_bytes: Option<Spread>,
    /// Of the speeds.
    pub points: Vec<Point>,
}

/// What a process of its own finds out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Alone {
    /// Seconds until the session was open.
    pub load_seconds: f64,
    /// Most bytes of physical memory so far; nothing where the system does not say.
    pub peak_bytes: Option<u64>,
    /// Most bytes of a GPU's memory, or why they are not known; nothing on the processor.
    pub peak_device_bytes: Option<Result<u64, String>>,
}

/// Seconds of one round.
#[derive(Debug, Clone, Copy)]
struct Round {
    prefill: f64,
    first: f64,
    decode: f64,
}

/// The rounds of one directory, for each number of tokens in the cache.
type ByPast = Vec<Vec<Round>>;

/// A directory in onnxruntime.
struct Loaded {
    decoder: Decoder,
    vocabulary: usize,
}

/// Loads a directory in this process, runs the prompt behind the longest past, and decodes.
///
/// # Errors
/// As [`run`].
pub fn alone(dir: &Path, plan: &Plan) -> Result<Alone> {
    let (watch, device) = (PeakMemory::watch(), DeviceMemory::watch(plan.session.provider));
    let start = Instant::now();
    let decoder = Decoder::open(dir, &plan.session)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let mut loaded = Loaded::new(decoder, dir, plan)?;
    let longest = plan.past.iter().copied().max().unwrap_or(0);
    let (mut row, mark) = loaded.filled(longest, plan)?;
    loaded.round(&mut row, &mark, plan, 0)?;
    let peak_device_bytes = device.map(|device| device.map(|watch| watch.peak()));
    Ok(Alone { load_seconds, peak_bytes: watch.peak(), peak_device_bytes })
}

/// Measures directories in turns. `alone` measures one in a process of its own; onnxruntime has to be loaded.
///
/// # Errors
/// A plan of nothing or beyond what a model can hold, a directory that does not open, a run that fails.
pub fn run(
    dirs: &[PathBuf],
    plan: &Plan,
    runtime: Option<String>,
    alone: &mut dyn FnMut(&Path) -> Result<Alone>,
) -> Result<Report> {
    plan.check(dirs)?;
    let mut processes = vec![Vec::new(); dirs.len()];
    for round in 0..plan.repeat.min(plan.loads.max(1)) {
        for index in turns(dirs.len(), round) {
            if let (Some(dir), Some(found)) = (dirs.get(index), processes.get_mut(index)) {
                found.push(alone(dir)?);
            }
        }
    }
    let (loaded, rounds) = rounds(dirs, plan)?;
    let models: Vec<Model> = dirs
        .iter()
        .zip(&loaded)
        .zip(processes.iter().zip(&rounds))
        .map(|((dir, loaded), (processes, rounds))| Model {
            dir: dir.clone(),
            shared_buffers: !plan.apart && loaded.decoder.shares_buffers(),
            load_seconds: Spread::of(processes.iter().map(|p| p.load_seconds)),
            peak_bytes: peaks(processes, own_peak).map(|peaks| Spread::of(peaks.into_iter())),
            peak_device_bytes: peaks(processes, device_peak).map(|peaks| Spread::of(peaks.into_iter())),
            points: points(plan, rounds),
        })
        .collect();
    let ratio = match (processes.as_slice(), rounds.as_slice()) {
        ([a, b], [x, y]) => Some(ratio(plan, (a, b), (x, y))),
        _ => None,
    };
    let Plan { prompt_tokens, new_tokens, repeat, batch, .. } = *plan;
    let Options { provider, threads, .. } = plan.session;
    let threads = (threads > 0).then_some(threads);
    let reasons = processes.iter().flatten().filter_map(|process| process.peak_device_bytes.as_ref()?.as_ref().err());
    let notes = reasons.take(1).map(|reason| format!("the GPU's memory was not measured: {reason}")).collect();
    let machine = Machine::this();
    Ok(Report { runtime, machine, provider, batch, threads, prompt_tokens, new_tokens, repeat, models, ratio, notes })
}

/// The speeds of directories that share this process, measured in turns: for each the points of the plan's pasts.
/// onnxruntime has to be loaded.
///
/// # Errors
/// As [`run`].
pub fn speeds(dirs: &[PathBuf], plan: &Plan) -> Result<Vec<Vec<Point>>> {
    plan.check(dirs)?;
    let (_, rounds) = rounds(dirs, plan)?;
    Ok(rounds.iter().map(|rounds| points(plan, rounds)).collect())
}

/// The directories in onnxruntime, and for each its rounds by past.
fn rounds(dirs: &[PathBuf], plan: &Plan) -> Result<(Vec<Loaded>, Vec<ByPast>)> {
    let mut loaded = Vec::new();
    for dir in dirs {
        loaded.push(Loaded::new(Decoder::open(dir, &plan.session)?, dir, plan)?);
    }
    let mut rounds: Vec<ByPast> = vec![Vec::new(); dirs.len()];
    for past in &plan.past {
        for (of_model, found) in rounds.iter_mut().zip(measure(&mut loaded, *past, plan)?) {
            of_model.push(found);
        }
    }
    Ok((loaded, rounds))
}

/// Every other round the other way round, so that none is always the one behind the pause.
fn turns(count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// The rounds of each model with a number of tokens in the cache.
fn measure(loaded: &mut [Loaded], past: usize, plan: &Plan) -> Result<Vec<Vec<Round>>> {
    let mut filled = Vec::new();
    for model in &mut *loaded {
        let (mut row, mark) = model.filled(past, plan)?;
        // The first run prepares what the others find ready.
        model.round(&mut row, &mark, plan, 0)?;
        filled.push((row, mark));
    }
    let mut rounds = vec![Vec::new(); loaded.len()];
    for round in 0..plan.repeat {
        for index in turns(loaded.len(), round) {
            std::thread::sleep(REST);
            let model = loaded.get_mut(index).zip(filled.get_mut(index)).zip(rounds.get_mut(index));
            if let Some(((model, (row, mark)), rounds)) = model {
                rounds.push(model.round(row, mark, plan, round)?);
            }
        }
    }
    Ok(rounds)
}

impl Loaded {
    fn new(mut decoder: Decoder, dir: &Path, plan: &Plan) -> Result<Self> {
        let mut row = decoder.row(1, !plan.apart)?;
        let vocabulary = decoder.extend(&mut row, &[0])?.len();
        if vocabulary == 0 {
            return Err(Error::new(Code::RuntimeFailed, dir.display()).found("no logits").expected("a decoder"));
        }
        Ok(Self { decoder, vocabulary })
    }

    /// Random tokens; the same for the same seed and vocabulary.
    fn tokens(&self, count: usize, seed: usize) -> Vec<i64> {
        let mut random = ChaCha8Rng::seed_from_u64(seed as u64);
        let end = i64::try_from(self.vocabulary).unwrap_or(i64::MAX);
        (0..count).map(|_| random.random_range(0..end)).collect()
    }

    /// Rows with a number of tokens in their caches.
    fn filled(&mut self, past: usize, plan: &Plan) -> Result<(Row, Mark)> {
        let room = past.saturating_add(plan.prompt_tokens).saturating_add(plan.new_tokens);
        let mut row = self.decoder.rows(plan.batch, room, !plan.apart)?;
        let tokens = self.tokens(past.saturating_mul(plan.batch), usize::MAX);
        // GroupQueryAttention takes several tokens behind others in one row only.
        let chunk = if plan.batch == 1 { FILL } else { tokens.len().max(1) };
        for tokens in tokens.chunks(chunk) {
            self.decoder.extend(&mut row, tokens)?;
        }
        let mark = row.mark();
        Ok((row, mark))
    }

    /// One prompt and its continuation.
    fn round(&mut self, row: &mut Row, mark: &Mark, plan: &Plan, seed: usize) -> Result<Round> {
        row.return_to(mark);
        let prompt = plan.prompt_tokens.saturating_mul(plan.batch);
        let tokens = self.tokens(prompt.saturating_add(plan.new_tokens.saturating_mul(plan.batch)), seed);
        let (prompt, new) = tokens.split_at_checked(prompt).unwrap_or((&tokens, &[]));
        let start = Instant::now();
        let logits = self.decoder.extend(row, prompt)?;
        let prefill = start.elapsed().as_secs_f64();
        let mut likeliest = self.likeliest(&logits);
        let first = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for tokens in new.chunks(plan.batch) {
            // Choosing the token is part of every step, but the same ones are fed to every model.
            let logits = self.decoder.extend(row, tokens)?;
            likeliest ^= self.likeliest(&logits);
        }
        let decode = start.elapsed().as_secs_f64();
        std::hint::black_box(likeliest);
        Ok(Round { prefill, first, decode })
    }

    /// The likeliest tokens of all rows, in one number.
    fn likeliest(&self, logits: &[f32]) -> usize {
        logits.chunks(self.vocabulary).map(likeliest).fold(0, |all, index| all ^ index)
    }
}

/// The place of the largest logit, found in lanes: on a GPU a step takes as long as a plain search.
fn likeliest(logits: &[f32]) -> usize {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *logit);
        }
    }
    let largest = lanes.into_iter().fold(rest, larger);
    logits.iter().position(|logit| *logit >= largest).unwrap_or(0)
}

/// Bytes of memory that a process found out.
type Peak = fn(&Alone) -> Option<u64>;

fn own_peak(process: &Alone) -> Option<u64> {
    process.peak_bytes
}

fn device_peak(process: &Alone) -> Option<u64> {
    process.peak_device_bytes.as_ref()?.as_ref().ok().copied()
}

/// All peaks, or none if one is not known.
fn peaks(processes: &[Alone], of: Peak) -> Option<Vec<f64>> {
    #[expect(clippy::cast_precision_loss, reason = "bytes of memory, for people")]
    processes.iter().map(|process| of(process).map(|bytes| bytes as f64)).collect()
}

/// The speeds of rounds.
fn points(plan: &Plan, rounds: &[Vec<Round>]) -> Vec<Point> {
    let of = |tokens: usize, seconds: f64| {
        f64::from(u32::try_from(tokens.saturating_mul(plan.batch)).unwrap_or(u32::MAX)) / seconds
    };
    let point = |(past, rounds): (&usize, &Vec<Round>)| Point {
        past: *past,
        first_token_seconds: Spread::of(rounds.iter().map(|r| r.first)),
        prefill_tokens_per_second: Spread::of(rounds.iter().map(|r| of(plan.prompt_tokens, r.prefill))),
        decode_tokens_per_second: Spread::of(rounds.iter().map(|r| of(plan.new_tokens, r.decode))),
    };
    plan.past.iter().zip(rounds).map(point).collect()
}

fn ratio(plan: &Plan, (a, b): (&[Alone], &[Alone]), (x, y): (&[Vec<Round>], &[Vec<Round>])) -> Ratio {
    let divide = |a: Vec<f64>, b: Vec<f64>| Spread::of(a.into_iter().zip(b).map(|(a, b)| a / b));
    let point = |(past, (x, y)): (&usize, (&Vec<Round>, &Vec<Round>))| {
        let each = |of: fn(&Round) -> f64| divide(x.iter().map(of).collect(), y.iter().map(of).collect());
        // A speed's ratio is the inverse of the time's.
        let speed = |of: fn(&Round) -> f64| divide(y.iter().map(of).collect(), x.iter().map(of).collect());
        Point {
            past: *past,
            first_token_seconds: each(|r| r.first),
            prefill_tokens_per_second: speed(|r| r.prefill),
            decode_tokens_per_second: speed(|r| r.decode),
        }
    };
    let loads = |processes: &[Alone]| processes.iter().map(|p| p.load_seconds).collect();
    Ratio {
        load_seconds: divide(loads(a), loads(b)),
        peak_bytes: peaks(a, own_peak).zip(peaks(b, own_peak)).map(|(a, b)| divide(a, b)),
        peak_device_bytes: peaks(a, device_peak).zip(peaks(b, device_peak)).map(|(a, b)| divide(a, b)),
        points: plan.past.iter().zip(x.iter().zip(y)).map(point).collect(),
    }
}

impl Plan {
    /// Refuses a plan that measures nothing, or more than a model can hold.
    fn check(&self, dirs: &[PathBuf]) -> Result<()> {
        let counts = [
            ("--prompt-tokens", self.prompt_tokens),
            ("--new-tokens", self.new_tokens),
            ("--repeat", self.repeat),
            ("--batch", self.batch),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::new(Code::UsageInvalid, name).found(0).expected("a number from 1 up"));
        }
        if self.batch > MOST_ROWS {
            return Err(Error::new(Code::UsageInvalid, "--batch")
                .found(self.batch)
                .expected(format!("at most {MOST_ROWS}")));
        }
        let past = self.past.iter().copied().max().ok_or_else(|| {
            Error::new(Code::UsageInvalid, "--past").found("nothing").expected("numbers such as 0,1024")
        })?;
        let total = past.saturating_add(self.prompt_tokens).saturating_add(self.new_tokens);
        for dir in dirs {
            if let Some(context) = GenerationConfig::read(dir)?.context.filter(|context| *context < total) {
                return Err(Error::new(Code::UsageInvalid, dir.display())
                    .found(format!(
                        "{past} tokens of --past, {} of the prompt, {} new ones",
                        self.prompt_tokens, self.new_tokens
                    ))
                    .expected(format!("at most the model's {context} together"))
                    .help("choose smaller --past, --prompt-tokens or --new-tokens"));
            }
        }
        Ok(())
    }
}
