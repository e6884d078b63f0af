//! compressed-tensors, which llm-compressor writes: a scheme and a format for each group of modules.

use fancy_regex::Regex;
use serde_json::{Map, Value};

use super::decode::float;
use super::form::{Layout, Logical, Product, Scales, Values, Zeros};
use super::parts::{Role, Stored, corrupt, whole};
use super::scan::{ACTIVATION, CACHE, FLOATS, Scan, WORDS, grid, group, matrix, parts, plain, shaped};
use super::settings::{Keys, Settings, bad, matches, pattern, size, texts};
use crate::element::{ElementType, StoredType};
use crate::error::{Code, Error, Result};

const USED: [&str; 4] = ["config_groups", "format", "ignore", "quantization_status"];
const ABOUT: [&str; 3] = ["global_compression_ratio", "version", "compression_version"];
const E4M3: &[StoredType] = &[StoredType::F8E4M3];

/// A `config_groups` entry.
struct Group<'a> {
    targets: Vec<Target<'a>>,
    weights: Weights,
    format: &'a str,
}

enum Target<'a> {
    Pattern(Regex),
    /// A module's name, or its class.
    Name(&'a str),
}

/// How the weights of a group are quantised.
#[derive(Debug, Clone)]
struct Weights {
    bits: u8,
    float: bool,
    symmetric: bool,
    group: Option<i64>,
    /// Rows and columns of a block, for the block strategy.
    block: (usize, usize),
    grouped: bool,
}

pub(super) fn recognise(scan: &mut Scan<'_>, settings: &Settings<'_>) -> Result<Keys> {
    let mut keys = settings.account(&USED, &ABOUT)?;
    if quantises_inputs(settings) {
        let reason = "weights only: activations stay float";
        keys.without_effect.insert("config_groups.*.input_activations".to_owned(), reason.to_owned());
    }
    let status = settings.text("quantization_status").unwrap_or("compressed");
    if !["compressed", "frozen"].contains(&status) {
        return Err(settings.bad("quantization_status", "compressed"));
    }
    let groups = read_groups(settings)?;
    let ignore = targets(&settings.source, &settings.list("ignore"))?;
    scan.ignore_all(
        &[".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point"],
        ACTIVATION,
    );
    scan.ignore_all(&[".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point"], CACHE);
    for (ending, packed) in [(".weight_packed", true), (".weight", false)] {
        for module in scan.modules(ending) {
            if packed || scan.peek(&format!("{module}.weight_scale")).is_some() {
                if let Some(target) = first(&ignore, &settings.source, &module)? {
                    return Err(contradiction(&module, ending, &format!("ignore names it with {target}")));
                }
                let group = choose(&groups, &settings.source, &module)?
                    .ok_or_else(|| contradiction(&module, ending, "no config_groups entry targets it"))?;
                one(scan, settings, &module, group)?;
            }
        }
    }
    Ok(keys)
}

fn quantises_inputs(settings: &Settings<'_>) -> bool {
    let groups = settings.map.get("config_groups").and_then(Value::as_object);
    groups.into_iter().flatten().any(|(_, group)| group.get("input_activations").is_some_and(Value::is_object))
}

fn contradiction(module: &str, ending: &str, reason: &str) -> Error {
    corrupt(&format!("{module}{ending}")).found("a quantised weight").expected(format!("a float weight: {reason}"))
}

fn read_groups<'a>(settings: &'a Settings<'_>) -> Result<Vec<Group<'a>>> {
    let overall = settings.text("format");
    let groups = settings.map.get("config_groups").and_then(Value::as_object);
    let groups = groups.ok_or_else(|| settings.bad("config_groups", "an object of schemes"))?;
    let mut read = Vec::new();
    for (name, group) in groups {
        let wrong = || settings.bad("config_groups", &format!("an object with targets and weights for {name}"));
        let group = group.as_object().ok_or_else(wrong)?;
        for key in group.keys() {
            if !["targets", "weights", "input_activations", "output_activations", "format"].contains(&key.as_str()) {
                return Err(settings.bad("config_groups", &format!("no {key} in {name}")));
            }
        }
        let Some(weights) = group.get("weights").and_then(Value::as_object) else { continue };
        let format = group.get("format").and_then(Value::as_str).or(overall).unwrap_or("dense");
        read.push(Group {
            targets: targets(&settings.source, &texts(group.get("targets")))?,
            weights: read_weights(settings, weights)?,
            format,
        });
    }
    Ok(read)
}

/// Keys of a scheme that do not say how its weights are stored.
const SCHEME_ABOUT: [&str; 7] =
    ["observer", "observer_kwargs", "dynamic", "actorder", "scale_dtype", "zp_dtype", "block_structure"];

fn read_weights(settings: &Settings<'_>, map: &Map<String, Value>) -> Result<Weights> {
    let wrong = |key: &str, expected: &str| {
        bad(&settings.source, &format!("config_groups.*.weights.{key}"), map.get(key), expected)
    };
    for key in map.keys() {
        let known = ["num_bits", "type", "symmetric", "strategy", "group_size"].contains(&key.as_str());
        if !known && !SCHEME_ABOUT.contains(&key.as_str()) {
            return Err(wrong(key, "a key that is known of compressed-tensors"));
        }
    }
    let bits = size(map.get("num_bits").or(Some(&Value::from(8)))).and_then(|bits| u8::try_from(bits).ok());
    let bits = bits.filter(|bits| (1..=8).contains(bits)).ok_or_else(|| wrong("num_bits", "1 to 8"))?;
    let strategy = map.get("strategy").and_then(Value::as_str);
    if let Some(other) = strategy.filter(|s| !["tensor", "channel", "group", "block", "tensor_group"].contains(s)) {
        return Err(wrong("strategy", &format!("tensor, channel, group, tensor_group or block, not {other}")));
    }
    let sides: Vec<usize> = map.get("block_structure").and_then(Value::as_array).map_or_else(Vec::new, |sides| {
        sides.iter().filter_map(Value::as_u64).filter_map(|side| usize::try_from(side).ok()).collect()
    });
    let block = match (strategy, sides.as_slice()) {
        (Some("block"), [rows, columns]) if *rows > 0 && *columns > 0 => (*rows, *columns),
        (Some("block"), _) => return Err(wrong("block_structure", "two sizes of at least 1")),
        _ => (0, 0),
    };
    Ok(Weights {
        bits,
        float: map.get("type").and_then(Value::as_str) == Some("float"),
        symmetric: map.get("symmetric").and_then(Value::as_bool).unwrap_or(true),
        group: size(map.get("group_size")),
        block,
        grouped: matches!(strategy, Some("group" | "tensor_group"))
            || strategy.is_none() && map.contains_key("group_size"),
    })
}

fn targets<'a>(source: &str, names: &[&'a str]) -> Result<Vec<Target<'a>>> {
    let target = |name: &&'a str| match name.strip_prefix("re:") {
        Some(text) => pattern(source, text).map(Target::Pattern),
        None => Ok(Target::Name(name)),
    };
    names.iter().map(target).collect()
}

/// The target that names this module or matches it; a class has to be [`class`]'s.
fn first(targets: &[Target<'_>], source: &str, module: &str) -> Result<Option<String>> {
    for target in targets {
        match target {
            Target::Pattern(pattern) if matches(source, pattern, module)? => {
                return Ok(Some(pattern.as_str().to_owned()));
            }
            Target::Name(name) if *name == module => return Ok(Some((*name).to_owned())),
            _ => {}
        }
    }
    Ok(None)
}

/// Names and patterns come before classes, as in the library.
fn choose<'g, 'a>(groups: &'g [Group<'a>], source: &str, module: &str) -> Result<Option<&'g Group<'a>>> {
    for group in groups {
        if first(&group.targets, source, module)?.is_some() {
            return Ok(Some(group));
        }
    }
    let class = if module.ends_with("embed_tokens") || module.ends_with("wte") { "Embedding" } else { "Linear" };
    let names =
        |group: &&Group<'_>| group.targets.iter().any(|target| matches!(target, Target::Name(name) if *name == class));
    Ok(groups.iter().find(names))
}

fn one(scan: &mut Scan<'_>, settings: &Settings<'_>, module: &str, group: &Group<'_>) -> Result<()> {
    let weights = &group.weights;
    let made = match group.format {
        "pack-quantized" => packed(scan, settings, module, weights)?,
        "int-quantized" | "float-quantized" | "naive-quantized" | "mxfp8-quantized" => {
            bytes(scan, settings, module, group.format, weights)?
        }
        "nvfp4-pack-quantized" | "mxfp4-pack-quantized" => four_bit_floats(scan, module, group.format, weights)?,
        other => {
            return Err(bad(
                &settings.source,
                "format",
                Some(&other.into()),
                "a format that is not sparse and not of 6 bits",
            ));
        }
    };
    scan.made.push(made);
    Ok(())
}

fn columns_of(settings: &Settings<'_>, weights: &Weights, columns: usize) -> Result<usize> {
    if !weights.grouped {
        return Ok(columns);
    }
    let wrong = || settings.bad("config_groups", "a group_size that divides the columns");
    group(weights.group, columns).filter(|size| columns.is_multiple_of(*size)).ok_or_else(wrong)
}

fn packed(scan: &mut Scan<'_>, settings: &Settings<'_>, module: &str, weights: &Weights) -> Result<Logical> {
    if weights.float {
        return Err(settings.bad("config_groups", "integers in pack-quantized"));
    }
    let codes = scan.need(&format!("{module}.weight_packed"), WORDS)?;
    let shape = scan.need(&format!("{module}.weight_shape"), &[StoredType::I64, StoredType::I32])?;
    let (rows, columns) = stored_shape(scan, &shape)?;
    let bits = usize::from(weights.bits);
    let words = columns.checked_mul(bits).map_or(usize::MAX, |bits| bits.div_ceil(32));
    shaped(&codes, &[rows, words])?;
    matrix(&codes)?;
    let scales = scan.need(&format!("{module}.weight_scale"), FLOATS)?;
    let width = columns_of(settings, weights, columns)?;
    let index = grid(&scales, &[rows, columns], (1, width))?;
    let zeros = scan.may(&format!("{module}.weight_zero_point"), WORDS)?;
    let zeros = if weights.symmetric { None } else { Some(zeros.ok_or_else(|| missing(module, "weight_zero_point"))?) };
    if let Some(zeros) = &zeros {
        let groups = columns.div_ceil(width);
        shaped(zeros, &[rows.checked_mul(bits).map_or(usize::MAX, |bits| bits.div_ceil(32)), groups])?;
    }
    let order = scan.may(&format!("{module}.weight_g_idx"), WORDS)?;
    if order.is_some() {
        return Err(Error::new(Code::QuantizationUnsupported, format!("tensor {module}.weight_g_idx"))
            .found("the order of activations in compressed-tensors, which its library no longer reads")
            .expected("weights in the order of their columns")
            .help("quantise again with actorder=weight, or use the checkpoint from which this one was quantised"));
    }
    let to = float(scales.dtype).unwrap_or(ElementType::F32);
    let bits = weights.bits;
    let mut encoding = plain(format!("compressed-tensors pack-quantized, {bits} bits"), Values::Offset(bits), to);
    encoding.layout = Layout::Rows { bits, stride: words.saturating_mul(4) };
    encoding.index = index;
    encoding.zeros = if zeros.is_some() { Zeros::Rows { bits } } else { Zeros::None };
    Ok(Logical {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        dtype: to,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales)), (Role::Zeros, zeros)]),
    })
}

fn missing(module: &str, part: &str) -> Error {
    Error::new(Code::TensorMissing, format!("tensor {module}.{part}"))
        .found("nothing")
        .expected("zero points: the scheme says symmetric=false")
        .help("the download is not complete, or the configuration is of another checkpoint")
}

/// The sizes that a tensor of two integers holds.
fn stored_shape(scan: &Scan<'_>, tensor: &Stored) -> Result<(usize, usize)> {
    shaped(tensor, &[2])?;
    let bytes = whole(scan.parts, tensor)?;
    let sizes: Vec<Option<usize>> = if tensor.dtype == StoredType::I64 {
        bytes.as_chunks::<8>().0.iter().map(|word| usize::try_from(i64::from_le_bytes(*word)).ok()).collect()
    } else {
        bytes.as_chunks::<4>().0.iter().map(|word| usize::try_from(i32::from_le_bytes(*word)).ok()).collect()
    };
    match sizes.as_slice() {
        [Some(rows), Some(columns)] => Ok((*rows, *columns)),
        _ => Err(corrupt(&tensor.name).found("sizes that are none").expected("rows and columns")),
    }
}

fn bytes(
    scan: &mut Scan<'_>,
    settings: &Settings<'_>,
    module: &str,
    format: &str,
    weights: &Weights,
) -> Result<Logical> {
    if weights.bits != 8 && (weights.float || format != "naive-quantized") {
        return Err(settings.bad("config_groups", &format!("8 bits in {format}")));
    }
    let types = if weights.float { E4M3 } else { &[StoredType::I8] };
    let codes = scan.need(&format!("{module}.weight"), types)?;
    let (rows, columns) = matrix(&codes)?;
    let exponents = format == "mxfp8-quantized";
    let scales = scan.need(&format!("{module}.weight_scale"), if exponents { &[StoredType::U8] } else { FLOATS })?;
    let block = if weights.block.0 > 0 { weights.block } else { (1, columns_of(settings, weights, columns)?) };
    let index = grid(&scales, &[rows, columns], block)?;
    let zeros = scan.may(&format!("{module}.weight_zero_point"), &[StoredType::I8])?;
    let zeros = if weights.symmetric { None } else { Some(zeros.ok_or_else(|| missing(module, "weight_zero_point"))?) };
    if let Some(zeros) = &zeros {
        shaped(zeros, &scales.shape)?;
    }
    // Exponents become bfloat16 in the library.
    let to = if exponents { ElementType::BF16 } else { float(scales.dtype).unwrap_or(ElementType::F32) };
    let values = if weights.float { Values::E4M3 } else { Values::Signed(8) };
    let mut encoding = plain(format!("compressed-tensors {format}"), values, to);
    encoding.index = index;
    encoding.zeros = if zeros.is_some() { Zeros::Stored } else { Zeros::None };
    Ok(Logical {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        dtype: to,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales)), (Role::Zeros, zeros)]),
    })
}

fn four_bit_floats(scan: &mut Scan<'_>, module: &str, format: &str, weights: &Weights) -> Result<Logical> {
    let nvidia = format == "nvfp4-pack-quantized";
    let width = if nvidia { 16 } else { 32 };
    if weights.bits != 4 || !weights.float || !weights.symmetric || weights.group != Some(width) {
        return Err(corrupt(&format!("{module}.weight_packed"))
            .found(format!("{weights:?}"))
            .expected(format!("symmetric floats of 4 bits in groups of {width}, as {format} has")));
    }
    let codes = scan.need(&format!("{module}.weight_packed"), &[StoredType::U8])?;
    let (rows, stride) = matrix(&codes)?;
    let columns = stride.saturating_mul(2);
    let scales = scan.need(&format!("{module}.weight_scale"), if nvidia { E4M3 } else { &[StoredType::U8] })?;
    let width = if nvidia { 16 } else { 32 };
    shaped(&scales, &[rows, columns.div_ceil(width)])?;
    let index = grid(&scales, &[rows, columns], (1, width))?;
    let global =
        if nvidia { Some(scan.need(&format!("{module}.weight_global_scale"), &[StoredType::F32])?) } else { None };
    if let Some(global) = global.as_ref().filter(|global| global.count() != 1) {
        shaped(global, &[1])?;
    }
    let mut encoding = plain(format!("compressed-tensors {format}"), Values::E2M1, ElementType::BF16);
    encoding.layout = Layout::Rows { bits: 4, stride };
    encoding.index = index;
    if nvidia {
        (encoding.scales, encoding.product) = (Scales::OverGlobal, Product::Once(ElementType::BF16));
    }
    Ok(Logical {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        dtype: ElementType::BF16,
        encoding,
        parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales)), (Role::Global, global)]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_before_classes() {
        let group = |target| Group {
            targets: vec![Target::Name(target)],
            weights: Weights { bits: 4, float: false, symmetric: true, group: None, block: (0, 0), grouped: false },
            format: target,
        };
        let groups = [group("Linear"), group("lm_head"), group("Embedding")];
        let chosen = |module| choose(&groups, "", module).unwrap().map(|group| group.format);
        assert_eq!(chosen("lm_head"), Some("lm_head"));
        assert_eq!(chosen("model.layers.0.mlp.up_proj"), Some("Linear"));
        assert_eq!(chosen("model.embed_tokens"), Some("Embedding"));
    }
}
