//! The one form that every encoding is described in: where codes, scales and zeros stand, and how they are combined.
//!
//! A logical tensor is seen as rows: its last axis is a row's, all others together count the rows.

use super::parts::{Part, Role, Stored};
use crate::element::ElementType;

/// A weight as the unquantised checkpoint would hold it.
#[derive(Debug, Clone, PartialEq)]
pub struct Logical {
    /// Name, as in the unquantised checkpoint.
    pub name: String,
    /// Shape, as in the unquantised checkpoint: [out, in] of a linear layer.
    pub shape: Vec<usize>,
    /// The type that the format's library dequantises to; decoded values are exactly values of it.
    pub dtype: ElementType,
    /// How it is stored.
    pub encoding: Encoding,
    /// The stored tensors that it is made of, each in its role.
    pub parts: Vec<Part>,
}

impl Logical {
    /// Rows: the product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, rest)| rest.iter().fold(1, |n: usize, size| n.saturating_mul(*size)))
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The stored tensor in this role.
    pub fn part(&self, role: Role) -> Option<&Stored> {
        self.parts.iter().find(|part| part.role == role).map(|part| &part.tensor)
    }
}

/// How a weight is stored and computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoding {
    /// The format in words, as a report prints it: `gptq, 4 bits, groups of 128`.
    pub format: String,
    /// Where the code of an element stands.
    pub layout: Layout,
    /// What a code stands for.
    pub values: Values,
    /// Which scale an element has.
    pub index: Index,
    /// What the scale is made of.
    pub scales: Scales,
    /// What is subtracted.
    pub zeros: Zeros,
    /// How value, zero and scale are combined.
    pub product: Product,
}

/// Where the code of an element of row n, column k stands. N and K are the numbers of rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A byte each, [N, K].
    Bytes,
    /// A stream of bits for each row, the first code in the lowest bits; each row takes `stride` bytes.
    Rows {
        /// Bits of a code.
        bits: u8,
        /// Bytes of a row.
        stride: usize,
    },
    /// 32-bit words [K * bits / 32, N], along K, the first code in the lowest bits (GPTQ).
    Columns {
        /// Bits of a code.
        bits: u8,
    },
    /// 32-bit words [K, N / 8] of 4-bit codes, in AWQ's order of columns.
    Awq,
    /// Bytes [N / 2, K]: the even row in the low half, the odd row in the high half (`ModelOpt`).
    RowPairs,
    /// Two codes a byte over the flattened tensor, the first in the high half (bitsandbytes).
    FlatHighFirst,
    /// The flattened tensor as a matrix of `width` columns whose rows are packed: row r stands in item row r % `step`, slice
    /// r / `step` (HQQ, quanto).
    Slices {
        /// Bits of a code.
        bits: u8,
        /// Bytes of an item: 1, or 4 for HQQ's 3 bits.
        item: usize,
        /// Rows of items.
        step: usize,
        /// Columns of the matrix.
        width: usize,
        /// Slices of an item.
        slices: usize,
        /// The first slice in the highest bits.
        high_first: bool,
    },
    /// Bytes [experts, K', N' / 32, 16] of gpt-oss, low half first: each expert transposed, so that row n of an expert is
    /// found across its stored rows.
    Transposed {
        /// Rows of an expert as the unquantised checkpoint has them (a multiple of 32).
        rows: usize,
    },
}

impl Layout {
    /// True where the codes of a row are spread over all of the tensor, so that any row needs all of it.
    pub fn is_spread(self) -> bool {
        matches!(self, Self::Columns { .. } | Self::Awq | Self::Slices { .. })
    }
}

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// The integer.
    Unsigned,
    /// Two's complement of this many bits.
    Signed(u8),
    /// The integer less 2^(bits - 1).
    Offset(u8),
    /// A 4-bit float with two exponent bits.
    E2M1,
    /// The same, with one zero instead of two.
    E2M1OneZero,
    /// An 8-bit float with four exponent bits.
    E4M3,
    /// An 8-bit float with five exponent bits.
    E5M2,
    /// An entry of the part [`Role::Table`].
    Table,
}

/// Which scale an element has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    /// All the same one.
    One,
    /// Blocks of `rows` x `columns`, the scales row-major [matrices, grid rows, grid columns].
    Blocks {
        /// Rows of one matrix of a stack.
        matrix: usize,
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        columns: usize,
        /// Rows of one matrix's grid.
        grid_rows: usize,
        /// Columns of the grid.
        grid_columns: usize,
    },
    /// Groups of this many columns, the scales [groups, N].
    Transposed {
        /// Columns of a group.
        group: usize,
    },
    /// The group of each column stands in the part [`Role::Order`]; the scales are [groups, N].
    Ordered,
    /// Blocks of the flattened tensor.
    Flat {
        /// Elements of a block.
        block: usize,
    },
    /// Element i of the flattened tensor has scale i % count.
    Cyclic {
        /// How many scales there are.
        count: usize,
    },
    /// As [`Layout::Transposed`] stores them: [experts, K', N' / 32].
    Experts {
        /// Rows of an expert.
        rows: usize,
    },
}

/// What a scale is made of. Everything is computed in float32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scales {
    /// As it is stored.
    Plain,
    /// Times the part [`Role::Global`].
    TimesGlobal,
    /// Divided by the part [`Role::Global`]; rounded to bfloat16 where that part is a scalar without a shape.
    OverGlobal,
    /// An index into [`Role::NestedTable`], times the entry of [`Role::NestedScales`] of its block, plus the offset.
    Nested {
        /// Scales of a block.
        block: usize,
        /// What is added.
        offset: f32,
    },
}

/// What is subtracted from a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    /// Nothing.
    None,
    /// 32-bit words [groups, N * bits / 32] along N.
    Columns {
        /// Bits of a zero point.
        bits: u8,
        /// Version 1 of GPTQ stores one less, in arithmetic on the whole word.
        less_one: bool,
    },
    /// 32-bit words [groups, N / 8] in AWQ's order.
    Awq,
    /// 32-bit words [N * bits / 32, groups] along N, as codes are stored.
    Rows {
        /// Bits of a zero point.
        bits: u8,
    },
    /// One for each scale, integer or float.
    Stored,
}

/// How value q, zero z and scale s are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// (q - z) * s, the difference and the product rounded to the type.
    Rounded(ElementType),
    /// q * s in float32, rounded to the type at the end.
    Once(ElementType),
    /// q * s * (1 / 127), each product rounded to float32 (`LLM.int8`).
    Over127,
    /// q * s - z, the product and the difference rounded to the type (quanto).
    Shifted(ElementType),
}
