//! One row, continued token by token without a copy of its caches.
//!
//! Where a graph updates its caches in place, past and present are one buffer: onnxruntime then writes only what is new.
//! Everywhere else the present of one run is handed to the next as its past. [`Decoder::run`] stays as it is: it keeps
//! several rows, padding and every length exact, which is what verification is about.

use std::rc::Rc;

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::IoBinding;
use ort::value::{DynTensor, DynValue, PrimitiveTensorElementType, TensorElementType};

use super::{Decoder, Dim, IDS, IntMatrix, MASK, POSITIONS, StateSlot, last_position, refused, tensor};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};

/// The fewest tokens that shared buffers grow by.
const GROWTH: usize = 256;

/// The caches of one row without padding, and how many tokens they hold.
#[derive(Debug)]
pub struct Row {
    cache: Cache,
    length: usize,
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
    /// Tokens so far.
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
        let is_float = |slot: &StateSlot| matches!(slot.element, ElementType::F32 | ElementType::F16);
        self.shared && !self.slots.is_empty() && self.slots.iter().all(|slot| grows(slot) && is_float(slot))
    }

    /// An empty row with room for some tokens; it grows when it has to. `shared` false keeps past and present apart
    /// even where they may be one buffer.
    ///
    /// # Errors
    /// onnxruntime has no memory for the caches.
    pub fn row(&self, room: usize, shared: bool) -> Result<Row> {
        let cache = if shared && self.shares_buffers() {
            Cache::Shared(self.buffers(room)?, room)
        } else {
            Cache::Handed(self.empty_state(1)?.values.into_iter().map(Rc::new).collect())
        };
        Ok(Row { cache, length: 0 })
    }

    /// Appends tokens to a row and returns the last one's logits.
    ///
    /// # Errors
    /// onnxruntime fails, or the user asked for an end.
    pub fn extend(&mut self, row: &mut Row, ids: &[i64]) -> Result<Vec<f32>> {
        crate::interrupt::check()?;
        let total = row.length.saturating_add(ids.len());
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
        last_position(&take(&self.logits)?).map_err(failed)
    }

    /// Binds everything anew: an output that stays bound would be written into again, over what is now the past.
    fn bind(&self, binding: &mut IoBinding, row: &mut Row, ids: &[i64]) -> ort::Result<()> {
        let total = row.length + ids.len();
        binding.bind_input(IDS, &tensor(&IntMatrix::from_row(ids.to_vec()))?)?;
        if self.has_mask {
            binding.bind_input(MASK, &tensor(&IntMatrix::from_row(vec![1; total]))?)?;
        }
        if self.has_positions {
            let positions = (0_i64..).skip(row.length).take(ids.len()).collect();
            binding.bind_input(POSITIONS, &tensor(&IntMatrix::from_row(positions))?)?;
        }
        let memory = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default)?;
        binding.bind_output_to_device(self.logits.as_str(), &memory)?;
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

    /// Buffers for a number of tokens.
    fn buffers(&self, room: usize) -> Result<Vec<DynTensor>> {
        let allocator = Allocator::default();
        let buffer = |slot: &StateSlot| {
            let element =
                if slot.element == ElementType::F16 { TensorElementType::Float16 } else { TensorElementType::Float32 };
            let shape: Vec<usize> = slot.shape.iter().map(|dim| size(*dim, room)).collect();
            DynTensor::new(&allocator, element, shape)
        };
        self.slots.iter().map(buffer).collect::<ort::Result<_>>().map_err(|e| refused(&self.file, &e))
    }

    /// Sees to it that shared buffers hold this many tokens, at least doubling them.
    fn make_room(&self, row: &mut Row, total: usize) -> Result<()> {
        let length = row.length;
        let Cache::Shared(old, room) = &mut row.cache else { return Ok(()) };
        if total <= *room {
            return Ok(());
        }
        let wanted = total.max(room.saturating_mul(2)).max(room.saturating_add(GROWTH));
        let mut new = self.buffers(wanted)?;
        for ((slot, old), new) in self.slots.iter().zip(old.iter()).zip(&mut new) {
            let at = slot.shape.iter().position(|dim| *dim == Dim::Length).unwrap_or(0);
            let inner: usize = slot.shape.iter().skip(at + 1).map(|dim| size(*dim, 0)).product();
            let widths = [*room * inner, wanted * inner, length * inner];
            let copied = if slot.element == ElementType::F16 {
                widen::<half::f16>(old, new, widths)
            } else {
                widen::<f32>(old, new, widths)
            };
            copied.map_err(|e| refused(&self.file, &e))?;
        }
        (*old, *room) = (new, wanted);
        Ok(())
    }
}

/// A dimension for one row and this many tokens.
pub(super) fn size(dim: Dim, tokens: usize) -> usize {
    match dim {
        Dim::Fixed(size) => size,
        Dim::Batch => 1,
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
