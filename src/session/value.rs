//! onnxruntime's tensors from and to what this side of it has.

use half::slice::HalfFloatSliceExt as _;
use ort::memory::Allocator;
use ort::value::{DynTensor, DynValue, PrimitiveTensorElementType, Tensor, TensorElementType, ValueType};

use super::{Floats, IntMatrix};
use crate::element::ElementType;

/// The element type of a value of the graph, if a decoder may have it in a state or as logits.
pub(super) fn element_of(value: &ValueType) -> Option<ElementType> {
    Some(match value.tensor_type()? {
        TensorElementType::Float32 => ElementType::F32,
        TensorElementType::Float16 => ElementType::F16,
        TensorElementType::Bfloat16 => ElementType::BF16,
        TensorElementType::Int64 => ElementType::I64,
        TensorElementType::Int32 => ElementType::I32,
        TensorElementType::Int8 => ElementType::I8,
        TensorElementType::Uint8 => ElementType::U8,
        TensorElementType::Float8E4M3FN => ElementType::F8E4M3,
        _ => return None,
    })
}

/// onnxruntime's name of an element type that [`element_of`] gives.
pub(super) fn element_type(element: ElementType) -> TensorElementType {
    match element {
        ElementType::F16 => TensorElementType::Float16,
        ElementType::BF16 => TensorElementType::Bfloat16,
        ElementType::I64 => TensorElementType::Int64,
        ElementType::I32 => TensorElementType::Int32,
        ElementType::I8 => TensorElementType::Int8,
        ElementType::U8 => TensorElementType::Uint8,
        ElementType::F8E4M3 => TensorElementType::Float8E4M3FN,
        _ => TensorElementType::Float32,
    }
}

pub(super) fn tensor(matrix: &IntMatrix) -> ort::Result<Tensor<i64>> {
    Tensor::from_array(([matrix.rows, matrix.columns], matrix.data.clone()))
}

/// A tensor of zeros in the processor's memory.
pub(super) fn zeros(element: ElementType, shape: Vec<usize>) -> ort::Result<DynValue> {
    fn fill<T: PrimitiveTensorElementType + Default>(tensor: &mut DynTensor) -> ort::Result<()> {
        tensor.try_extract_tensor_mut::<T>()?.1.fill_with(T::default);
        Ok(())
    }
    let empty = shape.contains(&0);
    let mut tensor = DynTensor::new(&Allocator::default(), element_type(element), shape)?;
    if !empty {
        match element {
            ElementType::F16 => fill::<half::f16>(&mut tensor)?,
            ElementType::BF16 => fill::<half::bf16>(&mut tensor)?,
            ElementType::I64 => fill::<i64>(&mut tensor)?,
            ElementType::I32 => fill::<i32>(&mut tensor)?,
            ElementType::I8 => fill::<i8>(&mut tensor)?,
            ElementType::U8 => fill::<u8>(&mut tensor)?,
            // No type of this side stands for its elements. They are zeros: ort clears this side's memory.
            ElementType::F8E4M3 => {}
            _ => fill::<f32>(&mut tensor)?,
        }
    }
    Ok(tensor.into_dyn())
}

/// A tensor of any float type as float32.
pub(super) fn to_floats(value: &DynValue) -> ort::Result<Floats> {
    convert(value, false)
}

/// Of `[rows, positions, vocabulary]` the last position of each row: `[rows, vocabulary]`.
pub(super) fn last_positions(value: &DynValue) -> ort::Result<Vec<f32>> {
    convert(value, true).map(|floats| floats.data)
}

/// All values, or of each row the last ones, as many as the last dimension has.
fn convert(value: &DynValue, last: bool) -> ort::Result<Floats> {
    match value.dtype().tensor_type() {
        Some(TensorElementType::Float16) => rows(value, last, <[half::f16]>::to_f32_vec),
        Some(TensorElementType::Bfloat16) => rows(value, last, <[half::bf16]>::to_f32_vec),
        _ => rows(value, last, <[f32]>::to_vec),
    }
}

fn rows<T: PrimitiveTensorElementType>(
    value: &DynValue,
    last: bool,
    floats: fn(&[T]) -> Vec<f32>,
) -> ort::Result<Floats> {
    let (shape, data) = value.try_extract_tensor::<T>()?;
    let shape: Vec<usize> = shape.iter().map(|d| usize::try_from(*d).unwrap_or(0)).collect();
    if !last {
        return Ok(Floats { data: floats(data), shape });
    }
    let row: usize = shape.iter().skip(1).product();
    let kept = shape.last().copied().unwrap_or(0);
    let rows = data.chunks(row.max(1));
    let data = rows.flat_map(|row| floats(row.get(row.len().saturating_sub(kept)..).unwrap_or_default())).collect();
    Ok(Floats { shape, data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Search, ensure};

    #[test]
    fn each_rows_last_position_of_any_float_type() {
        ensure(&Search::default(), &mut |_| {}).unwrap();
        // Two rows, three positions, a vocabulary of two.
        let values: Vec<f32> = (0..12_u8).map(f32::from).collect();
        let half: Vec<half::f16> = values.iter().map(|x| half::f16::from_f32(*x)).collect();
        let brain: Vec<half::bf16> = values.iter().map(|x| half::bf16::from_f32(*x)).collect();
        let shape = [2_usize, 3, 2];
        let tensors = [
            Tensor::from_array((shape, values.clone())).unwrap().into_dyn(),
            Tensor::from_array((shape, half)).unwrap().into_dyn(),
            Tensor::from_array((shape, brain)).unwrap().into_dyn(),
        ];
        for tensor in tensors {
            assert_eq!(last_positions(&tensor).unwrap(), [4.0, 5.0, 10.0, 11.0]);
            assert_eq!(to_floats(&tensor).unwrap(), Floats { shape: shape.to_vec(), data: values.clone() });
        }
    }

    #[test]
    fn states_of_every_type_begin_as_zeros() {
        use ElementType::{BF16, F8E4M3, F16, F32, I8, U8};
        ensure(&Search::default(), &mut |_| {}).unwrap();
        for element in [F32, F16, BF16, F8E4M3, I8, U8] {
            let zeros = zeros(element, vec![2, 3]).unwrap();
            assert_eq!(element_of(zeros.dtype()), Some(element));
            if element.is_float() {
                assert_eq!(to_floats(&zeros).unwrap().data, [0.0; 6]);
            }
            assert!(super::zeros(element, vec![1, 0, 4]).is_ok(), "{element}");
        }
    }
}
