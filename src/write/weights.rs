//! Executes a plan: from the checkpoint's files to the data files, in one pass, a few chunks in memory at a time.

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use tempfile::SpooledTempFile;

use super::layout::{DataFile, Extent, Layout, data_name};
use super::rounded::{Ledger, Zeros, note};
use super::sink::{Buffer, Pool, Sink, with_sink};
use super::sources::{Passed, Sources, unhashed, with_sources};
use super::space::memory;
use crate::bind::{Failure, Initializer, Linked, Plan, Values, stored_at};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::interrupt;
use crate::lower::Part;
use crate::quantize::{Algorithm, Blocks, Inputs, ScaleType, Scheme, pack_rows, quantize_rows, quantize_with_inputs};
use crate::read::{Checkpoint, FileHash};
use crate::stage::stage;
use crate::weight::{Evaluation, Rounding, Weight, convert, read_floats, write_floats};

/// Bytes that are computed, written and hashed at a time: what is read should still be in the caches when it is hashed.
const CHUNK: usize = 1 << 20;
/// Floats that are quantised at a time.
const FLOATS: usize = 1 << 20;
/// How far ahead of what is being read the system is told to read.
const AHEAD: u64 = 32 << 20;

/// Chunks of a round, which are computed together, and of what may wait for the disk and for each hash meanwhile.
fn window() -> usize {
    (2 * rayon::current_num_threads()).clamp(8, 64)
}

/// Buffers of bytes as the checkpoint holds them, and of bytes as they are written.
struct Pools {
    raw: Pool,
    out: Pool,
}

impl Pools {
    /// As many buffers as can be in use: a round, those that wait, and the one that is being consumed.
    fn new(window: usize) -> Self {
        let count = 2 * window + 1;
        Self { raw: Pool::new(count), out: Pool::new(count) }
    }
}

/// Hashes of what was read and written.
#[derive(Debug)]
pub struct Streamed {
    /// The checkpoint's files, in its order; without their hashes, if those were not asked for.
    pub sources: Vec<FileHash>,
    /// The data files.
    pub outputs: Vec<FileHash>,
    /// Tensors of which values became 0 when they were rounded.
    pub rounded_to_zero: BTreeMap<String, Zeros>,
    /// What of that is worth a word.
    pub notes: Vec<String>,
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
    let window = window();
    let pools = Pools::new(window);
    let to = (folder, model);
    let ((outputs, ledger), sources) = if hash_sources {
        with_sources(checkpoint, window, |sources| {
            pack((plan, layout), checkpoint, to, (window, &pools), Some(sources), calibration, progress)
        })
    } else {
        let packed = pack((plan, layout), checkpoint, to, (window, &pools), None, calibration, progress);
        packed.map(|packed| (packed, unhashed(checkpoint)))
    }?;
    checkpoint.check_unchanged()?;
    let rounded_to_zero = ledger.settle()?;
    let notes = note(&rounded_to_zero).into_iter().collect();
    Ok(Streamed { sources, outputs, rounded_to_zero, notes })
}

/// Initializers that are written together: one, or the parts of a quantised matrix, the integers first.
struct Task<'p> {
    initializer: &'p Initializer,
    extent: Extent,
    evaluation: Evaluation,
    /// Scales and zero points.
    sides: Vec<(Part, Extent)>,
    /// Where the tensors that it is made from begin.
    place: Option<(usize, u64)>,
    /// What it is in the checkpoint's file, if it is made from the bytes that lie there together.
    stored: Option<Linked>,
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
    bytes: Arc<Buffer<'p>>,
    /// The bytes that it was made from, if they lie together.
    raw: Option<Arc<Buffer<'p>>>,
    sides: Vec<Vec<u8>>,
    /// What rounding did to parts of tensors.
    rounding: Vec<(String, Rounding, ElementType)>,
}

fn pack<'p>(
    (plan, layout): (&Plan, &Layout),
    checkpoint: &Checkpoint,
    (folder, model): (&Path, &str),
    (window, pools): (usize, &'p Pools),
    sources: Option<&Sources<'p>>,
    calibration: Option<&mut dyn Calibration>,
    mut progress: impl FnMut(u64) + Send,
) -> Result<(Vec<FileHash>, Ledger)> {
    let mut ledger = Ledger::default();
    let paths: Vec<PathBuf> = (0..layout.written.len()).map(|i| folder.join(data_name(model, i))).collect();
    let tasks = tasks(plan, layout, checkpoint)?;
    let mut jobs = tasks.iter().flat_map(Task::jobs);
    let mut known = Known::new(&tasks, calibration);
    let overflows = overflows_page_cache(checkpoint, layout);
    let ((), files) = with_sink(paths, window, |sink| {
        let mut place = Place { sink, pool: &pools.out, file: None, sides: Vec::new() };
        loop {
            interrupt::check()?;
            let mut round: Vec<Job> = jobs.by_ref().take(window).collect();
            if round.is_empty() {
                return place.end();
            }
            round.iter_mut().try_for_each(|job| known.tell(job))?;
            round
                .iter()
                .filter_map(Job::stored)
                .for_each(|(file, range)| checkpoint.will_need(file, range.start + AHEAD, range.end - range.start));
            let compute = |job: &Job<'_>| job.compute(checkpoint, pools);
            let chunks: Vec<Result<Chunk>> = stage!("- read, transform", round.par_iter().map(compute).collect());
            if overflows {
                let read = round.iter().filter_map(Job::stored);
                read.for_each(|(file, range)| checkpoint.will_not_need(file, range.start, range.end - range.start));
            }
            for (job, chunk) in round.iter().zip(chunks) {
                let mut chunk = chunk?;
                chunk.rounding.iter().try_for_each(|(name, part, element)| ledger.add(name, part, *element))?;
                progress(chunk.bytes.bytes.len() as u64);
                if let (Some(sources), Some(passed)) = (sources, job.passed(chunk.raw.take())) {
                    stage!("- wait for hashes", sources.pass(passed))?;
                }
                stage!("- wait for disk", place.put(job, chunk, folder))?;
            }
        }
    })?;
    Ok((files, ledger))
}

/// True if what is read and what is written can not both stay in memory for whoever reads them next.
fn overflows_page_cache(checkpoint: &Checkpoint, layout: &Layout) -> bool {
    let read: u64 = checkpoint.files().iter().map(|file| file.size).sum();
    memory().is_some_and(|memory| read.saturating_add(layout.written_bytes()) > memory / 2)
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
                self.at(extent.file, offset, Arc::new(buffer))?;
                (offset, left) = (offset + length as u64, left - length as u64);
            }
        }
        Ok(())
    }

    fn at(&mut self, file: DataFile, offset: u64, bytes: Arc<Buffer<'p>>) -> Result<()> {
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
        let evaluation = Evaluation::new(&initializer.weight, &Values(checkpoint))
            .map_err(|failure| failure.about(&initializer.name))?;
        if evaluation.shape != initializer.shape && initializer.quantized.is_none() {
            return Err(Error::new(Code::TensorShape, &initializer.name)
                .found(format!("{:?}", evaluation.shape))
                .expected(format!("{:?}", initializer.shape)));
        }
        let sources = initializer.weight.sources().into_iter().filter_map(|name| checkpoint.get(name));
        let place = sources.map(|tensor| (tensor.file, tensor.offset)).min();
        let stored = stored_at(&initializer.weight, checkpoint);
        Ok(Self { initializer, extent, evaluation, sides: Vec::new(), place, stored })
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
            Some(_) => (FLOATS / self.columns()).max(1) * self.columns(),
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

    /// Which of the checkpoint's files it is a part of, and which.
    fn stored(&self) -> Option<(usize, Range<u64>)> {
        let Task { evaluation, stored, .. } = self.task;
        let stored = stored.as_ref()?;
        let size = evaluation.element.size();
        let start = stored.offset + (self.first * size) as u64;
        Some((stored.file, start..start + (self.count * size) as u64))
    }

    /// What the hash of the checkpoint's file is told: bytes that it need not read again, or how far it may read.
    fn passed<'p>(&self, raw: Option<Arc<Buffer<'p>>>) -> Option<Passed<'p>> {
        if let (Some((file, range)), Some(bytes)) = (self.stored(), raw) {
            return Some(Passed { file, offset: range.start, bytes: Some(bytes) });
        }
        let (file, offset) = self.task.place.filter(|_| self.first == 0)?;
        Some(Passed { file, offset, bytes: None })
    }

    fn compute<'p>(&self, checkpoint: &Checkpoint, pools: &'p Pools) -> Result<Chunk<'p>> {
        let Task { initializer, evaluation, stored, .. } = self.task;
        let tensors = Values(checkpoint);
        let refused = |failure: Failure| failure.about(&initializer.name);
        if let Some((scheme, part)) = initializer.quantized {
            return self.quantize(&tensors, pools, &scheme, part).map_err(refused);
        }
        let same = evaluation.element == initializer.element;
        let pool = if same { &pools.out } else { &pools.raw };
        let mut raw = pool.take(self.count * evaluation.element.size());
        evaluation.fill(&tensors, self.first, &mut raw.bytes).map_err(refused)?;
        let raw = Arc::new(raw);
        let mut rounding = Vec::new();
        let bytes = if same {
            Arc::clone(&raw)
        } else {
            let mut out = pools.out.take(self.count * initializer.element.size());
            let (from, to) = (evaluation.element, initializer.element);
            for (name, part) in self.runs() {
                let mut counted = Rounding::default();
                let of = |element: ElementType| part.start * element.size()..part.end * element.size();
                let (Some(raw), Some(out)) = (raw.bytes.get(of(from)), out.bytes.get_mut(of(to))) else { continue };
                convert(raw, from, out, to, &mut counted).map_err(|reason| refused(reason.into()))?;
                rounding.push((name, counted, to));
            }
            Arc::new(out)
        };
        Ok(Chunk { bytes, raw: stored.map(|_| raw), sides: Vec::new(), rounding })
    }

    /// Runs of rows that are made from one tensor, each with its name; all of the job's elements are in one.
    fn runs(&self) -> Vec<(String, Range<usize>)> {
        let Task { initializer, evaluation, .. } = self.task;
        let columns = self.task.columns();
        let name = |at: usize| evaluation.source(at).unwrap_or(&initializer.name);
        let rows = self.first / columns..(self.first + self.count).div_ceil(columns);
        let mut runs: Vec<(String, Range<usize>)> = Vec::new();
        for row in rows {
            let start = (row * columns).max(self.first) - self.first;
            let end = ((row + 1) * columns).min(self.first + self.count) - self.first;
            match (runs.last_mut(), name(self.first + start)) {
                (Some((last, run)), name) if last == name => run.end = end,
                (_, name) => runs.push((name.to_owned(), start..end)),
            }
        }
        runs
    }

    /// Rows of a matrix as integers, and the scales and zero points that come with them.
    fn quantize<'p>(
        &self,
        tensors: &Values<'_>,
        pools: &'p Pools,
        scheme: &Scheme,
        part: Part,
    ) -> Result<Chunk<'p>, Failure> {
        let sides = &self.task.sides;
        let mut raw = None;
        let (blocks, zeros) = if scheme.algorithm() == Algorithm::Stored {
            self.stored_rows(tensors, scheme)?
        } else {
            let mut stored = pools.raw.take(self.count * self.task.evaluation.element.size());
            self.task.evaluation.fill(tensors, self.first, &mut stored.bytes)?;
            let blocks = self.rounded(&stored.bytes, scheme)?;
            raw = self.task.stored.map(|_| Arc::new(stored));
            (blocks, Vec::new())
        };
        let mut bytes = pools.out.take(blocks.data.len());
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
        let mut rounding = Vec::new();
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
                rounding.extend(self.count_sides(floats, element));
            } else if *part == Part::SignedZeroPoints {
                make_signed(&mut side, scheme);
            }
            beside.push(side);
        }
        Ok(Chunk { bytes: Arc::new(bytes), raw, sides: beside, rounding })
    }

    /// What rounding does to scales or zero points, which each row has as many of.
    fn count_sides(&self, floats: &[f32], element: ElementType) -> Vec<(String, Rounding, ElementType)> {
        let each = floats.len() / (self.count / self.task.columns()).max(1);
        let counted = self.runs().into_iter().filter_map(|(name, run)| {
            let (start, end) = (run.start / self.task.columns() * each, run.end / self.task.columns() * each);
            let mut counted = Rounding::default();
            counted.count(floats.get(start..end)?, element);
            Some((format!("{name} (scales)"), counted, element))
        });
        counted.collect()
    }

    /// Rows of floats, rounded to integers.
    fn rounded(&self, raw: &[u8], scheme: &Scheme) -> Result<Blocks, Failure> {
        let mut values = Vec::with_capacity(self.count);
        read_floats(raw, self.task.evaluation.element, &mut values)?;
        Ok(match &self.inputs {
            Some(inputs) => quantize_with_inputs(&values, inputs, scheme)?,
            None => quantize_rows(&values, self.task.columns(), None, scheme)?,
        })
    }

    /// Rows of the integers that the checkpoint holds, with its zero points.
    fn stored_rows(&self, tensors: &Values<'_>, scheme: &Scheme) -> Result<(Blocks, Vec<f32>), Failure> {
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
