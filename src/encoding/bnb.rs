//! bitsandbytes: nf4 and fp4 over the flattened matrix, and `LLM.int8`.

use serde_json::{Map, Value};

use super::form::{Index, Layout, Logical, Product, Scales, Values};
use super::parts::{Role, Stored, corrupt, whole};
use super::scan::{Scan, matrix, parts, plain, shaped};
use super::settings::{Keys, Settings};
use crate::element::{ElementType, StoredType};
use crate::error::Result;

const USED: [&str; 7] = [
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
    "llm_int8_skip_modules",
    "llm_int8_has_fp16_weight",
];
const ABOUT: [&str; 5] = [
    "_load_in_8bit",
    "bnb_4bit_compute_dtype",
    "llm_int8_threshold",
    "llm_int8_enable_fp32_cpu_offload",
    "bnb_4bit_blocksize",
];
const F32: &[StoredType] = &[StoredType::F32];
/// What `bnb_4bit_quant_storage` may store the bytes as.
const STORAGE: &[StoredType] = &[StoredType::U8, StoredType::I8, StoredType::BF16, StoredType::F16, StoredType::F32];

pub(super) fn recognise(scan: &mut Scan<'_>, settings: &Settings<'_>) -> Result<Keys> {
    let keys = settings.account(&USED, &ABOUT)?;
    for kind in ["nf4", "fp4"] {
        for name in scan.modules(&format!(".quant_state.bitsandbytes__{kind}")) {
            four_bits(scan, &name, kind)?;
        }
    }
    for module in scan.modules(".SCB") {
        eight_bits(scan, &module)?;
    }
    Ok(keys)
}

/// What the JSON beside a weight says of it.
struct State {
    shape: Vec<usize>,
    count: usize,
    block: usize,
    dtype: ElementType,
    /// Block and offset of quantised scales.
    nested: Option<(usize, f32)>,
}

impl State {
    fn read(scan: &Scan<'_>, tensor: &Stored) -> Result<Self> {
        let settings = read_json(scan, tensor)?;
        let wrong = |what: &str| corrupt(&tensor.name).found(format!("{settings:?}")).expected(what.to_owned());
        let number = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok());
        let size = |key: &str| settings.get(key).and_then(number).filter(|size| *size > 0);
        let sizes = settings.get("shape").and_then(Value::as_array);
        let shape: Option<Vec<usize>> = sizes.and_then(|sizes| sizes.iter().map(number).collect());
        let shape =
            shape.filter(|shape| shape.len() >= 2 && !shape.contains(&0)).ok_or_else(|| wrong("a matrix's shape"))?;
        let count = shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size));
        let dtype = match settings.get("dtype").and_then(Value::as_str) {
            Some("bfloat16") => ElementType::BF16,
            Some("float16") => ElementType::F16,
            Some("float32") => ElementType::F32,
            _ => return Err(wrong("dtype float16, bfloat16 or float32")),
        };
        let nested = if settings.contains_key("nested_blocksize") {
            let offset =
                settings.get("nested_offset").and_then(Value::as_f64).ok_or_else(|| wrong("a nested_offset"))?;
            Some((size("nested_blocksize").ok_or_else(|| wrong("a nested_blocksize"))?, single(offset)))
        } else {
            None
        };
        let count = count.ok_or_else(|| wrong("a shape that fits memory"))?;
        Ok(Self { shape, count, block: size("blocksize").ok_or_else(|| wrong("a blocksize"))?, dtype, nested })
    }
}

fn four_bits(scan: &mut Scan<'_>, name: &str, kind: &str) -> Result<()> {
    let tensor = scan.need(&format!("{name}.quant_state.bitsandbytes__{kind}"), &[StoredType::U8])?;
    let State { shape, count, block, dtype, nested } = State::read(scan, &tensor)?;
    let codes = scan.need(name, STORAGE)?;
    if codes.bytes() != count.div_ceil(2) as u64 {
        return Err(corrupt(name)
            .found(format!("{} bytes", codes.bytes()))
            .expected(format!("{count} codes of 4 bits")));
    }
    let scales = scan.need(&format!("{name}.absmax"), if nested.is_some() { &[StoredType::U8] } else { F32 })?;
    let blocks = count.div_ceil(block);
    shaped(&scales, &[blocks])?;
    let table = scan.need(&format!("{name}.quant_map"), F32)?;
    shaped(&table, &[16])?;
    let mut made = parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales)), (Role::Table, Some(table))]);
    let mut computed = Scales::Plain;
    if let Some((block, offset)) = nested {
        computed = Scales::Nested { block, offset };
        let scales = scan.need(&format!("{name}.nested_absmax"), F32)?;
        shaped(&scales, &[blocks.div_ceil(block)])?;
        let table = scan.need(&format!("{name}.nested_quant_map"), F32)?;
        shaped(&table, &[256])?;
        made.extend(parts([(Role::NestedScales, Some(scales)), (Role::NestedTable, Some(table))]));
    }
    scan.ignored.push(super::scan::Ignored { name: tensor.name, reason: "read: it says shape, type and blocks" });
    let mut encoding = plain(format!("bitsandbytes {kind}, blocks of {block}"), Values::Table, dtype);
    encoding.layout = Layout::FlatHighFirst;
    encoding.index = Index::Flat { block };
    encoding.scales = computed;
    encoding.product = Product::Once(dtype);
    scan.made.push(Logical { name: name.to_owned(), shape, dtype, encoding, parts: made });
    Ok(())
}

/// The library keeps the offset as float32.
#[allow(clippy::cast_possible_truncation)]
fn single(value: f64) -> f32 {
    value as f32
}

/// A tensor that holds JSON as bytes.
fn read_json(scan: &Scan<'_>, tensor: &Stored) -> Result<Map<String, Value>> {
    if tensor.bytes() > 1 << 16 {
        return Err(corrupt(&tensor.name).found(format!("{} bytes", tensor.bytes())).expected("a line of JSON"));
    }
    let bytes = whole(scan.parts, tensor)?;
    serde_json::from_slice(&bytes).map_err(|error| corrupt(&tensor.name).found(error).expected("JSON"))
}

fn eight_bits(scan: &mut Scan<'_>, module: &str) -> Result<()> {
    let codes = scan.need(&format!("{module}.weight"), &[StoredType::I8])?;
    let (rows, columns) = matrix(&codes)?;
    let scales = scan.need(&format!("{module}.SCB"), F32)?;
    shaped(&scales, &[rows])?;
    scan.ignore(&format!("{module}.weight_format"), "a marker of the layout, which is the plain one in files");
    let mut encoding = plain("bitsandbytes int8".to_owned(), Values::Signed(8), ElementType::F32);
    encoding.index = Index::Blocks { matrix: rows, rows: 1, columns, grid_rows: rows, grid_columns: 1 };
    encoding.product = Product::Over127;
    scan.made.push(Logical {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        dtype: ElementType::F32,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales))]),
    });
    Ok(())
}
