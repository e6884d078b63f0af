//! Small floats with scales of blocks: FP8 as `DeepSeek` and Qwen publish it, fbgemm's, and gpt-oss's MXFP4.

use serde_json::Value;

use super::form::{Index, Layout, Logical, Product, Values};
use super::parts::{Role, Stored, corrupt};
use super::scan::{ACTIVATION, CACHE, Scan, grid, matrix, parts, plain, shaped};
use super::settings::{Excluded, Keys, Settings};
use crate::element::StoredType;
use crate::error::{Code, Error, Result};

/// Which modules; the stored tensors say it too.
const LEFT_OUT: [&str; 4] = ["modules_to_not_convert", "ignored_layers", "modules_to_convert", "dequantize"];
const ABOUT: [&str; 2] = ["fmt", "use_fbgemm"];
const SCALES: &[StoredType] = &[StoredType::F32, StoredType::BF16, StoredType::F16, StoredType::U8, StoredType::F8E8M0];

/// FP8 with scales of blocks; the true grid has full blocks and a short one at each edge.
pub(super) fn recognise(scan: &mut Scan<'_>, settings: &Settings<'_>) -> Result<Keys> {
    let used = ["weight_block_size", "scale_fmt", "expert_dtype"];
    let keys = settings.account(&[used.as_slice(), &LEFT_OUT].concat(), &ABOUT)?;
    let given = settings.map.get("weight_block_size").filter(|value| !value.is_null());
    let block = match given {
        None if settings.method == "mxfp8" => (1, 32),
        None => (0, 0),
        Some(value) => block_size(value).ok_or_else(|| settings.bad("weight_block_size", "two sizes of at least 1"))?,
    };
    if let Some(format) = settings.text("scale_fmt").filter(|format| !["float", "ue8m0", "e8m0"].contains(format)) {
        return Err(settings.bad("scale_fmt", &format!("float or ue8m0, not {format}")));
    }
    scan.ignore_all(&[".activation_scale", ".input_scale", "_activation_scale", ".act_scale"], ACTIVATION);
    scan.ignore_all(&[".k_scale", ".v_scale"], CACHE);
    let left_out = Excluded::read(settings)?;
    for name in scan.modules("_scale_inv") {
        one(scan, (settings, &left_out), &name, "_scale_inv", block)?;
    }
    // Without blocks, some files name the scale as the others do.
    for name in scan.modules(".weight_scale") {
        one(scan, (settings, &left_out), &format!("{name}.weight"), "_scale", block)?;
    }
    Ok(keys)
}

fn block_size(value: &Value) -> Option<(usize, usize)> {
    let sides: Option<Vec<usize>> =
        value.as_array()?.iter().map(|side| side.as_u64().and_then(|side| usize::try_from(side).ok())).collect();
    match sides?.as_slice() {
        [rows, columns] if *rows > 0 && *columns > 0 => Some((*rows, *columns)),
        _ => None,
    }
}

/// FP8 with a scale for each row, as fbgemm has it.
pub(super) fn recognise_fbgemm(scan: &mut Scan<'_>, settings: &Settings<'_>) -> Result<Keys> {
    let keys = settings.account(&LEFT_OUT, &ABOUT)?;
    scan.ignore_all(&[".input_scale_ub", ".input_scale"], ACTIVATION);
    let left_out = Excluded::read(settings)?;
    for name in scan.modules("_scale") {
        if scan.peek(&name).is_some_and(|tensor| tensor.dtype == StoredType::F8E4M3) {
            one(scan, (settings, &left_out), &name, "_scale", (1, 0))?;
        }
    }
    Ok(keys)
}

fn one(
    scan: &mut Scan<'_>,
    (settings, left_out): (&Settings<'_>, &Excluded<'_>),
    name: &str,
    ending: &str,
    block: (usize, usize),
) -> Result<()> {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    if left_out.names(module)? {
        scan.notes.push(format!("{name}: quantised, though modules_to_not_convert names it"));
    }
    let types = [StoredType::F8E4M3, StoredType::F8E5M2, StoredType::I8];
    let codes = scan.need(name, &types)?;
    let scales = scan.need(&format!("{name}{ending}"), SCALES)?;
    let packed = codes.dtype == StoredType::I8;
    let mut shape = codes.shape.clone();
    let (2.., Some(last)) = (shape.len(), shape.last_mut()) else {
        return Err(corrupt(&codes.name)
            .found(format!("shape {:?}", codes.shape))
            .expected("a matrix, or a stack of them"));
    };
    let stride = *last;
    // Experts of some checkpoints are MXFP4, two to a byte, with a scale for 32 of a row.
    let block = if packed { (1, 32) } else { block };
    if packed {
        *last = stride.saturating_mul(2);
    }
    let index = grid(&scales, &shape, block)?;
    let values = match codes.dtype {
        StoredType::F8E5M2 => Values::E5M2,
        StoredType::I8 => Values::E2M1,
        _ => Values::E4M3,
    };
    let said = match index {
        Index::Blocks { rows, columns, .. } => format!("{}, blocks of {rows} x {columns}", settings.method),
        _ => format!("{}, one scale", settings.method),
    };
    let mut encoding = plain(said, values, scan.dtype);
    encoding.index = index;
    encoding.product = Product::Once(scan.dtype);
    if packed {
        encoding.layout = Layout::Rows { bits: 4, stride };
    }
    scan.made.push(Logical {
        name: name.to_owned(),
        shape,
        dtype: scan.dtype,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales))]),
    });
    Ok(())
}

/// gpt-oss: stacked experts in blocks of 32 inputs, stored [experts, outputs, inputs] and used [experts, inputs, outputs].
pub(super) fn recognise_mxfp4(scan: &mut Scan<'_>, settings: &Settings<'_>) -> Result<Keys> {
    let keys = settings.account(&LEFT_OUT, &ABOUT)?;
    for name in scan.modules("_blocks") {
        let codes = scan.need(&format!("{name}_blocks"), &[StoredType::U8])?;
        let scales = scan.need(&format!("{name}_scales"), &[StoredType::U8])?;
        let [experts, outputs, groups, 16] = *codes.shape.as_slice() else {
            return Err(shape_of_blocks(&codes));
        };
        shaped(&scales, &[experts, outputs, groups])?;
        if codes.count() == 0 {
            return Err(shape_of_blocks(&codes));
        }
        let inputs = groups.saturating_mul(32);
        let mut encoding = plain("mxfp4, blocks of 32".to_owned(), Values::E2M1, scan.dtype);
        encoding.layout = Layout::Transposed { rows: inputs };
        encoding.index = Index::Experts { rows: inputs };
        encoding.product = Product::Once(scan.dtype);
        scan.made.push(Logical {
            name,
            shape: vec![experts, inputs, outputs],
            dtype: scan.dtype,
            encoding,
            parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales))]),
        });
    }
    Ok(keys)
}

fn shape_of_blocks(codes: &Stored) -> Error {
    Error::new(Code::TensorShape, format!("tensor {}", codes.name))
        .found(format!("{:?}", codes.shape))
        .expected("[experts, outputs, blocks, 16]")
}

/// A matrix and its columns, where two codes share a byte.
pub(super) fn pairs(codes: &Stored) -> Result<(usize, usize, usize)> {
    let (rows, stride) = matrix(codes)?;
    Ok((rows, stride.saturating_mul(2), stride))
}
