//! Executes a plan: from the checkpoint's files to the data files, in one pass, a few chunks in memory at a time.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rayon::prelude::*;

use super::layout::{Extent, Layout, data_name};
use super::sink::{Buffer, Pool, with_sink};
use crate::bind::{Initializer, Plan};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::interrupt;
use crate::read::{Checkpoint, FileHash, hash_file};
use crate::stage::stage;
use crate::weight::{Evaluation, Tensors, convert};

/// Bytes that are computed, written and hashed at a time.
const CHUNK: usize = 4 << 20;

/// Hashes of what was read and written.
#[derive(Debug)]
pub struct Streamed {
    /// The checkpoint's files, in its order; without their hashes, if those were not asked for.
    pub sources: Vec<FileHash>,
    /// The data files.
    pub outputs: Vec<FileHash>,
}

/// Writes every initializer that is not linked into `folder`, where its layout says. `progress` is told of every
/// chunk's bytes. The checkpoint's files are hashed meanwhile, each when its turn has come, if `hash_sources` says so.
pub fn stream(
    plan: &Plan,
    layout: &Layout,
    checkpoint: &Checkpoint,
    (folder, model): (&Path, &str),
    hash_sources: bool,
    progress: impl FnMut(u64) + Send,
) -> Result<Streamed> {
    let stop = AtomicBool::new(false);
    let (turn, turns) = channel();
    let streamed = thread::scope(|scope| {
        let hashing = scope.spawn(|| sources(checkpoint, hash_sources, turns, &stop));
        let outputs = pack(plan, layout, checkpoint, (folder, model), &turn, progress);
        drop(turn);
        if outputs.is_err() {
            stop.store(true, Ordering::Relaxed);
        }
        let sources = hashing.join().map_err(|_| Error::new(Code::Io, "sources").found("they could not be hashed"))?;
        Ok(Streamed { outputs: outputs?, sources: sources? })
    })?;
    checkpoint.check_unchanged()?;
    Ok(streamed)
}

/// Hashes the checkpoint's files in the order in which their turns come, and those that nothing is taken from at last.
fn sources(checkpoint: &Checkpoint, hashed: bool, turns: Receiver<usize>, stop: &AtomicBool) -> Result<Vec<FileHash>> {
    let files = checkpoint.files();
    let plain = files.iter().map(|file| FileHash { name: file.name.clone(), size: file.size, sha256: None });
    let mut hashes: Vec<FileHash> = plain.collect();
    if hashed {
        for index in turns.into_iter().chain(0..files.len()) {
            if let (Some(file), Some(slot)) = (files.get(index), hashes.get_mut(index))
                && slot.sha256.is_none()
            {
                slot.sha256 = hash_file(&file.path, stop)?.sha256;
            }
        }
    }
    Ok(hashes)
}

/// An initializer that is to be written.
struct Task<'p> {
    initializer: &'p Initializer,
    extent: Extent,
    evaluation: Evaluation,
    /// The checkpoint's file that its first tensor lies in.
    source: Option<usize>,
}

/// A part of it, small enough to be held in memory.
struct Job<'t> {
    task: &'t Task<'t>,
    /// First element.
    first: usize,
    count: usize,
}

fn pack(
    plan: &Plan,
    layout: &Layout,
    checkpoint: &Checkpoint,
    (folder, model): (&Path, &str),
    turn: &Sender<usize>,
    mut progress: impl FnMut(u64) + Send,
) -> Result<Vec<FileHash>> {
    let paths: Vec<PathBuf> = (0..layout.written.len()).map(|i| folder.join(data_name(model, i))).collect();
    let pairs = layout.order.iter().filter_map(|i| plan.initializers.get(*i).zip(layout.extents.get(*i)));
    let tasks: Vec<Task> = pairs.map(|(i, extent)| Task::new(i, *extent, checkpoint)).collect::<Result<_>>()?;
    let mut jobs = tasks.iter().flat_map(Task::jobs);
    // Two rounds are on their way: one is computed while the other is written and hashed.
    let window = 2 * rayon::current_num_threads();
    let pool = Pool::default();
    let (mut file, mut source) = (None, None);
    let ((), files) = with_sink(paths, window, |sink| {
        loop {
            interrupt::check()?;
            let round: Vec<Job> = jobs.by_ref().take(window).collect();
            if round.is_empty() {
                return if file.is_some() { sink.end() } else { Ok(()) };
            }
            for next in round.iter().filter_map(|job| job.task.source) {
                if source.replace(next) != Some(next) {
                    // Nobody listens when the sources are not hashed.
                    let _ = turn.send(next);
                }
            }
            let compute = |job: &Job<'_>| job.compute(checkpoint, &pool);
            let chunks: Vec<Result<Buffer>> = stage!("- read, transform", round.par_iter().map(compute).collect());
            for (job, chunk) in round.iter().zip(chunks) {
                let (chunk, next) = (chunk?, job.task.extent.file);
                if file.replace(next).is_some_and(|file| file != next) {
                    sink.end()?;
                }
                progress(chunk.bytes.len() as u64);
                stage!("- wait for disk", sink.put(job.offset(), chunk))?;
            }
        }
    })?;
    Ok(files)
}

impl<'p> Task<'p> {
    fn new(initializer: &'p Initializer, extent: Extent, checkpoint: &Checkpoint) -> Result<Self> {
        let evaluation = Evaluation::new(&initializer.weight, &Stored(checkpoint))
            .map_err(|failure| failure.about(&initializer.name))?;
        if evaluation.shape != initializer.shape {
            return Err(Error::new(Code::TensorShape, &initializer.name)
                .found(format!("{:?}", evaluation.shape))
                .expected(format!("{:?}", initializer.shape)));
        }
        let first = initializer.weight.sources().first().and_then(|name| checkpoint.get(name));
        Ok(Self { initializer, extent, evaluation, source: first.map(|tensor| tensor.file) })
    }

    fn jobs(&self) -> impl Iterator<Item = Job<'_>> {
        let (total, step) = (self.evaluation.count(), CHUNK / self.initializer.element.size());
        (0..total).step_by(step).map(move |first| Job { task: self, first, count: step.min(total - first) })
    }
}

impl Job<'_> {
    /// Where it goes in the data file.
    fn offset(&self) -> u64 {
        self.task.extent.offset.saturating_add((self.first * self.task.initializer.element.size()) as u64)
    }

    fn compute<'p>(&self, checkpoint: &Checkpoint, pool: &'p Pool) -> Result<Buffer<'p>> {
        let Task { initializer, evaluation, .. } = self.task;
        let tensors = Stored(checkpoint);
        let refused = |failure: Failure| failure.about(&initializer.name);
        let mut out = pool.take(self.count * initializer.element.size());
        if evaluation.element == initializer.element {
            evaluation.fill(&tensors, self.first, &mut out.bytes).map_err(refused)?;
            return Ok(out);
        }
        let mut raw = pool.take(self.count * evaluation.element.size());
        evaluation.fill(&tensors, self.first, &mut raw.bytes).map_err(refused)?;
        convert(&raw.bytes, evaluation.element, &mut out.bytes, initializer.element)
            .map_err(|reason| refused(reason.into()))?;
        Ok(out)
    }
}

/// A checkpoint's tensors as weight expressions see them.
struct Stored<'c>(&'c Checkpoint);

enum Failure {
    Read(Error),
    Transform(String),
}

impl Failure {
    fn about(self, initializer: &str) -> Error {
        match self {
            Self::Read(error) => error,
            Self::Transform(reason) => Error::new(Code::TensorShape, initializer).found(reason),
        }
    }
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Transform(reason)
    }
}

impl Tensors for Stored<'_> {
    type Error = Failure;

    fn describe(&self, name: &str) -> Result<(ElementType, Vec<usize>), Failure> {
        let info = self.0.get(name).ok_or_else(|| format!("there is no {name}"))?;
        let element = info.dtype.element().ok_or_else(|| format!("{name} is {}", info.dtype))?;
        Ok((element, info.shape.clone()))
    }

    fn read(&self, name: &str, first: usize, out: &mut [u8]) -> Result<(), Failure> {
        let info = self.0.get(name).ok_or_else(|| format!("there is no {name}"))?;
        let element = info.dtype.element().ok_or_else(|| format!("{name} is {}", info.dtype))?;
        self.0.read(info, (first * element.size()) as u64, out).map_err(Failure::Read)
    }
}
