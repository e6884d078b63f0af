//! Speed and memory of built directories, as their users would meet them: default sessions, one row, no tokenizer.
//!
//! Two directories are measured in turns within one run, because the speed of a machine drifts: the ratio of two
//! neighbours says more than the quotient of two runs. Memory and load time are taken in processes of their own
//! ([`alone`]), since sessions that share a process share its memory.

mod display;
mod machine;
mod spread;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Code, Error, Result};
use crate::generate::defaults::Defaults;
use crate::session::{Decoder, Mark, Options, Row};

pub use machine::Machine;
pub use spread::Spread;

use machine::PeakMemory;

/// Tokens that a cache is filled by at once.
const FILL: usize = 512;
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
    /// Tokens that are in the cache before the prompt; each is measured by itself.
    pub past: Vec<usize>,
    /// Threads within an operator; 0 lets onnxruntime choose.
    pub threads: usize,
    /// Keep past and present apart even where they may be one buffer.
    pub apart: bool,
}

/// The figures of one directory, or of two.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of onnxruntime, where it is known.
    pub runtime: Option<String>,
    /// Where it ran.
    pub machine: Machine,
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
    /// Tokens of the prompt per second.
    pub prefill_tokens_per_second: Spread,
    /// Later tokens per second.
    pub decode_tokens_per_second: Spread,
}

/// The first directory by the second one: above 1 in tokens per second, the first one is faster.
#[derive(Debug, Serialize)]
pub struct Ratio {
    /// Of the seconds until the session was open.
    pub load_seconds: Spread,
    /// Of the most memory.
    pub peak_bytes: Option<Spread>,
    /// Of the speeds.
    pub points: Vec<Point>,
}

/// What a process of its own finds out.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Alone {
    /// Seconds until the session was open.
    pub load_seconds: f64,
    /// Most bytes of physical memory so far; nothing where the system does not say.
    pub peak_bytes: Option<u64>,
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
    let watch = PeakMemory::watch();
    let start = Instant::now();
    let decoder = Decoder::open(dir, &plan.session())?;
    let load_seconds = start.elapsed().as_secs_f64();
    let mut loaded = Loaded::new(decoder, dir, plan)?;
    let longest = plan.past.iter().copied().max().unwrap_or(0);
    let (mut row, mark) = loaded.filled(longest, plan)?;
    loaded.round(&mut row, &mark, plan, 0)?;
    Ok(Alone { load_seconds, peak_bytes: watch.peak() })
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
    // Once is not enough, and loading a large model often takes long.
    for round in 0..plan.repeat.min(3) {
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
            peak_bytes: peaks(processes).map(|peaks| Spread::of(peaks.into_iter())),
            points: points(plan, rounds),
        })
        .collect();
    let ratio = match (processes.as_slice(), rounds.as_slice()) {
        ([a, b], [x, y]) => Some(ratio(plan, (a, b), (x, y))),
        _ => None,
    };
    let threads = (plan.threads > 0).then_some(plan.threads);
    let Plan { prompt_tokens, new_tokens, repeat, .. } = *plan;
    Ok(Report { runtime, machine: Machine::this(), threads, prompt_tokens, new_tokens, repeat, models, ratio })
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
        loaded.push(Loaded::new(Decoder::open(dir, &plan.session())?, dir, plan)?);
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

    /// A row with a number of tokens in its cache.
    fn filled(&mut self, past: usize, plan: &Plan) -> Result<(Row, Mark)> {
        let room = past.saturating_add(plan.prompt_tokens).saturating_add(plan.new_tokens);
        let mut row = self.decoder.row(room, !plan.apart)?;
        for chunk in self.tokens(past, usize::MAX).chunks(FILL) {
            self.decoder.extend(&mut row, chunk)?;
        }
        let mark = row.mark();
        Ok((row, mark))
    }

    /// One prompt and its continuation.
    fn round(&mut self, row: &mut Row, mark: &Mark, plan: &Plan, seed: usize) -> Result<Round> {
        row.return_to(mark);
        let tokens = self.tokens(plan.prompt_tokens.saturating_add(plan.new_tokens), seed);
        let (prompt, new) = tokens.split_at_checked(plan.prompt_tokens).unwrap_or((&tokens, &[]));
        let start = Instant::now();
        let logits = self.decoder.extend(row, prompt)?;
        let prefill = start.elapsed().as_secs_f64();
        let mut likeliest = likeliest(&logits);
        let first = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for token in new {
            // Choosing the token is part of every step, but the same ones are fed to every model.
            likeliest ^= self::likeliest(&self.decoder.extend(row, &[*token])?);
        }
        let decode = start.elapsed().as_secs_f64();
        std::hint::black_box(likeliest);
        Ok(Round { prefill, first, decode })
    }
}

fn likeliest(logits: &[f32]) -> usize {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(index, _)| index)
}

/// All peaks, or none if one is not known.
fn peaks(processes: &[Alone]) -> Option<Vec<f64>> {
    #[expect(clippy::cast_precision_loss, reason = "bytes of memory, for people")]
    processes.iter().map(|process| process.peak_bytes.map(|bytes| bytes as f64)).collect()
}

/// The speeds of rounds.
fn points(plan: &Plan, rounds: &[Vec<Round>]) -> Vec<Point> {
    let of = |tokens: usize, seconds: f64| f64::from(u32::try_from(tokens).unwrap_or(u32::MAX)) / seconds;
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
        peak_bytes: peaks(a).zip(peaks(b)).map(|(a, b)| divide(a, b)),
        points: plan.past.iter().zip(x.iter().zip(y)).map(point).collect(),
    }
}

impl Plan {
    fn session(&self) -> Options {
        Options { threads: self.threads, hidden_states: false }
    }

    /// Refuses a plan that measures nothing, or more than a model can hold.
    fn check(&self, dirs: &[PathBuf]) -> Result<()> {
        let counts =
            [("--prompt-tokens", self.prompt_tokens), ("--new-tokens", self.new_tokens), ("--repeat", self.repeat)];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::new(Code::UsageInvalid, name).found(0).expected("a number from 1 up"));
        }
        let past = self.past.iter().copied().max().ok_or_else(|| {
            Error::new(Code::UsageInvalid, "--past").found("nothing").expected("numbers such as 0,1024")
        })?;
        let total = past.saturating_add(self.prompt_tokens).saturating_add(self.new_tokens);
        for dir in dirs {
            if let Some(context) = Defaults::read(dir)?.context.filter(|context| *context < total) {
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
