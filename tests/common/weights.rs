//! The rule of `weights.json`: weights that are drawn again, bit for bit, instead of being stored.
//!
//! Element i of a tensor is `f32(mean) + f32(scale) * f32(s(i) - 131070)`, each operation rounded to float32 on its own,
//! then rounded to the tensor's type; s(i) is the sum of the four 16-bit lanes of the i-th output of splitmix64.
//! `golden/weights.py` is the same rule for Python; `tests/python/check_weights.py` compares the two.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, View};
use serde::Deserialize;

use super::TestResult;

/// Version of the rule: part of the key under which restored cases are kept.
pub const RULE: u32 = 1;

/// An entry of `weights.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    shape: Vec<usize>,
    dtype: String,
    file: String,
    #[serde(default)]
    seed: Option<String>,
    #[serde(default)]
    mean: f64,
    #[serde(default)]
    scale: f64,
    /// Literal elements instead of drawn ones.
    #[serde(default)]
    values: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    zero_rows: Vec<usize>,
}

/// A tensor to be written.
struct Drawn {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Drawn {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes the safetensors files that a `weights.json` describes, and an index where there is more than one.
pub fn restore(recipe: &Path, into: &Path) -> TestResult {
    let entries: Vec<Entry> = serde_json::from_slice(&std::fs::read(recipe)?)?;
    let mut files: BTreeMap<String, BTreeMap<String, Drawn>> = BTreeMap::new();
    for entry in entries {
        let drawn = draw(&entry).map_err(|error| format!("{}: {error}", entry.name))?;
        files.entry(entry.file).or_default().insert(entry.name, drawn);
    }
    let mut weight_map = BTreeMap::new();
    let (several, mut size) = (files.len() > 1, 0);
    for (file, tensors) in files {
        for (name, tensor) in &tensors {
            weight_map.insert(name.clone(), file.clone());
            size += tensor.bytes.len();
        }
        let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
        safetensors::serialize_to_file(tensors, Some(metadata), &into.join(file))?;
    }
    if several {
        let index = serde_json::json!({ "metadata": { "total_size": size }, "weight_map": weight_map });
        std::fs::write(into.join("model.safetensors.index.json"), serde_json::to_vec_pretty(&index)?)?;
    }
    Ok(())
}

fn draw(entry: &Entry) -> TestResult<Drawn> {
    let dtype = dtype(&entry.dtype)?;
    let mut bytes = match (&entry.values, &entry.seed) {
        (Some(values), _) => literal(dtype, values)?,
        (None, Some(seed)) => {
            let count = entry.shape.iter().product();
            random(dtype, seed.parse()?, count, rounded(entry.mean), rounded(entry.scale))?
        }
        (None, None) => return Err("neither seed nor values".into()),
    };
    let row = bytes.len() / entry.shape.first().copied().unwrap_or(1).max(1);
    for at in &entry.zero_rows {
        bytes.get_mut(at * row..(at + 1) * row).ok_or("a zero row past the end")?.fill(0);
    }
    Ok(Drawn { dtype, shape: entry.shape.clone(), bytes })
}

fn dtype(name: &str) -> TestResult<Dtype> {
    Ok(match name {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float64" => Dtype::F64,
        "int64" => Dtype::I64,
        "int32" => Dtype::I32,
        "int8" => Dtype::I8,
        "uint8" => Dtype::U8,
        "bool" => Dtype::BOOL,
        other => return Err(format!("dtype {other}").into()),
    })
}

/// The nearest float32.
#[allow(clippy::cast_possible_truncation)]
fn rounded(value: f64) -> f32 {
    value as f32
}

fn random(dtype: Dtype, seed: u64, count: usize, mean: f32, scale: f32) -> TestResult<Vec<u8>> {
    let mut bytes = Vec::with_capacity(count * 4);
    let mut state = seed;
    for _ in 0..count {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let steps = scale * lanes(mix(state));
        write_float(dtype, mean + steps, &mut bytes)?;
    }
    Ok(bytes)
}

/// The output function of splitmix64.
fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The sum of the four lanes around its middle: nearly normal, and exact in float32.
#[allow(clippy::cast_precision_loss)]
fn lanes(bits: u64) -> f32 {
    let sum =
        (0..4).map(|lane| i32::from(u16::try_from((bits >> (16 * lane)) & 0xFFFF).unwrap_or_default())).sum::<i32>();
    (sum - 131_070) as f32
}

fn write_float(dtype: Dtype, value: f32, bytes: &mut Vec<u8>) -> TestResult {
    match dtype {
        Dtype::F32 => bytes.extend(value.to_le_bytes()),
        Dtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
        Dtype::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
        Dtype::F64 => bytes.extend(f64::from(value).to_le_bytes()),
        other => return Err(format!("{other:?} is not a float").into()),
    }
    Ok(())
}

fn literal(dtype: Dtype, values: &[serde_json::Value]) -> TestResult<Vec<u8>> {
    let mut bytes = Vec::new();
    for value in values {
        let integer = || value.as_i64().ok_or_else(|| format!("{value} is not an integer"));
        match dtype {
            Dtype::I64 => bytes.extend(integer()?.to_le_bytes()),
            Dtype::I32 => bytes.extend(i32::try_from(integer()?)?.to_le_bytes()),
            Dtype::I8 => bytes.extend(i8::try_from(integer()?)?.to_le_bytes()),
            Dtype::U8 => bytes.push(u8::try_from(integer()?)?),
            Dtype::BOOL => bytes.push(u8::from(value.as_bool().ok_or_else(|| format!("{value} is not a boolean"))?)),
            Dtype::F64 => bytes.extend(value.as_f64().ok_or("not a number")?.to_le_bytes()),
            float => write_float(float, rounded(value.as_f64().ok_or("not a number")?), &mut bytes)?,
        }
    }
    Ok(bytes)
}
