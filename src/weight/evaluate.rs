//! Evaluation of weight expressions on bytes, any part of the result at a time.
//!
//! An [`Evaluation`] is an expression with every shape known. It fills any range of its result and reads no more of
//! its sources than that range needs, so memory is bounded by the range, whatever the size of a tensor; and
//! ranges can be filled on many threads. All transforms but `add_one` move whole elements, so they work on any
//! element type.

use super::Weight;
use super::convert::{read_floats, write_floats};
use crate::element::ElementType;

/// Tensors by name: what expressions are evaluated on.
pub trait Tensors: Sync {
    /// Why a tensor could not be read.
    type Error: From<String>;

    /// Element type and shape of a tensor.
    fn describe(&self, name: &str) -> Result<(ElementType, Vec<usize>), Self::Error>;

    /// Reads the elements of a tensor from the element `first` on, row-major and little-endian, until `out` is full.
    fn read(&self, name: &str, first: usize, out: &mut [u8]) -> Result<(), Self::Error>;
}

/// Pieces of less than this many bytes are picked from a larger read instead of read one by one.
const PIECE: usize = if cfg!(test) { 16 } else { 1 << 14 };

/// An expression that is ready to be evaluated.
#[derive(Debug)]
pub struct Evaluation {
    /// Element type of the result.
    pub element: ElementType,
    /// Shape of the result.
    pub shape: Vec<usize>,
    node: Node,
}

/// How a result comes from its parts; sizes in elements.
#[derive(Debug)]
enum Node {
    Source(String),
    /// The same bytes.
    Same(Box<Evaluation>),
    AddOne(Box<Evaluation>),
    /// Rows made of one piece of each part: part `i` gives `widths[i]` elements to each row.
    Join {
        widths: Vec<usize>,
        parts: Vec<Evaluation>,
    },
    /// Of every `block` elements those from `start` on, `width` of them.
    Take {
        block: usize,
        start: usize,
        width: usize,
        of: Box<Evaluation>,
    },
    /// Matrices `[rows, columns]` become `[columns, rows]`.
    Transpose {
        rows: usize,
        columns: usize,
        of: Box<Evaluation>,
    },
}

impl Evaluation {
    /// Works out shapes and element types. An error says which part does not fit.
    pub fn new<T: Tensors>(weight: &Weight, tensors: &T) -> Result<Self, T::Error> {
        let inner = |weight: &Weight| Self::new(weight, tensors);
        let all = |parts: &[Weight]| parts.iter().map(inner).collect::<Result<Vec<_>, _>>();
        let boxed = |weight: &Weight| inner(weight).map(Box::new);
        let (element, node) = match weight {
            Weight::Source(name) => {
                let (element, shape) = tensors.describe(name)?;
                return Ok(Self { element, shape, node: Node::Source(name.clone()) });
            }
            Weight::Reshape(_, of) => same(boxed(of)?),
            Weight::AddOne(of) => (ElementType::F32, Node::AddOne(boxed(of)?)),
            Weight::Concat(axis, parts) => {
                let parts = all(parts)?;
                let widths = parts.iter().map(|part| part.shape.iter().skip(*axis).product()).collect();
                join(widths, parts)?
            }
            Weight::Stack(parts) => {
                let parts = all(parts)?;
                join(parts.iter().map(Self::count).collect(), parts)?
            }
            Weight::Interleave(axis, parts) => {
                let parts = all(parts)?;
                let widths = parts.iter().map(|part| part.shape.iter().skip(axis + 1).product()).collect();
                join(widths, parts)?
            }
            Weight::Split(split, of) => {
                let of = boxed(of)?;
                let inner: usize = of.shape.iter().skip(split.axis + 1).product();
                let (start, width, block) = split.block()?;
                (of.element, Node::Take { block: block * inner, start: start * inner, width: width * inner, of })
            }
            Weight::Transpose(of) => {
                let of = boxed(of)?;
                let &[.., rows, columns] = of.shape.as_slice() else {
                    return Err(format!("{:?} can not be transposed", of.shape).into());
                };
                (of.element, Node::Transpose { rows, columns, of })
            }
        };
        let shape = weight.shape(&|name: &str| tensors.describe(name).ok().map(|(_, shape)| shape))?;
        Ok(Self { element, shape, node })
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Fills `out` with the elements from `first` on. `out` is a whole number of elements and ends within the result.
    pub fn fill<T: Tensors>(&self, tensors: &T, first: usize, out: &mut [u8]) -> Result<(), T::Error> {
        if out.is_empty() {
            return Ok(());
        }
        match &self.node {
            Node::Source(name) => tensors.read(name, first, out),
            Node::Same(of) => of.fill(tensors, first, out),
            Node::AddOne(of) => {
                let mut stored = vec![0; out.len() / self.element.size() * of.element.size()];
                of.fill(tensors, first, &mut stored)?;
                let mut values = Vec::new();
                read_floats(&stored, of.element, &mut values)?;
                for value in &mut values {
                    *value += 1.0;
                }
                Ok(write_floats(&values, self.element, out)?)
            }
            Node::Join { widths, parts } => self.join(tensors, (widths, parts), first, out),
            Node::Take { block, start, width, of } => self.take(tensors, (*block, *start, *width), of, first, out),
            Node::Transpose { rows, columns, of } => self.transpose(tensors, (*rows, *columns), of, first, out),
        }
    }

    /// True if every row of the result is a row of one source, as it is.
    pub fn moves_rows(&self) -> bool {
        let columns = self.shape.last().copied().unwrap_or(1).max(1);
        self.moves(columns)
    }

    fn moves(&self, columns: usize) -> bool {
        match &self.node {
            Node::Source(_) => self.shape.last() == Some(&columns),
            Node::Same(of) => of.moves(columns),
            Node::AddOne(_) | Node::Transpose { .. } => false,
            Node::Join { widths, parts } => {
                widths.iter().all(|width| width.is_multiple_of(columns)) && parts.iter().all(|part| part.moves(columns))
            }
            Node::Take { block, start, width, of } => {
                [block, start, width].iter().all(|size| size.is_multiple_of(columns)) && of.moves(columns)
            }
        }
    }

    /// The source that element `at` of the result is taken from as it is, and which of its elements that is.
    pub fn origin(&self, at: usize) -> Option<(&str, usize)> {
        match &self.node {
            Node::Source(name) => Some((name, at)),
            Node::AddOne(_) | Node::Transpose { .. } => None,
            _ => self.part(at).and_then(|(of, at)| of.origin(at)),
        }
    }

    /// The source that element `at` of the result is made from.
    pub(crate) fn source(&self, at: usize) -> Option<&str> {
        match &self.node {
            Node::Source(name) => Some(name),
            _ => self.part(at).and_then(|(of, at)| of.source(at)),
        }
    }

    /// The part that an element of the result is made from, and which of its elements that is.
    fn part(&self, at: usize) -> Option<(&Self, usize)> {
        match &self.node {
            Node::Source(_) => None,
            Node::Same(of) | Node::AddOne(of) => Some((of, at)),
            Node::Transpose { rows, columns, of } => {
                let (matrix, inner) = (at.checked_div(rows * columns)?, at.checked_rem(rows * columns)?);
                Some((of, matrix * rows * columns + inner % rows * columns + inner / rows))
            }
            Node::Join { widths, parts } => {
                let row: usize = widths.iter().sum();
                let (outer, mut inner) = (at.checked_div(row)?, at.checked_rem(row)?);
                for (width, part) in widths.iter().zip(parts) {
                    if inner < *width {
                        return Some((part, outer * width + inner));
                    }
                    inner -= width;
                }
                None
            }
            Node::Take { block, start, width, of } => {
                Some((of, at.checked_div(*width)? * block + start + at.checked_rem(*width)?))
            }
        }
    }

    fn join<T: Tensors>(
        &self,
        tensors: &T,
        (widths, parts): (&[usize], &[Self]),
        first: usize,
        out: &mut [u8],
    ) -> Result<(), T::Error> {
        let size = self.element.size();
        let row: usize = widths.iter().sum();
        let count = out.len() / size;
        let rows = first / row..(first + count).div_ceil(row);
        let narrow = row * size / parts.len().max(1) < PIECE && rows.len() > 1;
        // Each part's share of all these rows lies together: one read for each part, and then the pieces are dealt out.
        let mut shares = Vec::new();
        if narrow {
            for (width, part) in widths.iter().zip(parts) {
                let mut share = vec![0; rows.len() * width * size];
                part.fill(tensors, rows.start * width, &mut share)?;
                shares.push(share);
            }
        }
        let (mut at, start) = (rows.start * row, rows.start);
        for r in rows {
            for (i, (width, part)) in widths.iter().zip(parts).enumerate() {
                let Some((skip, piece)) = overlap(at, *width, first, out, size) else {
                    at += width;
                    continue;
                };
                if let Some(share) = shares.get(i) {
                    let from = ((r - start) * width + skip) * size;
                    let share =
                        share.get(from..from + piece.len()).ok_or_else(|| "a piece beyond its part".to_owned())?;
                    piece.copy_from_slice(share);
                } else {
                    part.fill(tensors, r * width + skip, piece)?;
                }
                at += width;
            }
        }
        Ok(())
    }

    fn take<T: Tensors>(
        &self,
        tensors: &T,
        (block, start, width): (usize, usize, usize),
        of: &Self,
        first: usize,
        out: &mut [u8],
    ) -> Result<(), T::Error> {
        let size = self.element.size();
        let blocks = first / width..(first + out.len() / size).div_ceil(width);
        // A small piece of a large block is not worth reading the block.
        let narrow = width * size < PIECE && block <= 64 * width && blocks.len() > 1;
        let mut share = Vec::new();
        if narrow {
            share.resize(blocks.len() * block * size, 0);
            of.fill(tensors, blocks.start * block, &mut share)?;
        }
        for b in blocks.clone() {
            let Some((skip, piece)) = overlap(b * width, width, first, out, size) else { continue };
            if narrow {
                let from = ((b - blocks.start) * block + start + skip) * size;
                let share =
                    share.get(from..from + piece.len()).ok_or_else(|| "a piece beyond its tensor".to_owned())?;
                piece.copy_from_slice(share);
            } else {
                of.fill(tensors, b * block + start + skip, piece)?;
            }
        }
        Ok(())
    }

    fn transpose<T: Tensors>(
        &self,
        tensors: &T,
        (rows, columns): (usize, usize),
        of: &Self,
        first: usize,
        out: &mut [u8],
    ) -> Result<(), T::Error> {
        let size = self.element.size();
        let matrix = rows * columns;
        for m in first / matrix..(first + out.len() / size).div_ceil(matrix) {
            let Some((skip, piece)) = overlap(m * matrix, matrix, first, out, size) else { continue };
            // These columns of the source are rows of the result: [rows, wanted] -> [wanted, rows]
            let wanted = skip / rows..(skip + piece.len() / size).div_ceil(rows);
            let width = wanted.len();
            let mut band = vec![0; rows * width * size];
            if width == columns {
                of.fill(tensors, m * matrix, &mut band)?;
            } else {
                for (r, line) in band.chunks_exact_mut(width * size).enumerate() {
                    of.fill(tensors, m * matrix + r * columns + wanted.start, line)?;
                }
            }
            let turned = turn(&band, rows, width, size);
            let from = (skip - wanted.start * rows) * size;
            let turned = turned.get(from..from + piece.len()).ok_or_else(|| "a piece beyond its matrix".to_owned())?;
            piece.copy_from_slice(turned);
        }
        Ok(())
    }
}

fn same(of: Box<Evaluation>) -> (ElementType, Node) {
    (of.element, Node::Same(of))
}

fn join(widths: Vec<usize>, parts: Vec<Evaluation>) -> Result<(ElementType, Node), String> {
    let element = parts.first().ok_or("nothing to join")?.element;
    if let Some(odd) = parts.iter().find(|part| part.element != element) {
        return Err(format!("{element} and {} can not be joined", odd.element));
    }
    Ok((element, Node::Join { widths, parts }))
}

/// Of the elements `at..at + length` of a result, those that fall into `out`, which starts at `first`: how many come
/// before them, and their place in `out`.
fn overlap(at: usize, length: usize, first: usize, out: &mut [u8], size: usize) -> Option<(usize, &mut [u8])> {
    let begin = at.max(first);
    let end = (at + length).min(first + out.len() / size);
    if begin >= end {
        return None;
    }
    Some((begin - at, out.get_mut((begin - first) * size..(end - first) * size)?))
}

/// `[rows, columns]` to `[columns, rows]`, in tiles that stay in the cache.
fn turn(matrix: &[u8], rows: usize, columns: usize, size: usize) -> Vec<u8> {
    const TILE: usize = 64;
    let mut out = vec![0; matrix.len()];
    for tile in (0..rows).step_by(TILE) {
        let height = TILE.min(rows - tile);
        for (c, line) in out.chunks_exact_mut((rows * size).max(1)).enumerate() {
            let cells = line.get_mut(tile * size..(tile + height) * size).unwrap_or_default();
            for (r, cell) in cells.chunks_exact_mut(size).enumerate() {
                let from = ((tile + r) * columns + c) * size;
                if let Some(element) = matrix.get(from..from + size) {
                    cell.copy_from_slice(element);
                }
            }
        }
    }
    out
}

#[cfg(test)]
#[path = "evaluate_tests.rs"]
mod tests;
