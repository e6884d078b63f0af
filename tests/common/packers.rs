//! Quantised checkpoints that are made here: a golden case's float matrices, packed as a format stores them.
// A case that can not be packed fails its test.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use hf2onnx::element::StoredType;
use hf2onnx::quantize::{Algorithm, Scheme, quantize_rows};
use serde_json::{Value, json};

use super::quantized::{Repository, Tensor};
use super::{Case, TestResult};

/// Formats that matrices are packed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// GPTQ, version 2.
    Gptq,
    /// compressed-tensors, `pack-quantized`.
    Packed,
}

/// How a matrix is packed.
#[derive(Debug, Clone, Copy)]
pub struct Packing {
    /// The format.
    pub format: Format,
    /// 2, 4 or 8.
    pub bits: u8,
    /// Columns of a group.
    pub group: usize,
    /// Without zero points; GPTQ stores those of the middle.
    pub symmetric: bool,
    /// Seed of an order of the columns (act-order); 0 leaves them as they are.
    pub order: usize,
}

/// The integers of a matrix, one a byte, [rows, columns], and scales and zero points, [rows, groups].
struct Integers {
    rows: usize,
    columns: usize,
    groups: usize,
    codes: Vec<u32>,
    scales: Vec<f32>,
    zeros: Vec<u32>,
    /// The group of each column.
    group_of: Vec<usize>,
}

/// A golden case with the matrices that `how` has a packing for quantised, and everything else in float32. Packings
/// may differ in their order of columns only.
pub fn packed(case: &Case, how: impl Fn(&str) -> Option<Packing>) -> TestResult<Repository> {
    let mut made = Repository::plain(&case.repo()?);
    let floats = std::mem::take(&mut made.tensors);
    let mut usual = None;
    for (name, tensor) in floats {
        let module = name.trim_end_matches(".weight").to_owned();
        match how(&module).filter(|_| tensor.shape.len() == 2) {
            None => drop(made.tensors.insert(name, widened(&tensor))),
            Some(packing) => {
                usual = usual.or(Some(packing));
                let integers = round(&tensor, packing);
                let parts = match packing.format {
                    Format::Gptq => gptq(&integers, packing),
                    Format::Packed => pack_quantized(&integers, packing),
                };
                made.tensors.extend(parts.into_iter().map(|(part, tensor)| (format!("{module}.{part}"), tensor)));
            }
        }
    }
    let config = made.files.get_mut("config.json").ok_or("no config.json")?;
    config.insert("quantization_config".to_owned(), settings(usual.ok_or("nothing to pack")?));
    Ok(made)
}

/// What config.json says of it.
fn settings(Packing { format, bits, group, symmetric, order }: Packing) -> Value {
    match format {
        Format::Gptq => json!({
            "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": bits, "group_size": group,
            "sym": symmetric, "desc_act": order > 0,
        }),
        Format::Packed => json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group,
            }}},
        }),
    }
}

/// The same values in float32, which nothing rounds again.
pub fn widened(tensor: &Tensor) -> Tensor {
    f32s(&tensor.shape, tensor.floats())
}

fn f32s(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Tensor {
    let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
    Tensor { dtype: StoredType::F32, shape: shape.to_vec(), bytes }
}

/// Columns in an order that `seed` says; full groups come before a short one.
pub fn shuffled(columns: usize, seed: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..columns).collect();
    if seed > 0 {
        order.sort_by_key(|column| column.wrapping_mul(2 * seed + 1).wrapping_mul(0x9e37_79b9) % 1009);
    }
    order
}

fn round(tensor: &Tensor, packing: Packing) -> Integers {
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let (values, order) = (tensor.floats(), shuffled(columns, packing.order));
    let scheme = Scheme::new(packing.bits, packing.symmetric, packing.group, Algorithm::Nearest).unwrap();
    let sorted: Vec<f32> =
        values.chunks(columns).flat_map(|row| order.iter().map(|column| row[*column]).collect::<Vec<_>>()).collect();
    let blocks = quantize_rows(&sorted, columns, None, &scheme).unwrap();
    let (groups, bits) = (scheme.blocks(columns), usize::from(packing.bits));
    let unpack = |bytes: &[u8], index: usize| u32::from(bytes[index * bits / 8] >> (index * bits % 8)) & mask(bits);
    let mut codes = vec![0; rows * columns];
    for (row, data) in blocks.data.chunks(scheme.row_bytes(columns)).enumerate() {
        for (place, column) in order.iter().enumerate() {
            codes[row * columns + column] = unpack(data, place);
        }
    }
    let zeros = match &blocks.zero_points {
        None => vec![1 << (bits - 1); rows * groups],
        Some(zeros) => {
            let rows = zeros.chunks(scheme.row_zero_bytes(columns));
            rows.flat_map(|row| (0..groups).map(|group| unpack(row, group)).collect::<Vec<_>>()).collect()
        }
    };
    let mut group_of = vec![0; columns];
    for (place, column) in order.iter().enumerate() {
        group_of[*column] = place / packing.group;
    }
    Integers { rows, columns, groups, codes, scales: blocks.scales, zeros, group_of }
}

fn mask(bits: usize) -> u32 {
    u32::MAX >> (32 - bits)
}

/// Integers of so many bits in 32-bit words, the first in the lowest bits.
fn words(integers: impl Iterator<Item = u32>, bits: usize) -> Vec<u32> {
    let integers: Vec<u32> = integers.collect();
    let word = |some: &[u32]| some.iter().enumerate().fold(0, |word, (i, integer)| word | integer << (i * bits));
    integers.chunks(32 / bits).map(word).collect()
}

fn i32s(shape: [usize; 2], words: Vec<u32>) -> Tensor {
    assert_eq!(words.len(), shape[0] * shape[1]);
    Tensor {
        dtype: StoredType::I32,
        shape: shape.to_vec(),
        bytes: words.into_iter().flat_map(u32::to_le_bytes).collect(),
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn turned<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

fn gptq(made: &Integers, packing: Packing) -> Vec<(&'static str, Tensor)> {
    let Integers { rows, columns, groups, codes, scales, zeros, group_of } = made;
    let bits = usize::from(packing.bits);
    // Along the columns: the words of each row, turned.
    let of_rows: Vec<u32> = codes.chunks(*columns).flat_map(|row| words(row.iter().copied(), bits)).collect();
    let height = columns * bits / 32;
    let of_groups = turned(zeros, *groups);
    let of_groups: Vec<u32> = of_groups.chunks(*rows).flat_map(|group| words(group.iter().copied(), bits)).collect();
    let order = group_of.iter().map(|group| u32::try_from(*group).unwrap()).collect();
    let order = Tensor { shape: vec![*columns], ..i32s([1, *columns], order) };
    vec![
        ("qweight", i32s([height, *rows], turned(&of_rows, height))),
        ("qzeros", i32s([*groups, rows * bits / 32], of_groups)),
        ("scales", f32s(&[*groups, *rows], turned(scales, *groups))),
        ("g_idx", order),
    ]
}

fn pack_quantized(made: &Integers, packing: Packing) -> Vec<(&'static str, Tensor)> {
    let Integers { rows, columns, groups, codes, scales, zeros, .. } = made;
    let bits = usize::from(packing.bits);
    let of_rows: Vec<u32> = codes.chunks(*columns).flat_map(|row| words(row.iter().copied(), bits)).collect();
    let shape = [*rows, *columns].map(|size| i64::try_from(size).unwrap());
    let shape = shape.into_iter().flat_map(i64::to_le_bytes).collect();
    let mut parts = vec![
        ("weight_packed", i32s([*rows, (columns * bits).div_ceil(32)], of_rows)),
        ("weight_scale", f32s(&[*rows, *groups], scales.iter().copied())),
        ("weight_shape", Tensor { dtype: StoredType::I64, shape: vec![2], bytes: shape }),
    ];
    if !packing.symmetric {
        // Along the rows: the words of each group, turned.
        let of_groups: Vec<u32> =
            turned(zeros, *groups).chunks(*rows).flat_map(|group| words(group.iter().copied(), bits)).collect();
        let height = (rows * bits).div_ceil(32);
        parts.push(("weight_zero_point", i32s([height, *groups], turned(&of_groups, height))));
    }
    parts
}
