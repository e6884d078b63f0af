//! HQQ and optimum-quanto: groups over the flattened matrix, packed slice by slice.

use serde_json::Value;

use super::decode::float;
use super::form::{Index, Layout, Logical, Product, Values, Zeros};
use super::parts::{Role, Stored, corrupt, whole};
use super::scan::{ACTIVATION, FLOATS, Scan, grid, matrix, parts, plain, shaped};
use super::settings::{Keys, Settings};
use crate::element::{ElementType, StoredType};
use crate::error::{Code, Error, Result};

/// Tensors in which HQQ keeps the settings of a layer.
const META: [&str; 15] = [
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
];
const META_REASON: &str = "read: a setting of the layer";

/// HQQ; its settings stand beside each weight, as tensors.
pub(super) fn recognise_hqq(scan: &mut Scan<'_>, settings: &Settings<'_>) -> Result<Keys> {
    let keys = settings.account(&["quant_config", "skip_modules"], &[])?;
    for module in scan.modules(".W_q") {
        hqq(scan, &module)?;
        let names = META.iter().chain(&["round_zero"]);
        names.for_each(|name| scan.ignore(&format!("{module}.{name}"), META_REASON));
    }
    Ok(keys)
}

/// What HQQ's setting tensors say.
struct Meta<'s, 'a> {
    scan: &'s Scan<'a>,
    module: &'s str,
}

impl Meta<'_, '_> {
    fn tensor(&self, name: &str) -> Result<Vec<u8>> {
        let full = format!("{}.{name}", self.module);
        let tensor = self.scan.peek(&full).ok_or_else(|| {
            Error::new(Code::TensorMissing, format!("tensor {full}"))
                .found("nothing")
                .expected("a setting of HQQ's layer")
        })?;
        if tensor.bytes() > 256 {
            return Err(corrupt(&full).found(format!("{} bytes", tensor.bytes())).expected("a setting"));
        }
        Ok(whole(self.scan.parts, tensor)?.into_owned())
    }

    fn number(&self, name: &str) -> Result<usize> {
        let bytes = self.tensor(name)?;
        let value = match bytes.as_slice() {
            [byte] => Some(usize::from(*byte)),
            _ => bytes.first_chunk().and_then(|word| usize::try_from(i32::from_le_bytes(*word)).ok()),
        };
        value
            .ok_or_else(|| corrupt(&format!("{}.{name}", self.module)).found(format!("{bytes:?}")).expected("a number"))
    }

    fn text(&self, name: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.tensor(name)?).into_owned())
    }

    fn sizes(&self) -> Result<(usize, usize)> {
        let bytes = self.tensor("shape")?;
        let sizes: Vec<_> =
            bytes.as_chunks::<8>().0.iter().map(|w| usize::try_from(i64::from_le_bytes(*w)).ok()).collect();
        match sizes.as_slice() {
            [Some(rows), Some(columns)] if *rows > 0 && *columns > 0 => Ok((*rows, *columns)),
            _ => {
                Err(corrupt(&format!("{}.shape", self.module)).found(format!("{sizes:?}")).expected("rows and columns"))
            }
        }
    }
}

/// What HQQ's settings of a layer say, checked.
struct Layer {
    rows: usize,
    columns: usize,
    bits: u8,
    size: usize,
    axis: usize,
    to: ElementType,
    /// Bytes of an item, and codes in it.
    item: usize,
    slices: usize,
}

impl Layer {
    fn read(scan: &Scan<'_>, module: &str) -> Result<Self> {
        let meta = Meta { scan, module };
        let wrong = |found: String, expected: &str| {
            corrupt(&format!("{module}.W_q")).found(found).expected(expected.to_owned())
        };
        for flag in ["quant_scale", "quant_zero", "view_as_float"] {
            if meta.number(flag)? != 0 {
                return Err(Error::new(Code::QuantizationUnsupported, format!("tensor {module}.{flag}"))
                    .found("quantised scales or zeros, or codes stored as floats")
                    .expected("plain scales, zeros and codes")
                    .help("quantise again with HQQ's present defaults"));
            }
        }
        let (size, axis) = (meta.number("group_size")?, meta.number("axis")?);
        let (rows, columns) = meta.sizes()?;
        let to = match meta.text("compute_dtype")?.trim_start_matches("torch.") {
            "float16" => ElementType::F16,
            "bfloat16" => ElementType::BF16,
            "float32" => ElementType::F32,
            other => return Err(wrong(format!("compute_dtype {other}"), "float16, bfloat16 or float32")),
        };
        let (bits, item, slices) = match (meta.number("nbits")?, meta.text("packing")?.as_str()) {
            (8, "8bit_u8") => (8u8, 1, 1),
            (4, "4bit_u8") => (4, 1, 2),
            (3, "3bit_32") => (3, 4, 10),
            (2, "2bit_u8") => (2, 1, 4),
            (1, "1bit_u8") => (1, 1, 8),
            (bits, packing) => {
                return Err(wrong(format!("{bits} bits packed as {packing}"), "1, 2, 3, 4 or 8 bits in HQQ's packing"));
            }
        };
        let divides = rows.checked_mul(columns).is_some_and(|count| size > 0 && count.is_multiple_of(size));
        if !divides || axis > 1 {
            let expected = "a size that divides the matrix, along axis 0 or 1";
            return Err(wrong(format!("groups of {size} along axis {axis} of {rows} x {columns}"), expected));
        }
        Ok(Self { rows, columns, bits, size, axis, to, item, slices })
    }
}

fn hqq(scan: &mut Scan<'_>, module: &str) -> Result<()> {
    let Layer { rows, columns, bits, size, axis, to, item, slices } = Layer::read(scan, module)?;
    let groups = rows.saturating_mul(columns) / size.max(1);
    let (height, width) = if axis == 1 { (groups, size) } else { (size, groups) };
    let step = height.div_ceil(slices);
    let codes = scan.need(&format!("{module}.W_q"), &[if item == 4 { StoredType::I32 } else { StoredType::U8 }])?;
    shaped(&codes, &[step, width])?;
    let shape = if axis == 1 { [groups, 1] } else { [1, groups] };
    let mut side = |name: &str| {
        let tensor = scan.need(&format!("{module}.{name}"), FLOATS)?;
        shaped(&tensor, &shape)?;
        // Each operand is rounded to the type that is computed in; another type would be rounded twice.
        if float(tensor.dtype) != Some(to) {
            return Err(corrupt(&tensor.name)
                .found(tensor.dtype)
                .expected(format!("{to}, which the layer computes in")));
        }
        Ok(tensor)
    };
    let (scales, zeros) = (side("scale")?, side("zero")?);
    let mut encoding = plain(format!("hqq, {bits} bits, groups of {size} along axis {axis}"), Values::Unsigned, to);
    encoding.layout = Layout::Slices { bits, item, step, width, slices, high_first: true };
    encoding.index = if axis == 1 { Index::Flat { block: size } } else { Index::Cyclic { count: groups } };
    encoding.zeros = Zeros::Stored;
    scan.made.push(Logical {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        dtype: to,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales)), (Role::Zeros, Some(zeros))]),
    });
    Ok(())
}

/// The shape of a weight in the unquantised checkpoint, asked for by the weight's name.
pub type Shapes<'a> = dyn Fn(&str) -> Option<Vec<usize>> + 'a;

/// optimum-quanto; packed weights do not say their shape, so `shapes` has to.
pub(super) fn recognise_quanto(scan: &mut Scan<'_>, settings: &Settings<'_>, shapes: &Shapes<'_>) -> Result<Keys> {
    let sidecar = settings.source == "quanto_qmap.json";
    let mut keys = Keys { source: settings.source.clone(), ..Keys::default() };
    if sidecar {
        keys.used = settings.map.keys().cloned().collect();
    } else {
        keys = settings.account(&["weights", "modules_to_not_convert"], &[])?;
    }
    scan.ignore_all(&[".input_scale", ".output_scale"], ACTIVATION);
    for module in scan.modules(".weight._scale") {
        let own = settings.map.get(&module).and_then(|module| module.get("weights")).and_then(Value::as_str);
        let kind = if sidecar { own } else { settings.text("weights") };
        quanto(scan, &module, kind, shapes)?;
    }
    Ok(keys)
}

fn quanto(scan: &mut Scan<'_>, module: &str, kind: Option<&str>, shapes: &Shapes<'_>) -> Result<()> {
    let name = format!("{module}.weight");
    let scales = scan.need(&format!("{name}._scale"), FLOATS)?;
    let to = float(scales.dtype).unwrap_or(ElementType::F32);
    let bits = match kind.map(|kind| kind.trim_start_matches('q')) {
        Some("int8" | "float8" | "float8_e4m3fn" | "float8_e5m2") => return bytes(scan, &name, scales, to),
        Some("int4") => 4u8,
        Some("int2") => 2,
        other => {
            return Err(Error::new(Code::QuantizationUnsupported, format!("tensor {name}._scale"))
                .found(other.unwrap_or("a module that quanto_qmap.json does not name"))
                .expected("qint8, qint4, qint2, qfloat8_e4m3fn or qfloat8_e5m2"));
        }
    };
    let codes = scan.need(&format!("{name}._data._data"), &[StoredType::U8])?;
    let zeros = scan.need(&format!("{name}._shift"), &[FLOATS, &[StoredType::I8]].concat())?;
    let shape = shapes(&name).ok_or_else(|| {
        Error::new(Code::TensorShape, format!("tensor {name}._data._data"))
            .found("a packed weight, which does not say its shape")
            .expected("the shape that the architecture gives it")
            .help("the architecture has no parameter of this name")
    })?;
    let (items, width) = matrix(&codes)?;
    let count = shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size)).unwrap_or(0);
    let slices = usize::from(8 / bits);
    let height = count / width;
    if shape.len() != 2 || count == 0 || !count.is_multiple_of(width) || height.div_ceil(slices) != items {
        return Err(shaped(&codes, &[height.div_ceil(slices), width]).err().unwrap_or_else(|| corrupt(&codes.name)));
    }
    for tensor in [&scales, &zeros] {
        shaped(tensor, &[height, 1])?;
    }
    let shifted = zeros.dtype != StoredType::I8;
    if shifted && float(zeros.dtype) != Some(to) {
        return Err(corrupt(&zeros.name).found(zeros.dtype).expected(format!("{to}, as the scales")));
    }
    let mut encoding = plain(format!("quanto, {bits} bits, groups of {width}"), Values::Unsigned, to);
    encoding.layout = Layout::Slices { bits, item: 1, step: items, width, slices, high_first: false };
    encoding.index = Index::Flat { block: width };
    encoding.zeros = Zeros::Stored;
    if shifted {
        encoding.product = Product::Shifted(to);
    }
    scan.made.push(Logical {
        name,
        shape,
        dtype: to,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales)), (Role::Zeros, Some(zeros))]),
    });
    Ok(())
}

fn bytes(scan: &mut Scan<'_>, name: &str, scales: Stored, to: ElementType) -> Result<()> {
    let codes = scan.need(&format!("{name}._data"), &[StoredType::I8, StoredType::F8E4M3, StoredType::F8E5M2])?;
    let (rows, columns) = matrix(&codes)?;
    let (values, said) = match codes.dtype {
        StoredType::I8 => (Values::Signed(8), "quanto qint8"),
        StoredType::F8E5M2 => (Values::E5M2, "quanto qfloat8_e5m2"),
        _ => (Values::E4M3, "quanto qfloat8_e4m3fn"),
    };
    let mut encoding = plain(said.to_owned(), values, to);
    encoding.index = grid(&scales, &[rows, columns], (1, columns))?;
    scan.made.push(Logical {
        name: name.to_owned(),
        shape: vec![rows, columns],
        dtype: to,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales))]),
    });
    Ok(())
}
