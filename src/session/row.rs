//! Rows of one length, continued token by token without a copy of their caches, which lie where the model runs.
//!
//! Where a graph updates its caches in place, past and present are one buffer: onnxruntime then writes only what is new.
//! Everywhere else the present of one run is handed to the next as its past. [`Decoder::run`] stays as it is: it keeps
//! several rows, padding and every length exact, which is what verification is about.

use std::rc::Rc;

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::IoBinding;
use ort::value::{DynTensor, DynValue, PrimitiveTensorElementType};

use super::recast::Recast;
use super::value::element_type;
use super::{Buffers, Decoder, Dim, IDS, IntMatrix, MASK, POSITIONS, StateSlot, last_positions, refused, tensor};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::runtime::Provider;

/// The fewest tokens that shared buffers grow by.
const GROWTH: usize = 256;

/// The caches of a row without padding, or of some of one length, and how many tokens each holds.
#[derive(Debug)]
pub struct Row {
    cache: Cache,
    length: usize,
    count: usize,
}

#[derive(Debug)]
enum Cache {
    /// Buffers for this many tokens, each both past and present.
    Shared(Vec<DynTensor>, usize),
    /// What the last run returned.
    Handed(Vec<Rc<DynValue>>),
}

/// A place in a row to which it can return.
#[derive(Debug)]
pub struct Mark {
    /// Not of shared buffers: what stands behind their length counts for nothing.
    values: Vec<Rc<DynValue>>,
    length: usize,
}

impl Row {
    /// Tokens so far, of each row.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Remembers where the row is. Nothing is copied.
    pub fn mark(&self) -> Mark {
        let values = match &self.cache {
            Cache::Shared(..) => Vec::new(),
            Cache::Handed(values) => values.clone(),
        };
        Mark { values, length: self.length }
    }

    /// Forgets everything behind a mark of this row.
    pub fn return_to(&mut self, mark: &Mark) {
        if let Cache::Handed(values) = &mut self.cache {
            values.clone_from(&mark.values);
        }
        self.length = mark.length;
    }
}

impl Decoder {
    /// True if past and present may be one buffer: the directory says so, and each state is a cache that grows.
    pub fn shares_buffers(&self) -> bool {
        let grows = |slot: &StateSlot| slot.shape.iter().filter(|dim| **dim == Dim::Length).count() == 1;
        let known = |slot: &StateSlot| {
            use ElementType::{BF16, F8E4M3, F16, F32, I8, U8};
            matches!(slot.element, F32 | F16 | BF16 | F8E4M3 | I8 | U8)
        };
        self.buffers != Buffers::Apart
            && !self.slots.is_empty()
            && self.slots.iter().all(|slot| grows(slot) && known(slot))
    }

    /// An empty row with room for some tokens; it grows when it has to. `shared` false keeps past and present apart
    /// even where they may be one buffer, unless they have to be.
    ///
    /// # Errors
    /// onnxruntime has no memory for the caches.
    pub fn row(&self, room: usize, shared: bool) -> Result<Row> {
        self.rows(1, room, shared)
    }

    /// As [`Self::row`] for several rows, which are continued together.
    ///
    /// # Errors
    /// onnxruntime has no memory for the caches.
    pub fn rows(&self, count: usize, room: usize, shared: bool) -> Result<Row> {
        let cache = if (shared || self.buffers == Buffers::One) && self.shares_buffers() {
            Cache::Shared(self.buffers(count, room)?, room)
        } else {
            Cache::Handed(self.empty_state(count)?.values.into_iter().map(Rc::new).collect())
        };
        Ok(Row { cache, length: 0, count })
    }

    /// Appends tokens, `[rows, tokens]`, and returns the last one's logits, `[rows, vocabulary]`.
    ///
    /// # Errors
    /// onnxruntime fails, the rows get different numbers of tokens, or the user asked for an end.
    pub fn extend(&mut self, row: &mut Row, ids: &[i64]) -> Result<Vec<f32>> {
        crate::interrupt::check()?;
        if ids.is_empty() || !ids.len().is_multiple_of(row.count) {
            return Err(Error::new(Code::RuntimeFailed, self.file.display())
                .found(format!("{} tokens for {} rows", ids.len(), row.count))
                .expected("as many tokens for each row, one at least"));
        }
        let total = row.length.saturating_add(ids.len() / row.count);
        self.make_room(row, total)?;
        let file = self.file.clone();
        let failed = |e: ort::Error| refused(&file, &e);
        let mut binding = self.session.create_binding().map_err(failed)?;
        self.bind(&mut binding, row, ids).map_err(failed)?;
        let mut outputs = self.session.run_binding(&binding).map_err(failed)?;
        let mut take = |name: &str| {
            outputs.remove(name).ok_or_else(|| {
                Error::new(Code::RuntimeFailed, file.display()).found(format!("the run returned no `{name}`"))
            })
        };
        if let Cache::Handed(values) = &mut row.cache {
            *values = self.slots.iter().map(|slot| take(&slot.present).map(Rc::new)).collect::<Result<_>>()?;
        }
        row.length = total;
        last_positions(&take(&self.logits)?).map_err(failed)
    }

    /// Binds everything anew: an output that stays bound would be written into again, over what is now the past.
    fn bind(&self, binding: &mut IoBinding, row: &mut Row, ids: &[i64]) -> ort::Result<()> {
        let new = ids.len() / row.count;
        let total = row.length + new;
        let rows =
            |values: Vec<i64>| tensor(&IntMatrix { rows: row.count, columns: values.len() / row.count, data: values });
        binding.bind_input(IDS, &rows(ids.to_vec())?)?;
        if self.has_mask {
            binding.bind_input(MASK, &rows(vec![1; total * row.count])?)?;
        }
        if self.has_positions {
            let positions = (0..row.count).flat_map(|_| (0_i64..).skip(row.length).take(new)).collect();
            binding.bind_input(POSITIONS, &rows(positions)?)?;
        }
        // Logits are read on this side, caches stay where the model runs.
        let (own, memory) = (memory(Provider::Cpu, 0)?, memory(self.provider, self.device)?);
        binding.bind_output_to_device(self.logits.as_str(), &own)?;
        // Owned values only: binding a borrowed one never returns (ort 2.0.0-rc.15).
        match &mut row.cache {
            Cache::Shared(buffers, _) => {
                for (slot, buffer) in self.slots.iter().zip(buffers) {
                    binding.bind_input(slot.past.as_str(), &*buffer)?;
                    binding.bind_output(slot.present.as_str(), buffer)?;
                }
            }
            Cache::Handed(values) => {
                for (slot, value) in self.slots.iter().zip(values) {
                    binding.bind_input(slot.past.as_str(), value)?;
                    binding.bind_output_to_device(slot.present.as_str(), &memory)?;
                }
            }
        }
        Ok(())
    }

    /// Buffers for a number of tokens of each row.
    pub(super) fn buffers(&self, rows: usize, room: usize) -> Result<Vec<DynTensor>> {
        let allocate = || {
            let allocator = match self.provider {
                Provider::Cpu => Allocator::default(),
                Provider::Cuda => Allocator::new(&self.session, memory(self.provider, self.device)?)?,
            };
            self.slots.iter().map(|slot| buffer(&allocator, slot, rows, room)).collect::<ort::Result<_>>()
        };
        allocate().map_err(|e| refused(&self.file, &e))
    }

    /// Sees to it that shared buffers hold this many tokens, at least doubling them.
    fn make_room(&self, row: &mut Row, total: usize) -> Result<()> {
        let (length, count) = (row.length, row.count);
        let Cache::Shared(old, room) = &mut row.cache else { return Ok(()) };
        if total <= *room {
            return Ok(());
        }
        let wanted = total.max(room.saturating_mul(2)).max(room.saturating_add(GROWTH));
        let mut new = self.buffers(count, wanted)?;
        for ((slot, old), new) in self.slots.iter().zip(old.iter()).zip(&mut new) {
            self.move_over(slot, old, new, count, [*room, wanted, length])?;
        }
        (*old, *room) = (new, wanted);
        Ok(())
    }

    /// Moves a cache of some rows from one buffer to another, of so many tokens (old, new and filled).
    pub(super) fn move_over(
        &self,
        slot: &StateSlot,
        old: &DynTensor,
        new: &mut DynTensor,
        rows: usize,
        tokens: [usize; 3],
    ) -> Result<()> {
        let moved = match (slot.element, self.provider) {
            (ElementType::F8E4M3, _) => move_over_float8(slot, old, new, rows, tokens, (self.provider, self.device)),
            (_, Provider::Cpu) => move_over(slot, old, new, tokens),
            // Rare enough to take the way through this side's memory.
            (_, Provider::Cuda) => move_over_device(slot, old, new, rows, tokens),
        };
        moved.map_err(|e| refused(&self.file, &e))
    }
}

/// The memory in which a provider computes, on a device of that number.
pub(super) fn memory(provider: Provider, number: i32) -> ort::Result<MemoryInfo<'static>> {
    let device = match provider {
        Provider::Cpu => AllocationDevice::CPU,
        Provider::Cuda => AllocationDevice::CUDA,
    };
    MemoryInfo::new(device, number, AllocatorType::Device, MemoryType::Default)
}

fn buffer(allocator: &Allocator, slot: &StateSlot, rows: usize, room: usize) -> ort::Result<DynTensor> {
    let shape: Vec<usize> = slot.shape.iter().map(|dim| size(*dim, rows, room)).collect();
    DynTensor::new(allocator, element_type(slot.element), shape)
}

/// Moves a cache from one device buffer to another, of so many tokens (old, new and filled).
fn move_over_device(
    slot: &StateSlot,
    old: &DynTensor,
    new: &mut DynTensor,
    rows: usize,
    tokens: [usize; 3],
) -> ort::Result<()> {
    let old = old.to(AllocationDevice::CPU, 0)?;
    let mut here = buffer(&Allocator::default(), slot, rows, tokens[1])?;
    move_over(slot, &old, &mut here, tokens)?;
    here.copy_into(new)
}

/// The same for float8, wherever it lies: as float16 on this side.
pub(super) fn move_over_float8(
    slot: &StateSlot,
    old: &DynTensor,
    new: &mut DynTensor,
    rows: usize,
    tokens: [usize; 3],
    place: (Provider, i32),
) -> ort::Result<()> {
    let half = StateSlot { element: ElementType::F16, ..slot.clone() };
    let old = Recast::new(slot.element, half.element, place)?.read(old)?;
    let mut here = buffer(&Allocator::default(), &half, rows, tokens[1])?;
    move_over(&half, &old, &mut here, tokens)?;
    Recast::new(half.element, slot.element, place)?.write(&here, new)
}

/// Moves a cache from one buffer of this side's memory to another, of so many tokens (old, new and filled).
fn move_over(slot: &StateSlot, old: &DynTensor, new: &mut DynTensor, tokens: [usize; 3]) -> ort::Result<()> {
    let at = slot.shape.iter().position(|dim| *dim == Dim::Length).unwrap_or(0);
    let inner: usize = slot.shape.iter().skip(at + 1).map(|dim| size(*dim, 1, 0)).product();
    let widths = tokens.map(|tokens| tokens * inner);
    match slot.element {
        ElementType::F16 => widen::<half::f16>(old, new, widths),
        ElementType::BF16 => widen::<half::bf16>(old, new, widths),
        ElementType::I8 => widen::<i8>(old, new, widths),
        ElementType::U8 => widen::<u8>(old, new, widths),
        _ => widen::<f32>(old, new, widths),
    }
}

/// A dimension for so many rows and tokens.
pub(super) fn size(dim: Dim, rows: usize, tokens: usize) -> usize {
    match dim {
        Dim::Fixed(size) => size,
        Dim::Batch => rows,
        Dim::Length => tokens,
    }
}

/// Copies the filled part of each line (a head's tokens) into longer lines: widths of old, new and filled.
fn widen<T: PrimitiveTensorElementType + Copy>(
    old: &DynTensor,
    new: &mut DynTensor,
    [from, to, filled]: [usize; 3],
) -> ort::Result<()> {
    let (_, old) = old.try_extract_tensor::<T>()?;
    let (_, new) = new.try_extract_tensor_mut::<T>()?;
    for (old, new) in old.chunks(from.max(1)).zip(new.chunks_mut(to.max(1))) {
        if let (Some(old), Some(new)) = (old.get(..filled), new.get_mut(..filled)) {
            new.copy_from_slice(old);
        }
    }
    Ok(())
}
