//! NVIDIA `ModelOpt`: FP8, NVFP4 and 4-bit integers of AWQ, for all layers or layer by layer.

use serde_json::Value;

use super::form::{Layout, Logical, Product, Scales, Values};
use super::fp8::pairs;
use super::parts::{Role, Stored};
use super::scan::{ACTIVATION, CACHE, FLOATS, Scan, grid, matrix, parts, plain, shaped};
use super::settings::{Configs, Keys, Settings, bad, size};
use crate::element::{ElementType, StoredType};
use crate::error::{Code, Error, Result};

const USED: [&str; 9] = [
    "quant_algo",
    "group_size",
    "exclude_modules",
    "ignore",
    "quantized_layers",
    "config_groups",
    "has_zero_point",
    "pre_quant_scale",
    "quantization",
];
const ABOUT: [&str; 3] = ["quant_method", "version", "smoothquant_val"];

pub(super) fn recognise(scan: &mut Scan<'_>, settings: &Settings<'_>, configs: &Configs<'_>) -> Result<Keys> {
    let keys = settings.account(&USED, &ABOUT)?;
    // The group size stands in the sidecar alone for 4-bit integers.
    let sidecar = configs.hf_quant_config.and_then(|map| map.get("quantization")).and_then(Value::as_object);
    let setting =
        |key: &str| settings.map.get(key).or_else(|| sidecar.and_then(|map| map.get(key))).filter(|v| !v.is_null());
    let overall = setting("quant_algo").and_then(Value::as_str);
    if overall.is_none() {
        return Err(settings.bad("quant_algo", "FP8, NVFP4, W4A16_AWQ or MIXED_PRECISION"));
    }
    if setting("has_zero_point").and_then(Value::as_bool) == Some(true) {
        return Err(settings.bad("has_zero_point", "false: zero points of ModelOpt are not known"));
    }
    let layers = setting("quantized_layers").and_then(Value::as_object);
    scan.ignore_all(&[".input_scale"], ACTIVATION);
    scan.ignore_all(&[".k_scale", ".v_scale", ".k_bias", ".v_bias"], CACHE);
    if let Some(name) = scan.left.keys().find(|name| name.ends_with(".pre_quant_scale")) {
        return Err(Error::new(Code::QuantizationUnsupported, format!("tensor {name}"))
            .found("a factor of the layer's input, which no weight of the architecture has")
            .expected("weights that need nothing at run time")
            .help("export with the factors folded into the layers before, or use the checkpoint from which this one was quantised"));
    }
    for module in scan.modules(".weight") {
        if scan.peek(&format!("{module}.weight_scale")).is_none() {
            continue;
        }
        let own = layers.and_then(|layers| layers.get(&module));
        let algorithm =
            own.and_then(|own| own.get("quant_algo")).and_then(Value::as_str).or(overall).unwrap_or_default();
        let width = size(own.and_then(|own| own.get("group_size")).or_else(|| setting("group_size")));
        one(scan, settings, &module, algorithm, width)?;
    }
    Ok(keys)
}

fn one(scan: &mut Scan<'_>, settings: &Settings<'_>, module: &str, algorithm: &str, width: Option<i64>) -> Result<()> {
    let made = match algorithm {
        "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" | "FP8_PB_WO" | "MXFP8" => fp8(scan, module, algorithm)?,
        "NVFP4" | "W4A16_NVFP4" | "W4A8_NVFP4_FP8" | "NVFP4_AWQ" => nvfp4(scan, module, algorithm)?,
        "W4A16_AWQ" | "INT4_AWQ" => {
            let size = width.and_then(|width| usize::try_from(width).ok()).filter(|width| *width > 0);
            awq(scan, module, size.ok_or_else(|| settings.bad("group_size", "a size of at least 1"))?)?
        }
        other => {
            let expected = "FP8, NVFP4, W4A16_NVFP4 or W4A16_AWQ";
            return Err(bad(&settings.source, "quant_algo", Some(&other.into()), expected));
        }
    };
    scan.made.push(made);
    Ok(())
}

fn fp8(scan: &mut Scan<'_>, module: &str, algorithm: &str) -> Result<Logical> {
    let codes = scan.need(&format!("{module}.weight"), &[StoredType::F8E4M3])?;
    let (rows, columns) = matrix(&codes)?;
    let scales = scan.need(&format!("{module}.weight_scale"), &[FLOATS, &[StoredType::U8]].concat())?;
    // [rows / b, 1, columns / b, 1]; b is not written anywhere, and the blocks are all full.
    let block = match scales.shape.as_slice() {
        [high, 1, wide, 1] => (side(rows, *high), side(columns, *wide)),
        [_, wide] => (1, side(columns, *wide)),
        _ => (1, columns),
    };
    let mut encoding = plain(format!("modelopt {algorithm}"), Values::E4M3, ElementType::F32);
    encoding.index = grid(&scales, &[rows, columns], block)?;
    encoding.product = Product::Once(ElementType::F32);
    Ok(finished(module, (rows, columns), ElementType::F32, encoding, [codes, scales], None))
}

fn side(size: usize, blocks: usize) -> usize {
    if blocks == 0 || !size.is_multiple_of(blocks) { 0 } else { size / blocks }
}

fn nvfp4(scan: &mut Scan<'_>, module: &str, algorithm: &str) -> Result<Logical> {
    let codes = scan.need(&format!("{module}.weight"), &[StoredType::U8])?;
    let (rows, columns, stride) = pairs(&codes)?;
    let scales = scan.need(&format!("{module}.weight_scale"), &[StoredType::F8E4M3])?;
    shaped(&scales, &[rows, columns.div_ceil(16)])?;
    let global = scan.need(&format!("{module}.weight_scale_2"), &[StoredType::F32])?;
    if global.count() != 1 {
        shaped(&global, &[])?;
    }
    let mut encoding = plain(format!("modelopt {algorithm}, blocks of 16"), Values::E2M1OneZero, scan.dtype);
    encoding.layout = Layout::Rows { bits: 4, stride };
    encoding.index = grid(&scales, &[rows, columns], (1, 16))?;
    encoding.scales = Scales::TimesGlobal;
    encoding.product = Product::Once(scan.dtype);
    Ok(finished(module, (rows, columns), scan.dtype, encoding, [codes, scales], Some(global)))
}

fn awq(scan: &mut Scan<'_>, module: &str, width: usize) -> Result<Logical> {
    let codes = scan.need(&format!("{module}.weight"), &[StoredType::U8])?;
    let (half, columns) = matrix(&codes)?;
    let rows = half.saturating_mul(2);
    let scales = scan.need(&format!("{module}.weight_scale"), FLOATS)?;
    shaped(&scales, &[rows, columns.div_ceil(width)])?;
    let to = super::decode::float(scales.dtype).unwrap_or(ElementType::F32);
    let mut encoding = plain(format!("modelopt W4A16_AWQ, groups of {width}"), Values::Signed(4), to);
    encoding.layout = Layout::RowPairs;
    encoding.index = grid(&scales, &[rows, columns], (1, width))?;
    Ok(finished(module, (rows, columns), to, encoding, [codes, scales], None))
}

fn finished(
    module: &str,
    (rows, columns): (usize, usize),
    dtype: ElementType,
    encoding: super::form::Encoding,
    [codes, scales]: [Stored; 2],
    global: Option<Stored>,
) -> Logical {
    Logical {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        dtype,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales)), (Role::Global, global)]),
    }
}
