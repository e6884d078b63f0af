//! Executes a plan: from the checkpoint's files to the data files, in one pass, a few chunks in memory at a time.

use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rayon::prelude::*;
use tempfile::SpooledTempFile;

use super::layout::{DataFile, Extent, Layout, data_name};
use super::sink::{Buffer, Pool, Sink, with_sink};
use crate::bind::{Initializer, Plan};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::interrupt;
use crate::lower::Part;
use crate::quantize::{Algorithm, Blocks, Inputs, ScaleType, Scheme, pack_rows, quantize_rows, quantize_with_inputs};
use crate::read::{Checkpoint, FileHash, hash_file};
use crate::stage::stage;
use crate::weight::{Evaluation, Tensors, Weight, convert, read_floats, write_floats};

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

/// What is known of the inputs of matrices that are quantised, each an expression over tensors.
pub trait Calibration: Send {
    /// Says which matrices will be asked for, each once, in which order, and what they become.
    fn announce(&mut self, matrices: &[(&Weight, Scheme)]);

    /// The inputs of the next matrix; none, if nothing is known of them.
    ///
    /// # Errors
    /// They can not be found out.
    fn next(&mut self) -> Result<Option<Arc<Inputs>>>;
}

/// Writes every initializer that is not linked into `folder`, where its layout says. `progress` is told of every
/// chunk's bytes. The checkpoint's files are hashed meanwhile, each when its turn has come, if `hash_sources` says so.
pub fn stream(
    plan: &Plan,
    layout: &Layout,
    checkpoint: &Checkpoint,
    (folder, model): (&Path, &str),
    hash_sources: bool,
    calibration: Option<&mut dyn Calibration>,
    progress: impl FnMut(u64) + Send,
) -> Result<Streamed> {
    let stop = AtomicBool::new(false);
    let (turn, turns) = channel();
    let streamed = thread::scope(|scope| {
        let hashing = scope.spawn(|| sources(checkpoint, hash_sources, turns, &stop));
        let outputs = pack((plan, layout), checkpoint, (folder, model), &turn, calibration, progress);
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

/// Initializers that are written together: one, or the parts of a quantised matrix, the integers first.
struct Task<'p> {
    initializer: &'p Initializer,
    extent: Extent,
    evaluation: Evaluation,
    /// Scales and zero points.
    sides: Vec<(Part, Extent)>,
    /// The checkpoint's file that its first tensor lies in.
    source: Option<usize>,
}

/// A part of a task, small enough to be held in memory.
struct Job<'t> {
    task: &'t Task<'t>,
    /// First element of what the initializer is made from.
    first: usize,
    count: usize,
    inputs: Option<Arc<Inputs>>,
}

/// What a job computes.
struct Chunk<'p> {
    bytes: Buffer<'p>,
    sides: Vec<Vec<u8>>,
}

fn pack(
    (plan, layout): (&Plan, &Layout),
    checkpoint: &Checkpoint,
    (folder, model): (&Path, &str),
    turn: &Sender<usize>,
    calibration: Option<&mut dyn Calibration>,
    mut progress: impl FnMut(u64) + Send,
) -> Result<Vec<FileHash>> {
    let paths: Vec<PathBuf> = (0..layout.written.len()).map(|i| folder.join(data_name(model, i))).collect();
    let tasks = tasks(plan, layout, checkpoint)?;
    let mut jobs = tasks.iter().flat_map(Task::jobs);
    let mut known = Known::new(&tasks, calibration);
    // Two rounds are on their way: one is computed while the other is written and hashed.
    let window = 2 * rayon::current_num_threads();
    let pool = Pool::default();
    let mut source = None;
    let ((), files) = with_sink(paths, window, |sink| {
        let mut place = Place { sink, pool: &pool, file: None, sides: Vec::new() };
        loop {
            interrupt::check()?;
            let mut round: Vec<Job> = jobs.by_ref().take(window).collect();
            if round.is_empty() {
                return place.end();
            }
            round.iter_mut().try_for_each(|job| known.tell(job))?;
            for next in round.iter().filter_map(|job| job.task.source) {
                if source.replace(next) != Some(next) {
                    // Nobody listens when the sources are not hashed.
                    let _ = turn.send(next);
                }
            }
            let compute = |job: &Job<'_>| job.compute(checkpoint, &pool);
            let chunks: Vec<Result<Chunk>> = stage!("- read, transform", round.par_iter().map(compute).collect());
            for (job, chunk) in round.iter().zip(chunks) {
                let chunk = chunk?;
                progress(chunk.bytes.bytes.len() as u64);
                stage!("- wait for disk", place.put(job, chunk, folder))?;
            }
        }
    })?;
    Ok(files)
}

/// Tells jobs of the inputs of their matrices.
struct Known<'c> {
    calibration: Option<&'c mut dyn Calibration>,
    /// Of the matrix that is being written.
    inputs: Option<Arc<Inputs>>,
}

impl<'c> Known<'c> {
    fn new(tasks: &[Task], mut calibration: Option<&'c mut dyn Calibration>) -> Self {
        let matrices = tasks.iter().map(|task| task.initializer);
        let matrices = matrices.filter_map(|matrix| Some((&matrix.weight, matrix.quantized?.0)));
        let matrices: Vec<(&Weight, Scheme)> = matrices.collect();
        if let Some(calibration) = &mut calibration {
            calibration.announce(&matrices);
        }
        Self { calibration, inputs: None }
    }

    fn tell(&mut self, job: &mut Job) -> Result<()> {
        let Some(calibration) = self.calibration.as_mut().filter(|_| job.task.initializer.quantized.is_some()) else {
            return Ok(());
        };
        if job.first == 0 {
            // Let go before the next ones are made.
            self.inputs = None;
            self.inputs = stage!("- calibrate", calibration.next())?;
        }
        job.inputs.clone_from(&self.inputs);
        Ok(())
    }
}

/// Puts chunks where they belong, and scales and zero points behind the integers that they come with.
struct Place<'k, 's, 'p> {
    sink: &'k mut Sink<'s, 'p>,
    pool: &'p Pool,
    file: Option<DataFile>,
    sides: Vec<SpooledTempFile>,
}

/// Scales and zero points that are waiting for their turn: more than this waits on the disk.
const WAITING: usize = 32 << 20;

impl<'p> Place<'_, '_, 'p> {
    fn put(&mut self, job: &Job, chunk: Chunk<'p>, folder: &Path) -> Result<()> {
        let io = |error: std::io::Error| Error::io(folder, &error);
        let task = job.task;
        self.at(task.extent.file, job.offset(), chunk.bytes)?;
        for (index, side) in chunk.sides.iter().enumerate() {
            if self.sides.len() <= index {
                self.sides.push(tempfile::spooled_tempfile_in(WAITING, folder));
            }
            if let Some(waiting) = self.sides.get_mut(index) {
                waiting.write_all(side).map_err(io)?;
            }
        }
        if job.first + job.count < task.evaluation.count() {
            return Ok(());
        }
        for ((_, extent), mut waiting) in task.sides.iter().zip(std::mem::take(&mut self.sides)) {
            waiting.rewind().map_err(io)?;
            let (mut offset, mut left) = (extent.offset, extent.length);
            while left > 0 {
                let length = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK);
                let mut buffer = self.pool.take(length);
                waiting.read_exact(&mut buffer.bytes).map_err(io)?;
                self.at(extent.file, offset, buffer)?;
                (offset, left) = (offset + length as u64, left - length as u64);
            }
        }
        Ok(())
    }

    fn at(&mut self, file: DataFile, offset: u64, bytes: Buffer<'p>) -> Result<()> {
        if self.file.replace(file).is_some_and(|before| before != file) {
            self.sink.end()?;
        }
        self.sink.put(offset, bytes)
    }

    fn end(self) -> Result<()> {
        if self.file.is_some() { self.sink.end() } else { Ok(()) }
    }
}

fn tasks<'p>(plan: &'p Plan, layout: &Layout, checkpoint: &Checkpoint) -> Result<Vec<Task<'p>>> {
    let mut tasks: Vec<Task> = Vec::new();
    for index in &layout.order {
        let pair = plan.initializers.get(*index).zip(layout.extents.get(*index));
        let Some((initializer, extent)) = pair else { continue };
        match initializer.quantized {
            // They stand behind their integers, and come with them.
            Some((_, part @ (Part::Scales | Part::ZeroPoints | Part::SignedZeroPoints))) => {
                let integers = tasks.last_mut().filter(|task| task.initializer.weight == initializer.weight);
                let integers = integers.ok_or_else(|| {
                    Error::new(Code::SpecInvalid, &initializer.name).found(format!("{part} without their integers"))
                })?;
                integers.sides.push((part, *extent));
            }
            _ => tasks.push(Task::new(initializer, *extent, checkpoint)?),
        }
    }
    Ok(tasks)
}

impl<'p> Task<'p> {
    fn new(initializer: &'p Initializer, extent: Extent, checkpoint: &Checkpoint) -> Result<Self> {
        let evaluation = Evaluation::new(&initializer.weight, &Stored(checkpoint))
            .map_err(|failure| failure.about(&initializer.name))?;
        if evaluation.shape != initializer.shape && initializer.quantized.is_none() {
            return Err(Error::new(Code::TensorShape, &initializer.name)
                .found(format!("{:?}", evaluation.shape))
                .expected(format!("{:?}", initializer.shape)));
        }
        let first = initializer.weight.sources().first().and_then(|name| checkpoint.get(name));
        Ok(Self { initializer, extent, evaluation, sides: Vec::new(), source: first.map(|tensor| tensor.file) })
    }

    /// Columns of a quantised matrix.
    fn columns(&self) -> usize {
        self.evaluation.shape.last().copied().unwrap_or(1).max(1)
    }

    fn jobs(&self) -> impl Iterator<Item = Job<'_>> {
        let total = self.evaluation.count();
        let step = match self.initializer.quantized {
            None => CHUNK / self.initializer.element.size(),
            // Whole rows, as many as fit as floats.
            Some(_) => (CHUNK / 4 / self.columns()).max(1) * self.columns(),
        };
        (0..total).step_by(step).map(move |first| Job {
            task: self,
            first,
            count: step.min(total - first),
            inputs: None,
        })
    }
}

impl Job<'_> {
    /// Where it goes in the data file.
    fn offset(&self) -> u64 {
        let Task { initializer, extent, .. } = self.task;
        let before = match initializer.quantized {
            None => self.first * initializer.element.size(),
            Some((scheme, Part::SignedData)) => self.first * usize::from(scheme.bits()) / 8,
            Some((scheme, _)) => self.first / self.task.columns() * scheme.row_bytes(self.task.columns()),
        };
        extent.offset.saturating_add(before as u64)
    }

    fn compute<'p>(&self, checkpoint: &Checkpoint, pool: &'p Pool) -> Result<Chunk<'p>> {
        let Task { initializer, evaluation, .. } = self.task;
        let tensors = Stored(checkpoint);
        let refused = |failure: Failure| failure.about(&initializer.name);
        if let Some((scheme, part)) = initializer.quantized {
            return self.quantize(&tensors, pool, &scheme, part).map_err(refused);
        }
        let mut out = pool.take(self.count * initializer.element.size());
        if evaluation.element == initializer.element {
            evaluation.fill(&tensors, self.first, &mut out.bytes).map_err(refused)?;
            return Ok(Chunk { bytes: out, sides: Vec::new() });
        }
        let mut raw = pool.take(self.count * evaluation.element.size());
        evaluation.fill(&tensors, self.first, &mut raw.bytes).map_err(refused)?;
        convert(&raw.bytes, evaluation.element, &mut out.bytes, initializer.element)
            .map_err(|reason| refused(reason.into()))?;
        Ok(Chunk { bytes: out, sides: Vec::new() })
    }

    /// Rows of a matrix as integers, and the scales and zero points that come with them.
    fn quantize<'p>(
        &self,
        tensors: &Stored<'_>,
        pool: &'p Pool,
        scheme: &Scheme,
        part: Part,
    ) -> Result<Chunk<'p>, Failure> {
        let sides = &self.task.sides;
        let (blocks, zeros) = if scheme.algorithm() == Algorithm::Stored {
            self.stored(tensors, scheme)?
        } else {
            (self.rounded(tensors, pool, scheme)?, Vec::new())
        };
        let mut bytes = pool.take(blocks.data.len());
        bytes.bytes.copy_from_slice(&blocks.data);
        if part == Part::SignedData {
            make_signed(&mut bytes.bytes, scheme);
        }
        let element = match scheme.scales() {
            ScaleType::Float32 => ElementType::F32,
            ScaleType::Float16 => ElementType::F16,
            ScaleType::BFloat16 => ElementType::BF16,
        };
        let mut beside = Vec::new();
        for (part, _) in sides {
            let mut side = blocks.zero_points.clone().unwrap_or_default();
            let floats = match part {
                Part::Scales => Some(&blocks.scales),
                Part::ZeroPoints if scheme.has_float_zeros() => Some(&zeros),
                _ => None,
            };
            if let Some(floats) = floats {
                side = vec![0; floats.len() * element.size()];
                write_floats(floats, element, &mut side)?;
            } else if *part == Part::SignedZeroPoints {
                make_signed(&mut side, scheme);
            }
            beside.push(side);
        }
        Ok(Chunk { bytes, sides: beside })
    }

    /// Rows of floats, rounded to integers.
    fn rounded(&self, tensors: &Stored<'_>, pool: &Pool, scheme: &Scheme) -> Result<Blocks, Failure> {
        let evaluation = &self.task.evaluation;
        let mut raw = pool.take(self.count * evaluation.element.size());
        evaluation.fill(tensors, self.first, &mut raw.bytes)?;
        let mut values = Vec::with_capacity(self.count);
        read_floats(&raw.bytes, evaluation.element, &mut values)?;
        drop(raw);
        Ok(match &self.inputs {
            Some(inputs) => quantize_with_inputs(&values, inputs, scheme)?,
            None => quantize_rows(&values, self.task.columns(), None, scheme)?,
        })
    }

    /// Rows of the integers that the checkpoint holds, with its zero points.
    fn stored(&self, tensors: &Stored<'_>, scheme: &Scheme) -> Result<(Blocks, Vec<f32>), Failure> {
        let (columns, blocks) = (self.task.columns(), scheme.blocks(self.task.columns()));
        let rows = self.count / columns;
        let lost = || "rows that are no rows of a quantised tensor".to_owned();
        let mut places = Vec::with_capacity(rows);
        for slot in 0..rows {
            let (name, at) = self.task.evaluation.origin(self.first + slot * columns).ok_or_else(lost)?;
            places.push((name, at / columns, slot));
        }
        places.sort_unstable();
        let (mut codes, mut scales) = (vec![0; self.count], vec![0.0; rows * blocks]);
        let mut zeros = scales.clone();
        for run in places.chunk_by(|a, b| a.0 == b.0 && a.1 + 1 == b.1) {
            let (Some((name, first, _)), Some((_, last, _))) = (run.first(), run.last()) else { continue };
            let tensor = tensors.0.get(name).ok_or_else(lost)?;
            let made = tensors.0.affine_rows(tensor, *first..*last + 1).map_err(Failure::Read)?;
            for (row, (_, _, slot)) in run.iter().enumerate() {
                deal(&made.codes, row, &mut codes, *slot, columns).ok_or_else(lost)?;
                deal(&made.scales, row, &mut scales, *slot, blocks).ok_or_else(lost)?;
                deal(&made.zeros, row, &mut zeros, *slot, blocks).ok_or_else(lost)?;
            }
        }
        Ok((pack_rows(&codes, scales, &zeros, columns, scheme)?, zeros))
    }
}

/// Copies a row to its place among others.
fn deal<T: Copy>(from: &[T], row: usize, to: &mut [T], slot: usize, length: usize) -> Option<()> {
    let from = from.get(row * length..(row + 1) * length)?;
    to.get_mut(slot * length..(slot + 1) * length)?.copy_from_slice(from);
    Some(())
}

/// Less the implicit zero point, in two's complement: the highest bit of each integer flips.
fn make_signed(integers: &mut [u8], scheme: &Scheme) {
    let flip = if scheme.bits() == 4 { 0x88 } else { 0x80 };
    for byte in integers {
        *byte ^= flip;
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
