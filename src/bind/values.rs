//! Values of a checkpoint's tensors, read where a decision hangs on them.

use rayon::prelude::*;

use crate::element::{ElementType, StoredType};
use crate::error::{Code, Error, Result};
use crate::interrupt;
use crate::read::{Checkpoint, TensorInfo};
use crate::weight::{Evaluation, Tensors, Weight, read_floats};

/// Elements that are compared or looked at at a time.
const CHUNK: usize = 1 << 20;

/// A checkpoint's tensors as weight expressions see them.
pub(crate) struct Values<'c>(pub(crate) &'c Checkpoint);

/// Why an expression has no value.
pub(crate) enum Failure {
    Read(Error),
    Transform(String),
}

impl Failure {
    pub(crate) fn about(self, what: &str) -> Error {
        match self {
            Self::Read(error) => error,
            Self::Transform(reason) => Error::new(Code::TensorShape, what).found(reason),
        }
    }
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Transform(reason)
    }
}

impl Tensors for Values<'_> {
    type Error = Failure;

    fn describe(&self, name: &str) -> Result<(ElementType, Vec<usize>), Failure> {
        let info = self.0.get(name).ok_or_else(|| format!("there is no {name}"))?;
        let element = info.dtype.element().ok_or_else(|| format!("{name} is {}", info.dtype))?;
        Ok((element, info.shape.clone()))
    }

    fn read(&self, name: &str, first: usize, out: &mut [u8]) -> Result<(), Failure> {
        let info = self.0.get(name).ok_or_else(|| format!("there is no {name}"))?;
        let element = info.dtype.element().ok_or_else(|| format!("{name} is {}", info.dtype))?;
        self.0.read(info, (first * element.size()) as u64, out).map_err(Failure::Read)
    }
}

/// Whether two expressions have the same shape and the same values, whatever types they are stored in.
pub(super) fn equal(a: &Weight, b: &Weight, checkpoint: &Checkpoint) -> Result<bool> {
    let values = Values(checkpoint);
    let about = |weight: &Weight| {
        let name = weight.to_string();
        move |failure: Failure| failure.about(&name)
    };
    let (first, second) =
        (Evaluation::new(a, &values).map_err(about(a))?, Evaluation::new(b, &values).map_err(about(b))?);
    if first.shape != second.shape {
        return Ok(false);
    }
    let count = first.count();
    let chunks = (0..count).into_par_iter().step_by(CHUNK);
    let differs = chunks.map(|start| {
        interrupt::check()?;
        let length = CHUNK.min(count - start);
        let bytes = |evaluation: &Evaluation| {
            let mut bytes = vec![0; length * evaluation.element.size()];
            evaluation.fill(&values, start, &mut bytes).map(|()| bytes)
        };
        let (mine, other) = (bytes(&first).map_err(about(a))?, bytes(&second).map_err(about(b))?);
        if first.element == second.element && mine == other {
            return Ok(false);
        }
        // Zeros of both signs are equal, and so is a float in a wider type.
        let floats = |bytes: &[u8], element: ElementType| {
            let mut floats = Vec::with_capacity(length);
            read_floats(bytes, element, &mut floats).map(|()| floats)
        };
        let mine = floats(&mine, first.element).map_err(|reason| about(a)(reason.into()))?;
        let other = floats(&other, second.element).map_err(|reason| about(b)(reason.into()))?;
        Ok(mine != other)
    });
    match differs.find_any(|chunk| !matches!(chunk, Ok(false))) {
        Some(found) => found.map(|differs| !differs),
        None => Ok(true),
    }
}

/// Tells `each` of a tensor's elements, in order, as numbers, a chunk at a time, until it says no.
///
/// None, if its type is one that is no number by itself.
pub(super) fn all(
    tensor: &TensorInfo,
    checkpoint: &Checkpoint,
    mut each: impl FnMut(usize, f64) -> bool,
) -> Result<Option<bool>> {
    let size = usize::try_from(tensor.dtype.bits() / 8).unwrap_or(0);
    let count = tensor.shape.iter().product::<usize>();
    for first in (0..count).step_by(CHUNK) {
        let mut bytes = vec![0; CHUNK.min(count - first) * size];
        checkpoint.read(tensor, (first * size) as u64, &mut bytes)?;
        let Some(numbers) = numbers(&bytes, tensor.dtype) else { return Ok(None) };
        if !numbers.into_iter().enumerate().all(|(i, number)| each(first + i, number)) {
            return Ok(Some(false));
        }
    }
    Ok(Some(true))
}

#[expect(clippy::cast_precision_loss, reason = "positions and masks are small")]
fn numbers(bytes: &[u8], dtype: StoredType) -> Option<Vec<f64>> {
    Some(match dtype {
        StoredType::Bool | StoredType::U8 => bytes.iter().map(|byte| f64::from(*byte)).collect(),
        StoredType::I32 => bytes.as_chunks().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect(),
        StoredType::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
        StoredType::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        _ => {
            let mut floats = Vec::new();
            read_floats(bytes, dtype.element()?, &mut floats).ok()?;
            floats.into_iter().map(f64::from).collect()
        }
    })
}
