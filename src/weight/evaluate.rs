//! Evaluation of weight expressions on bytes.
//!
//! All transforms but `add_one` move whole elements, so they work on any element type. A tensor that is
//! used as it is stays borrowed from the mapped file.

use std::borrow::Cow;

use half::{bf16, f16};
use rayon::prelude::*;

use super::{Split, Weight};
use crate::element::ElementType;

/// A tensor in memory or in a mapped file, little-endian and row-major.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Element type.
    pub element: ElementType,
    /// Shape.
    pub shape: Vec<usize>,
    /// `element.size() * product(shape)` bytes.
    pub bytes: Cow<'a, [u8]>,
}

/// The value of an expression. `load` gives the sources; the shapes have been checked by [`Weight::shape`].
pub fn evaluate<'a, E: From<String>>(
    weight: &Weight,
    load: &impl Fn(&str) -> Result<Tensor<'a>, E>,
) -> Result<Tensor<'a>, E> {
    match weight {
        Weight::Source(name) => load(name),
        Weight::Concat(axis, parts) => join(*axis, &all(parts, load)?).map_err(E::from),
        Weight::Stack(parts) => {
            let mut parts = all(parts, load)?;
            for part in &mut parts {
                part.shape.insert(0, 1);
            }
            join(0, &parts).map_err(E::from)
        }
        Weight::Interleave(axis, parts) => interleave(*axis, all(parts, load)?).map_err(E::from),
        Weight::Split(split, inner) => take(split, &evaluate(inner, load)?).map_err(E::from),
        Weight::Transpose(inner) => transpose(&evaluate(inner, load)?).map_err(E::from),
        Weight::Reshape(shape, inner) => Ok(Tensor { shape: shape.clone(), ..evaluate(inner, load)? }),
        Weight::AddOne(inner) => {
            let tensor = evaluate(inner, load)?;
            let mut values = tensor.to_f32().map_err(E::from)?;
            for value in &mut values {
                *value += 1.0;
            }
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            Ok(Tensor { element: ElementType::F32, shape: tensor.shape, bytes: Cow::Owned(bytes) })
        }
    }
}

fn all<'a, E: From<String>>(
    parts: &[Weight],
    load: &impl Fn(&str) -> Result<Tensor<'a>, E>,
) -> Result<Vec<Tensor<'a>>, E> {
    let parts: Vec<Tensor<'a>> = parts.iter().map(|part| evaluate(part, load)).collect::<Result<_, E>>()?;
    if let Some(first) = parts.first()
        && let Some(odd) = parts.iter().find(|part| part.element != first.element)
    {
        return Err(format!("{} and {} can not be joined", first.element, odd.element).into());
    }
    Ok(parts)
}

impl Tensor<'_> {
    /// Elements as float32.
    pub fn to_f32(&self) -> Result<Vec<f32>, String> {
        Ok(match self.element {
            ElementType::F32 => lanes::<4>(&self.bytes).map(f32::from_le_bytes).collect(),
            ElementType::F16 => lanes::<2>(&self.bytes).map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            ElementType::BF16 => lanes::<2>(&self.bytes).map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            #[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
            ElementType::F64 => lanes::<8>(&self.bytes).map(|b| f64::from_le_bytes(b) as f32).collect(),
            other => return Err(format!("{other} is not a float type")),
        })
    }

    /// The same values in another element type, rounded to nearest, ties to even.
    pub fn cast(self, element: ElementType) -> Result<Self, String> {
        if self.element == element {
            return Ok(self);
        }
        let width = self.element.size();
        let mut bytes = vec![0; self.bytes.len() / width * element.size()];
        // 64 Ki elements at a time: enough for a core to be worth its while.
        let chunk = 1 << 16;
        bytes.par_chunks_mut(chunk * element.size()).zip(self.bytes.par_chunks(chunk * width)).try_for_each(
            |(out, part)| {
                let part = Tensor { element: self.element, shape: Vec::new(), bytes: Cow::Borrowed(part) };
                store(&part.to_f32()?, element, out)
            },
        )?;
        Ok(Self { element, shape: self.shape, bytes: Cow::Owned(bytes) })
    }

    /// Bytes before, along and after one step of an axis: `(outer, length, inner)` with `inner` in bytes.
    fn axis(&self, axis: usize) -> Result<(usize, usize, usize), String> {
        let length = *self.shape.get(axis).ok_or_else(|| format!("{:?} has no axis {axis}", self.shape))?;
        let outer = self.shape.iter().take(axis).product();
        let inner = self.shape.iter().skip(axis + 1).product::<usize>() * self.element.size();
        Ok((outer, length, inner))
    }
}

fn lanes<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.chunks_exact(N).filter_map(|lane| lane.try_into().ok())
}

fn store(values: &[f32], element: ElementType, out: &mut [u8]) -> Result<(), String> {
    let lanes = out.chunks_exact_mut(element.size()).zip(values);
    match element {
        ElementType::F32 => lanes.for_each(|(lane, value)| lane.copy_from_slice(&value.to_le_bytes())),
        ElementType::F16 => lanes.for_each(|(lane, value)| lane.copy_from_slice(&f16::from_f32(*value).to_le_bytes())),
        ElementType::BF16 => {
            lanes.for_each(|(lane, value)| lane.copy_from_slice(&bf16::from_f32(*value).to_le_bytes()));
        }
        other => return Err(format!("weights are not written as {other}")),
    }
    Ok(())
}

fn join<'a>(axis: usize, parts: &[Tensor<'a>]) -> Result<Tensor<'a>, String> {
    let first = parts.first().ok_or("nothing to join")?;
    let (outer, ..) = first.axis(axis)?;
    let mut rows = Vec::with_capacity(parts.len());
    let mut total = 0;
    for part in parts {
        let (_, length, inner) = part.axis(axis)?;
        total += length;
        rows.push(part.bytes.chunks((length * inner).max(1)));
    }
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.bytes.len()).sum());
    for _ in 0..outer {
        for row in &mut rows {
            bytes.extend_from_slice(row.next().unwrap_or_default());
        }
    }
    let mut shape = first.shape.clone();
    if let Some(length) = shape.get_mut(axis) {
        *length = total;
    }
    Ok(Tensor { element: first.element, shape, bytes: Cow::Owned(bytes) })
}

/// Joined on a new axis behind `axis`, and then seen without it.
fn interleave(axis: usize, mut parts: Vec<Tensor<'_>>) -> Result<Tensor<'_>, String> {
    for part in &mut parts {
        part.shape.insert(axis + 1, 1);
    }
    let mut joined = join(axis + 1, &parts)?;
    let count = joined.shape.remove(axis + 1);
    if let Some(length) = joined.shape.get_mut(axis) {
        *length *= count;
    }
    Ok(joined)
}

fn take<'a>(split: &Split, tensor: &Tensor<'a>) -> Result<Tensor<'a>, String> {
    let (_, length, inner) = tensor.axis(split.axis)?;
    let (start, part, block) = split.block()?;
    let mut shape = tensor.shape.clone();
    if let Some(axis) = shape.get_mut(split.axis) {
        *axis = part * split.groups.max(1);
    }
    let within = start * inner..(start + part) * inner;
    // One contiguous piece of a mapped file needs no copy.
    if let (Cow::Borrowed(bytes), true) = (&tensor.bytes, length == block && tensor.bytes.len() == block * inner) {
        let bytes = bytes.get(within).ok_or("a piece lies beyond its tensor")?;
        return Ok(Tensor { element: tensor.element, shape, bytes: Cow::Borrowed(bytes) });
    }
    let mut bytes = Vec::with_capacity(tensor.bytes.len() / block.max(1) * part);
    for block in tensor.bytes.chunks((block * inner).max(1)) {
        bytes.extend_from_slice(block.get(within.clone()).ok_or("a piece lies beyond its tensor")?);
    }
    Ok(Tensor { element: tensor.element, shape, bytes: Cow::Owned(bytes) })
}

fn transpose<'a>(tensor: &Tensor<'a>) -> Result<Tensor<'a>, String> {
    let mut shape = tensor.shape.clone();
    let [.., rows, columns] = shape.as_mut_slice() else {
        return Err(format!("{:?} can not be transposed", tensor.shape));
    };
    let (width, size) = (*columns, tensor.element.size());
    let matrix = *rows * width * size;
    let mut bytes = vec![0; tensor.bytes.len()];
    let matrices = tensor.bytes.chunks(matrix.max(1)).zip(bytes.chunks_mut(matrix.max(1)));
    for (from, to) in matrices {
        to.par_chunks_mut((*rows * size).max(1)).enumerate().for_each(|(column, out)| {
            for (row, out) in from.chunks(width * size).zip(out.chunks_mut(size)) {
                if let Some(element) = row.get(column * size..(column + 1) * size) {
                    out.copy_from_slice(element);
                }
            }
        });
    }
    std::mem::swap(rows, columns);
    Ok(Tensor { element: tensor.element, shape, bytes: Cow::Owned(bytes) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(shape: &[usize], first: usize) -> Tensor<'static> {
        let count: usize = shape.iter().product();
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let bytes = (first..first + count).flat_map(|i| (i as f32).to_le_bytes()).collect();
        Tensor { element: ElementType::F32, shape: shape.to_vec(), bytes: Cow::Owned(bytes) }
    }

    fn check(weight: &Weight, shape: &[usize], values: &[f32]) {
        let load = |name: &str| match name {
            "a" => Ok(numbers(&[4, 2], 0)),
            "b" => Ok(numbers(&[4, 2], 100)),
            _ => Err(format!("there is no {name}")),
        };
        let result = evaluate::<String>(weight, &load).expect("evaluates");
        assert_eq!(result.shape, shape);
        assert_eq!(result.to_f32().expect("floats"), values);
        let shapes = |name: &str| matches!(name, "a" | "b").then_some([4, 2].as_slice());
        assert_eq!(weight.shape(&shapes), Ok(shape.to_vec()), "the shape is known before any byte is read");
    }

    fn a() -> Weight {
        Weight::source("a")
    }

    fn ab() -> Vec<Weight> {
        vec![a(), Weight::source("b")]
    }

    #[test]
    fn joins() {
        let long = [0., 1., 2., 3., 4., 5., 6., 7., 100., 101., 102., 103., 104., 105., 106., 107.];
        check(&Weight::Concat(0, ab()), &[8, 2], &long);
        check(&Weight::Stack(ab()), &[2, 4, 2], &long);
        let wide = [0., 1., 100., 101., 2., 3., 102., 103., 4., 5., 104., 105., 6., 7., 106., 107.];
        check(&Weight::Concat(1, ab()), &[4, 4], &wide);
        check(&Weight::Interleave(0, ab()), &[8, 2], &wide);
        let mixed = [0., 100., 1., 101., 2., 102., 3., 103., 4., 104., 5., 105., 6., 106., 7., 107.];
        check(&Weight::Interleave(1, ab()), &[4, 4], &mixed);
    }

    #[test]
    fn splits() {
        let split = |groups, sizes: &[usize], index, axis| {
            Weight::Split(Split { axis, groups, sizes: sizes.to_vec(), index }, Box::new(a()))
        };
        check(&split(1, &[1, 3], 0, 0), &[1, 2], &[0., 1.]);
        check(&split(1, &[1, 3], 1, 0), &[3, 2], &[2., 3., 4., 5., 6., 7.]);
        // two blocks of one row each: rows 0 and 2, rows 1 and 3
        check(&split(2, &[2, 2], 0, 0), &[2, 2], &[0., 1., 4., 5.]);
        check(&split(2, &[2, 2], 1, 0), &[2, 2], &[2., 3., 6., 7.]);
        check(&split(1, &[1, 1], 1, 1), &[4, 1], &[1., 3., 5., 7.]);
    }

    #[test]
    fn the_rest() {
        check(&Weight::Transpose(Box::new(a())), &[2, 4], &[0., 2., 4., 6., 1., 3., 5., 7.]);
        check(&Weight::AddOne(Box::new(a())), &[4, 2], &[1., 2., 3., 4., 5., 6., 7., 8.]);
        let flat = Weight::Reshape(vec![8], Box::new(a()));
        check(&flat, &[8], &[0., 1., 2., 3., 4., 5., 6., 7.]);
        let shapes = |_: &str| Some([4, 3].as_slice());
        assert!(flat.shape(&shapes).is_err(), "the number of elements stays");
    }

    #[test]
    fn casts_round_to_even() {
        let values = [1.0_f32, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 65536.0];
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let tensor = Tensor { element: ElementType::F32, shape: vec![4], bytes: Cow::Owned(bytes) };
        let cast = tensor.cast(ElementType::BF16).and_then(|t| t.to_f32()).expect("casts");
        assert_eq!(cast, [1.0, 1.0, 1.0 + 4.0 / 256.0, 65536.0]);
    }
}
