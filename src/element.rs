//! Element types of tensors: what a checkpoint holds, what a graph computes in.

mod cached;
mod stored;

use std::fmt;

pub use cached::CacheType;
pub use stored::StoredType;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 64-bit float.
    F64,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// 8-bit float, 4 exponent bits, without infinities.
    F8E4M3,
    /// Signed 4-bit integer, two in a byte, the first in its low half.
    I4,
    /// Boolean, one byte each.
    Bool,
}

impl ElementType {
    /// Bytes that so many elements take.
    pub fn bytes(self, count: u64) -> u64 {
        match self {
            Self::I4 => count.div_ceil(2),
            other => count.saturating_mul(other.size() as u64),
        }
    }

    /// Size of one element in bytes; of those that are smaller, a whole byte.
    pub fn size(self) -> usize {
        match self {
            Self::I4 | Self::I8 | Self::U8 | Self::F8E4M3 | Self::Bool => 1,
            Self::F16 | Self::BF16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// `TensorProto.DataType` of ONNX.
    pub fn onnx(self) -> i32 {
        match self {
            Self::F32 => 1,
            Self::U8 => 2,
            Self::I8 => 3,
            Self::I32 => 6,
            Self::I64 => 7,
            Self::Bool => 9,
            Self::F16 => 10,
            Self::F64 => 11,
            Self::BF16 => 16,
            Self::F8E4M3 => 17,
            Self::I4 => 22,
        }
    }

    /// The name in an operator's schema, as in `tensor(float)`.
    pub fn schema_name(self) -> &'static str {
        match self {
            Self::F32 => "tensor(float)",
            Self::F16 => "tensor(float16)",
            Self::BF16 => "tensor(bfloat16)",
            Self::F64 => "tensor(double)",
            Self::I64 => "tensor(int64)",
            Self::I32 => "tensor(int32)",
            Self::I8 => "tensor(int8)",
            Self::U8 => "tensor(uint8)",
            Self::F8E4M3 => "tensor(float8e4m3fn)",
            Self::I4 => "tensor(int4)",
            Self::Bool => "tensor(bool)",
        }
    }

    /// True for the floating-point types that are computed in.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16 | Self::F64)
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F64 => "f64",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::I8 => "i8",
            Self::U8 => "u8",
            Self::F8E4M3 => "f8e4m3",
            Self::I4 => "i4",
            Self::Bool => "bool",
        })
    }
}
