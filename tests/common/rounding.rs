//! Float repositories with the weights that a quantised one would compute with.

use std::fs;
use std::path::Path;

use hf2onnx::quantize::{Scheme, dequantize_rows, quantize_rows};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};

use super::TestResult;

/// Copies a repository of one `model.safetensors`, in float32, with the matrices that `scheme` has one for rounded to it.
pub fn rounded(from: &Path, into: &Path, scheme: impl Fn(&str) -> Option<Scheme>) -> TestResult {
    fs::create_dir_all(into)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if let Some(name) = path.file_name().filter(|name| *name != "model.safetensors" && path.is_file()) {
            fs::copy(&path, into.join(name))?;
        }
    }
    let bytes = fs::read(from.join("model.safetensors"))?;
    let mut tensors = Vec::new();
    for (name, view) in SafeTensors::deserialize(&bytes)?.tensors() {
        let mut values = floats(&view)?;
        if let (&[_, columns], Some(scheme)) = (view.shape(), scheme(&name)) {
            values = dequantize_rows(&quantize_rows(&values, columns, None, &scheme)?, columns, &scheme)?;
        }
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.push((name, view.shape().to_vec(), data));
    }
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, shape, data)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data)?)))
        .collect::<TestResult<_>>()?;
    serialize_to_file(views, None, &into.join("model.safetensors"))?;
    Ok(())
}

fn floats(view: &TensorView<'_>) -> TestResult<Vec<f32>> {
    let pairs = || view.data().as_chunks::<2>().0.iter();
    Ok(match view.dtype() {
        Dtype::F32 => view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::BF16 => pairs().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::F16 => pairs().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect(),
        other => return Err(format!("a tensor of {other:?}").into()),
    })
}
