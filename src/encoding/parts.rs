//! What a quantised weight is made of: stored tensors with a role each, and where their bytes come from.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};

use super::values;
use crate::element::StoredType;
use crate::error::{Code, Error, Result};

/// A tensor of the checkpoint, as its file's header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Name, unique in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: StoredType,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
}

impl Stored {
    /// How many elements it has; the header's reader has made sure that this does not overflow.
    pub fn count(&self) -> usize {
        self.shape.iter().fold(1, |count: usize, size| count.saturating_mul(*size))
    }

    /// How many bytes it takes.
    pub fn bytes(&self) -> u64 {
        self.dtype.byte_length(&self.shape).unwrap_or(u64::MAX)
    }
}

/// What a stored tensor is to the weight that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The integers, or the small floats.
    Codes,
    /// What a code is multiplied by.
    Scales,
    /// What is subtracted from a code (or, in quanto, from the product).
    Zeros,
    /// The factor that all scales share.
    Global,
    /// The group of each input (GPTQ's `g_idx`).
    Order,
    /// The values of a code that indexes a table of its own.
    Table,
    /// The scales of quantised scales.
    NestedScales,
    /// The values of quantised scales.
    NestedTable,
}

/// A stored tensor in its role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its role.
    pub role: Role,
    /// The stored tensor.
    pub tensor: Stored,
}

/// Where the bytes of stored tensors come from. A mapped file lends them; another source may copy.
pub trait Parts: Sync {
    /// The bytes `range` of a tensor, counted from its first, little-endian.
    fn bytes(&self, tensor: &str, range: Range<u64>) -> Result<Cow<'_, [u8]>>;
}

/// An error about a stored tensor whose data can not be what it should.
pub(super) fn corrupt(tensor: &str) -> Error {
    Error::new(Code::WeightsCorrupt, format!("tensor {tensor}"))
        .help("the checkpoint is damaged, or its quantisation configuration is of another one: download it again")
}

/// Reads a range of a tensor's bytes, and makes sure that it is as long as it was asked for.
pub(super) fn window<'p>(parts: &'p dyn Parts, tensor: &Stored, range: Range<u64>) -> Result<Cow<'p, [u8]>> {
    let wanted = range.end.saturating_sub(range.start);
    if range.end > tensor.bytes() {
        return Err(corrupt(&tensor.name)
            .found(format!("{} bytes", tensor.bytes()))
            .expected(format!("at least {} bytes", range.end)));
    }
    let bytes = parts.bytes(&tensor.name, range)?;
    if bytes.len() as u64 == wanted {
        return Ok(bytes);
    }
    Err(corrupt(&tensor.name).found(format!("{} bytes", bytes.len())).expected(format!("{wanted} bytes")))
}

/// Reads a whole tensor.
pub(super) fn whole<'p>(parts: &'p dyn Parts, tensor: &Stored) -> Result<Cow<'p, [u8]>> {
    window(parts, tensor, 0..tensor.bytes())
}

/// A tensor of numbers, all of it, that are read one by one.
#[derive(Debug)]
pub(super) struct Numbers<'p> {
    bytes: Cow<'p, [u8]>,
    dtype: StoredType,
}

impl<'p> Numbers<'p> {
    pub(super) fn read(parts: &'p dyn Parts, tensor: &Stored) -> Result<Self> {
        Ok(Self { bytes: whole(parts, tensor)?, dtype: tensor.dtype })
    }

    /// Element `at` as it is written, exactly; exponents (`F8_E8M0`, and bytes where a scale is meant) as 2^(x - 127).
    #[inline]
    pub(super) fn get(&self, at: usize) -> f32 {
        match self.dtype {
            StoredType::F32 => f32::from_le_bytes(self.array(at)),
            StoredType::F16 => f16::from_le_bytes(self.array(at)).to_f32(),
            StoredType::BF16 => bf16::from_le_bytes(self.array(at)).to_f32(),
            StoredType::F8E4M3 => values::e4m3(self.byte(at)),
            StoredType::F8E8M0 | StoredType::U8 => values::exponent(self.byte(at)),
            StoredType::I8 => f32::from(i8::from_le_bytes([self.byte(at)])),
            _ => f32::NAN,
        }
    }

    /// Element `at` of a tensor of bytes.
    #[inline]
    pub(super) fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0)
    }

    /// Element `at` of a tensor of 32-bit words.
    #[inline]
    pub(super) fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    #[inline]
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes.get(at * N..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
}
