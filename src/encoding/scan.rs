//! The stored tensors while they are given their roles: each is taken once, or stays, or is ignored by name.

use std::collections::BTreeMap;

use super::form::{Encoding, Index, Layout, Logical, Product, Scales, Values, Zeros};
use super::parts::{Part, Parts, Role, Stored, corrupt};
use crate::element::{ElementType, StoredType};
use crate::error::{Code, Error, Result};

/// A stored tensor that no weight is made of, and why it changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// Its name.
    pub name: String,
    /// Why nothing is lost.
    pub reason: &'static str,
}

pub(super) const ACTIVATION: &str = "the scale of a static activation: weights only, activations stay float";
pub(super) const CACHE: &str = "the scale of a quantised cache: the cache stays float";

/// The tensors of a checkpoint on their way into a catalogue.
pub(super) struct Scan<'a> {
    pub(super) parts: &'a dyn Parts,
    /// The type that config.json says the model computes in.
    pub(super) dtype: ElementType,
    pub(super) left: BTreeMap<&'a str, &'a Stored>,
    pub(super) made: Vec<Logical>,
    pub(super) ignored: Vec<Ignored>,
    pub(super) notes: Vec<String>,
}

impl<'a> Scan<'a> {
    /// The names that end so, without the ending.
    pub(super) fn modules(&self, ending: &str) -> Vec<String> {
        self.left.keys().filter_map(|name| name.strip_suffix(ending)).map(str::to_owned).collect()
    }

    /// A tensor that is still there.
    pub(super) fn peek(&self, name: &str) -> Option<&'a Stored> {
        self.left.get(name).copied()
    }

    /// Takes a tensor, if it is there.
    pub(super) fn take(&mut self, name: &str) -> Option<Stored> {
        self.left.remove(name).cloned()
    }

    /// Takes a tensor that has to be there, of one of these types.
    pub(super) fn need(&mut self, name: &str, types: &[StoredType]) -> Result<Stored> {
        let Some(tensor) = self.take(name) else {
            return Err(Error::new(Code::TensorMissing, format!("tensor {name}"))
                .found("nothing")
                .expected("every part of a quantised weight")
                .help("the download is not complete, or the checkpoint is of another format than it says"));
        };
        typed(tensor, types)
    }

    /// Takes a tensor that may be there, of one of these types.
    pub(super) fn may(&mut self, name: &str, types: &[StoredType]) -> Result<Option<Stored>> {
        self.take(name).map(|tensor| typed(tensor, types)).transpose()
    }

    /// Takes a tensor that changes nothing.
    pub(super) fn ignore(&mut self, name: &str, reason: &'static str) {
        if self.left.remove(name).is_some() {
            self.ignored.push(Ignored { name: name.to_owned(), reason });
        }
    }

    /// Takes all tensors that end so and change nothing.
    pub(super) fn ignore_all(&mut self, endings: &[&str], reason: &'static str) {
        let names: Vec<&str> =
            self.left.keys().copied().filter(|name| endings.iter().any(|ending| name.ends_with(ending))).collect();
        for name in names {
            self.ignore(name, reason);
        }
    }
}

fn typed(tensor: Stored, types: &[StoredType]) -> Result<Stored> {
    if types.contains(&tensor.dtype) {
        return Ok(tensor);
    }
    let types: Vec<&str> = types.iter().map(|dtype| dtype.as_str()).collect();
    Err(corrupt(&tensor.name).found(tensor.dtype).expected(format!("{} elements", types.join(" or "))))
}

/// The float types that scales come in.
pub(super) const FLOATS: &[StoredType] = &[StoredType::F32, StoredType::F16, StoredType::BF16];
/// The words that codes are packed in.
pub(super) const WORDS: &[StoredType] = &[StoredType::I32];

/// An error unless the tensor has this shape.
pub(super) fn shaped(tensor: &Stored, expected: &[usize]) -> Result<()> {
    if tensor.shape == expected {
        return Ok(());
    }
    Err(Error::new(Code::TensorShape, format!("tensor {}", tensor.name))
        .found(format!("{:?}", tensor.shape))
        .expected(format!("{expected:?}, by the other parts of the weight and the configuration"))
        .help("the quantisation configuration and the weights do not belong together"))
}

/// The two sizes of a matrix, neither of them 0.
pub(super) fn matrix(tensor: &Stored) -> Result<(usize, usize)> {
    match tensor.shape.as_slice() {
        [rows, columns] if *rows > 0 && *columns > 0 => Ok((*rows, *columns)),
        _ => Err(Error::new(Code::TensorShape, format!("tensor {}", tensor.name))
            .found(format!("{:?}", tensor.shape))
            .expected("a matrix that is not empty")),
    }
}

/// The parts of a weight, each with its role.
pub(super) fn parts<const N: usize>(given: [(Role, Option<Stored>); N]) -> Vec<Part> {
    given.into_iter().filter_map(|(role, tensor)| tensor.map(|tensor| Part { role, tensor })).collect()
}

/// A form that is changed where a format differs: bytes with one plain scale, rounded to `to`.
pub(super) fn plain(format: String, values: Values, to: ElementType) -> Encoding {
    Encoding {
        format,
        layout: Layout::Bytes,
        values,
        index: Index::One,
        scales: Scales::Plain,
        zeros: Zeros::None,
        product: Product::Rounded(to),
    }
}

/// The index of a scale tensor over the rows and columns of a matrix (or of a stack of them), by its shape alone where that
/// says it, else by the block sizes.
pub(super) fn grid(tensor: &Stored, shape: &[usize], block: (usize, usize)) -> Result<Index> {
    let [.., rows, columns] = shape else { return Err(corrupt(&tensor.name).found("a scale of no matrix")) };
    let stack = shape.len().saturating_sub(2);
    if tensor.count() == 1 {
        return Ok(Index::One);
    }
    // Products of sizes that a file names may be larger than a size can be.
    let product = |sizes: &[usize]| sizes.iter().take(stack).try_fold(1usize, |n, size| n.checked_mul(*size));
    let (batch, lead) = (product(shape), product(&tensor.shape));
    let (grid_rows, grid_columns) = match tensor.shape.get(stack..) {
        Some([grid_rows, grid_columns]) if lead == batch => (*grid_rows, *grid_columns),
        // ModelOpt: one per row, or [rows / b, 1, columns / b, 1].
        Some([grid_rows]) if lead == batch => (*grid_rows, 1),
        Some([grid_rows, 1, grid_columns, 1]) if lead == batch => (*grid_rows, *grid_columns),
        _ => (0, 0),
    };
    let side = |grid: usize, size: usize, block: usize| {
        if grid == size {
            Some(1)
        } else if grid == 1 {
            Some(size)
        } else {
            (block > 0 && size.div_ceil(block) == grid).then_some(block)
        }
    };
    match (side(grid_rows, *rows, block.0), side(grid_columns, *columns, block.1)) {
        (Some(height), Some(width)) if grid_rows > 0 && grid_columns > 0 => {
            Ok(Index::Blocks { matrix: *rows, rows: height, columns: width, grid_rows, grid_columns })
        }
        _ => Err(Error::new(Code::TensorShape, format!("tensor {}", tensor.name))
            .found(format!("{:?}", tensor.shape))
            .expected(format!("scales of a weight of shape {shape:?} in blocks of {} x {}", block.0, block.1))
            .help("the group or block size of the configuration is not that of the weights")),
    }
}

/// A group size as configurations write it: -1 (or nothing) is the whole row.
pub(super) fn group(value: Option<i64>, columns: usize) -> Option<usize> {
    match value {
        None | Some(-1) => Some(columns),
        Some(size) => usize::try_from(size).ok().filter(|size| *size > 0),
    }
}
