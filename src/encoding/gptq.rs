//! GPTQ, AWQ and auto-round, which packs as one of the two.

use fancy_regex::Regex;
use serde_json::{Map, Value};

use super::form::{Index, Layout, Logical, Values, Zeros};
use super::parts::{Role, Stored, corrupt, whole, window};
use super::scan::{FLOATS, Scan, WORDS, group, matrix, parts, plain, shaped};
use super::settings::{Excluded, Keys, Settings, bad, matches, pattern, size};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};

/// Keys that say how the weights are stored.
const USED: [&str; 15] = [
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "format",
    "dynamic",
    "pack_dtype",
    "zero_point",
    "version",
    "modules_to_not_convert",
    "packing_format",
    "lm_head",
    "extra_config",
    "data_type",
];
/// Keys of how the quantisation was found.
const ABOUT: [&str; 53] = [
    "damp_percent",
    "damp_auto_increment",
    "true_sequential",
    "static_groups",
    "mse",
    "quantizer",
    "act_group_aware",
    "backend",
    "use_exllama",
    "disable_exllama",
    "max_input_length",
    "exllama_config",
    "cache_block_outputs",
    "modules_in_block_to_quantize",
    "block_name_to_quantize",
    "module_name_preceding_first_block",
    "batch_size",
    "pad_token_id",
    "autoround_version",
    "iters",
    "lr",
    "minmax_lr",
    "nsamples",
    "seqlen",
    "low_gpu_mem_usage",
    "to_quant_block_names",
    "enable_quanted_input",
    "enable_minmax_tuning",
    "enable_norm_bias_tuning",
    "amp",
    "scale_dtype",
    "gradient_accumulate_steps",
    "train_bsz",
    "quant_block_list",
    "fuse_max_seq_len",
    "do_fuse",
    "modules_to_fuse",
    "q_group_size",
    "w_bit",
    "act_bits",
    "act_group_size",
    "act_sym",
    "act_dynamic",
    "act_data_type",
    "use_cuda_fp16",
    "failsafe",
    "fallback",
    "offload_to_disk",
    "parallel_packing",
    "gptaq",
    "v2",
    "v2_alpha",
    "method",
];

/// The parameters of one module.
#[derive(Debug, Clone, Copy)]
struct Module {
    bits: i64,
    group: Option<i64>,
    sym: bool,
}

/// GPTQ, or auto-round packed like it.
pub(super) fn recognise(scan: &mut Scan<'_>, settings: &Settings<'_>) -> Result<Keys> {
    let keys = settings.account(&USED, &ABOUT)?;
    let format = settings.text("checkpoint_format").or_else(|| settings.text("format")).unwrap_or("gptq");
    let rounds = settings.method.contains("round");
    let version_one = match format {
        "gptq" => true,
        "gptq_v2" => false,
        _ if rounds => true,
        _ => return Err(settings.bad("checkpoint_format", "gptq or gptq_v2: other packings are of one kernel only")),
    };
    plain_integers(settings)?;
    if settings.text("pack_dtype").is_some_and(|dtype| dtype != "int32") {
        return Err(settings.bad("pack_dtype", "int32"));
    }
    let own = Module {
        bits: size(settings.map.get("bits")).ok_or_else(|| settings.bad("bits", "2, 3, 4 or 8"))?,
        group: size(settings.map.get("group_size")),
        sym: settings.map.get("sym").and_then(Value::as_bool).unwrap_or(true),
    };
    let rules = Rules::read(settings)?;
    let name = if rounds { "auto-round" } else { "gptq" };
    for module in scan.modules(".qweight") {
        let here = rules.apply(&module, own)?;
        one(scan, settings, &module, here, (name, version_one))?;
    }
    Ok(keys)
}

/// auto-round names the type; only integers are packed as they are here.
fn plain_integers(settings: &Settings<'_>) -> Result<()> {
    match settings.text("data_type") {
        None | Some("int") => Ok(()),
        Some(_) => Err(settings.bad("data_type", "int")),
    }
}

/// Overrides of single modules.
struct Rules<'a> {
    source: &'a str,
    /// gptqmodel's `dynamic`: a pattern, and what it sets; None excludes the module.
    dynamic: Vec<(Regex, Option<&'a Map<String, Value>>)>,
    /// auto-round's `extra_config`: by the module's name.
    extra: Option<&'a Map<String, Value>>,
}

impl<'a> Rules<'a> {
    fn read(settings: &'a Settings<'_>) -> Result<Self> {
        let mut dynamic = Vec::new();
        for (text, set) in settings.map.get("dynamic").and_then(Value::as_object).into_iter().flatten() {
            let (text, keep) = match (text.strip_prefix("-:"), text.strip_prefix("+:")) {
                (Some(text), _) => (text, false),
                (None, Some(text)) => (text, true),
                (None, None) => (text.as_str(), true),
            };
            let set = set.as_object().ok_or_else(|| settings.bad("dynamic", "an object for each pattern"))?;
            dynamic.push((pattern(&settings.source, text)?, keep.then_some(set)));
        }
        let extra = settings.map.get("extra_config").and_then(Value::as_object);
        Ok(Self { source: &settings.source, dynamic, extra })
    }

    /// The first pattern that matches decides, as in gptqmodel.
    fn apply(&self, module: &str, own: Module) -> Result<Module> {
        let mut set = self.extra.and_then(|extra| extra.get(module)).and_then(Value::as_object);
        for (pattern, found) in &self.dynamic {
            if matches(self.source, pattern, module)? {
                if found.is_none() {
                    return Err(corrupt(&format!("{module}.qweight"))
                        .found("a quantised weight")
                        .expected(format!("a float weight: {}.dynamic excludes it with {pattern}", self.source)));
                }
                set = *found;
                break;
            }
        }
        let Some(set) = set else { return Ok(own) };
        for (key, value) in set {
            if !["bits", "group_size", "sym", "desc_act", "data_type"].contains(&key.as_str())
                && !ABOUT.contains(&key.as_str())
            {
                return Err(bad(
                    self.source,
                    &format!("dynamic.{key}"),
                    Some(value),
                    "bits, group_size, sym or desc_act",
                ));
            }
        }
        Ok(Module {
            bits: size(set.get("bits")).unwrap_or(own.bits),
            group: set.get("group_size").map_or(own.group, |value| size(Some(value))),
            sym: set.get("sym").and_then(Value::as_bool).unwrap_or(own.sym),
        })
    }
}

fn one(scan: &mut Scan<'_>, settings: &Settings<'_>, module: &str, here: Module, kind: (&str, bool)) -> Result<()> {
    let (name, version_one) = kind;
    let bits = match here.bits {
        2 => 2u8,
        3 => 3,
        4 => 4,
        8 => 8,
        _ => return Err(bad(&settings.source, "bits", Some(&here.bits.into()), "2, 3, 4 or 8 bits")),
    };
    let codes = scan.need(&format!("{module}.qweight"), WORDS)?;
    let scales = scan.need(&format!("{module}.scales"), FLOATS)?;
    let zeros = scan.need(&format!("{module}.qzeros"), WORDS)?;
    let (words, rows) = matrix(&codes)?;
    let order = scan.may(&format!("{module}.g_idx"), WORDS)?;
    let columns = match order.as_ref().map(|order| order.shape.as_slice()) {
        Some([columns]) => *columns,
        _ => words.saturating_mul(32) / usize::from(bits),
    };
    let packed = columns.checked_mul(usize::from(bits)).map_or(usize::MAX, |bits| bits.div_ceil(32));
    shaped(&codes, &[packed, rows])?;
    let size = group(here.group, columns).ok_or_else(|| {
        bad(&settings.source, "group_size", here.group.map(Value::from).as_ref(), "-1 or more than 0")
    })?;
    let groups = columns.div_ceil(size);
    shaped(&scales, &[groups, rows])?;
    let width = rows.checked_mul(usize::from(bits)).map_or(usize::MAX, |bits| bits.div_ceil(32));
    shaped(&zeros, &[groups, width])?;
    let ordered = match &order {
        Some(order) => !trivial(scan, order, columns, size, groups)?,
        None if settings.flag("desc_act") => {
            return Err(
                Error::new(Code::TensorMissing, format!("tensor {module}.g_idx")).expected("the order of desc_act")
            );
        }
        None => false,
    };
    let less_one = if here.sym { stored_less_one(scan, &zeros, bits, version_one)? } else { version_one };
    if let Some(order) = order.as_ref().filter(|_| !ordered) {
        scan.ignored
            .push(super::scan::Ignored { name: order.name.clone(), reason: "it says the order of the columns itself" });
    }
    let to = super::decode::float(scales.dtype).unwrap_or(ElementType::F32);
    let mut encoding = plain(format!("{name}, {bits} bits, {}", groups_of(size, columns)), Values::Unsigned, to);
    encoding.layout = Layout::Columns { bits };
    encoding.index = if ordered { Index::Ordered } else { Index::Transposed { group: size } };
    encoding.zeros = Zeros::Columns { bits, less_one };
    scan.made.push(Logical {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        dtype: to,
        encoding,
        parts: parts([
            (Role::Codes, Some(codes)),
            (Role::Scales, Some(scales)),
            (Role::Zeros, Some(zeros)),
            (Role::Order, order.filter(|_| ordered)),
        ]),
    });
    Ok(())
}

fn groups_of(size: usize, columns: usize) -> String {
    if size >= columns { "one group a row".to_owned() } else { format!("groups of {size}") }
}

/// Whether the groups are those that the columns have by their order; an error when one is out of range.
fn trivial(scan: &Scan<'_>, order: &Stored, columns: usize, size: usize, groups: usize) -> Result<bool> {
    shaped(order, &[columns])?;
    let bytes = whole(scan.parts, order)?;
    let mut trivial = true;
    for (column, word) in bytes.as_chunks::<4>().0.iter().enumerate() {
        let group =
            usize::try_from(i32::from_le_bytes(*word)).ok().filter(|group| *group < groups).ok_or_else(|| {
                corrupt(&order.name)
                    .found(format!("group {} of column {column}", i32::from_le_bytes(*word)))
                    .expected(format!("groups below {groups}"))
            })?;
        trivial &= group == column / size;
    }
    Ok(trivial)
}

/// With symmetric quantisation the zero points are all 2^(bits - 1), so the data say which version it is, whatever the
/// configuration says.
fn stored_less_one(scan: &mut Scan<'_>, zeros: &Stored, bits: u8, says: bool) -> Result<bool> {
    let bytes = window(scan.parts, zeros, 0..zeros.bytes().min(4))?;
    let Some(word) = bytes.first_chunk().map(|word| u32::from_le_bytes(*word)) else { return Ok(says) };
    let first = word & super::codes::mask(u32::from(bits));
    let middle = 1u32 << (bits - 1);
    let found = if first == middle - 1 {
        true
    } else if first == middle {
        false
    } else {
        scan.notes.push(format!("{}: not the zero point of sym=true; read as the configuration says", zeros.name));
        says
    };
    if found != says {
        scan.notes.push(format!(
            "{}: stored as version {}, not as the configuration says",
            zeros.name,
            if found { 1 } else { 2 }
        ));
    }
    Ok(found)
}

/// AWQ, or auto-round packed like it.
pub(super) fn recognise_awq(scan: &mut Scan<'_>, settings: &Settings<'_>) -> Result<Keys> {
    let keys = settings.account(&USED, &ABOUT)?;
    plain_integers(settings)?;
    let version = settings.text("version").or_else(|| settings.text("format")).unwrap_or("gemm").to_lowercase();
    if version != "gemm" && !settings.method.contains("round") {
        return Err(settings.bad("version", "gemm: the other packings are of one kernel only"));
    }
    let bits = settings.map.get("bits").or_else(|| settings.map.get("w_bit"));
    if size(bits) != Some(4) {
        return Err(settings.bad("bits", "4"));
    }
    let given = size(settings.map.get("group_size").or_else(|| settings.map.get("q_group_size")));
    let left_out = Excluded::read(settings)?;
    for module in scan.modules(".qweight") {
        if left_out.names(&module)? {
            scan.notes.push(format!("{module}: quantised, though modules_to_not_convert names it"));
        }
        let codes = scan.need(&format!("{module}.qweight"), WORDS)?;
        let (columns, words) = matrix(&codes)?;
        let rows = words.saturating_mul(8);
        let size = group(given, columns).ok_or_else(|| settings.bad("group_size", "-1 or more than 0"))?;
        let groups = columns.div_ceil(size);
        let scales = scan.need(&format!("{module}.scales"), FLOATS)?;
        shaped(&scales, &[groups, rows])?;
        let zeros = scan.need(&format!("{module}.qzeros"), WORDS)?;
        shaped(&zeros, &[groups, words])?;
        let to = super::decode::float(scales.dtype).unwrap_or(ElementType::F32);
        let mut encoding = plain(format!("awq, 4 bits, {}", groups_of(size, columns)), Values::Unsigned, to);
        encoding.layout = Layout::Awq;
        encoding.index = Index::Transposed { group: size };
        encoding.zeros = Zeros::Awq;
        scan.made.push(Logical {
            name: format!("{module}.weight"),
            shape: vec![rows, columns],
            dtype: to,
            encoding,
            parts: parts([(Role::Codes, Some(codes)), (Role::Scales, Some(scales)), (Role::Zeros, Some(zeros))]),
        });
    }
    Ok(keys)
}
