//! A run of several rows with past and present in one buffer.
//!
//! The CUDA provider's attention on caches in 8 bits (release 1.31) appends to the present without copying the past into
//! it, so that both must be the same memory. Elsewhere a run may be made so too, to be compared.

use ort::value::{DynTensor, DynTensorValueType, DynValue};

use super::row::memory;
use super::{Decoder, Dim, IDS, IntMatrix, MASK, POSITIONS, State, refused, tensor};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::runtime::Provider;

impl Decoder {
    /// True if past and present have to be one buffer: of an 8-bit cache on a GPU.
    pub(super) fn needs_one_buffer(&self) -> bool {
        let narrow = |element| matches!(element, ElementType::I8 | ElementType::U8 | ElementType::F8E4M3);
        self.provider == Provider::Cuda && self.slots.iter().any(|slot| narrow(slot.element))
    }

    /// As [`Self::step`], in buffers of as many tokens as the mask covers: the logits, and the hidden states if they are
    /// wanted.
    pub(super) fn step_in_place(
        &mut self,
        inputs: [&IntMatrix; 3],
        state: &mut State,
        hidden: bool,
    ) -> Result<(DynValue, Vec<DynValue>)> {
        let [ids, mask, positions] = inputs;
        let buffers = self.grown(std::mem::take(&mut state.values), mask)?;
        let file = self.file.clone();
        let failed = |e: ort::Error| refused(&file, &e);
        let mut binding = self.session.create_binding().map_err(failed)?;
        let own = memory(Provider::Cpu, 0).map_err(failed)?;
        let hidden: Vec<String> = self.hidden.iter().filter(|_| hidden).map(|(_, name)| name.clone()).collect();
        let mut bind = || -> ort::Result<()> {
            binding.bind_input(IDS, &tensor(ids)?)?;
            if self.has_mask {
                binding.bind_input(MASK, &tensor(mask)?)?;
            }
            if self.has_positions {
                binding.bind_input(POSITIONS, &tensor(positions)?)?;
            }
            for name in std::iter::once(&self.logits).chain(&hidden) {
                binding.bind_output_to_device(name.as_str(), &own)?;
            }
            Ok(())
        };
        bind().map_err(failed)?;
        let mut kept = Vec::new();
        for (slot, mut buffer) in self.slots.iter().zip(buffers) {
            binding.bind_input(slot.past.as_str(), &buffer).map_err(failed)?;
            binding.bind_output(slot.present.as_str(), &mut buffer).map_err(failed)?;
            kept.push(buffer.into_dyn());
        }
        let mut outputs = self.session.run_binding(&binding).map_err(failed)?;
        let mut take = |name: &str| {
            outputs.remove(name).ok_or_else(|| {
                Error::new(Code::RuntimeFailed, file.display()).found(format!("the run returned no `{name}`"))
            })
        };
        let logits = take(&self.logits)?;
        let hidden = hidden.iter().map(|name| take(name)).collect::<Result<_>>()?;
        state.values = kept;
        Ok((logits, hidden))
    }

    /// Buffers for all tokens that a mask covers, with those that are cached.
    fn grown(&self, old: Vec<DynValue>, mask: &IntMatrix) -> Result<Vec<DynTensor>> {
        let mut buffers = self.buffers(mask.rows, mask.columns)?;
        for ((slot, old), new) in self.slots.iter().zip(old).zip(&mut buffers) {
            let at = slot.shape.iter().position(|dim| *dim == Dim::Length).unwrap_or(0);
            let old = old.downcast::<DynTensorValueType>().map_err(|e| refused(&self.file, &e))?;
            let length = old.shape().get(at).and_then(|length| usize::try_from(*length).ok()).unwrap_or(0);
            if length > 0 {
                self.move_over(slot, &old, new, mask.rows, [length, mask.columns, length.min(mask.columns)])?;
            }
        }
        Ok(buffers)
    }
}
