//! The catalogue: every weight of a quantised checkpoint under the name and shape that it has without quantisation.

use std::collections::BTreeMap;

use serde_json::Value;

use super::form::Logical;
use super::parts::{Parts, Stored, corrupt};
use super::scan::{Ignored, Scan};
use super::settings::{Configs, Keys, Settings};
use super::slices::Shapes;
use super::{bnb, compressed, fp8, gptq, modelopt, slices};
use crate::element::{ElementType, StoredType};
use crate::error::{Code, Error, Result};

/// What a quantised checkpoint holds.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    /// The method, as configurations name it.
    pub method: String,
    /// The quantised weights, sorted by name.
    pub weights: Vec<Logical>,
    /// Stored tensors that are as they would be without quantisation, sorted by name.
    pub plain: Vec<String>,
    /// Stored tensors that change no weight, and why.
    pub ignored: Vec<Ignored>,
    /// What became of the configuration's keys.
    pub keys: Keys,
    /// Where checkpoint and configuration disagree, and which was believed.
    pub notes: Vec<String>,
}

impl Catalogue {
    /// The quantised weight of this name.
    pub fn get(&self, name: &str) -> Option<&Logical> {
        let at = self.weights.binary_search_by(|weight| weight.name.as_str().cmp(name)).ok()?;
        self.weights.get(at)
    }

    /// Finds out how a checkpoint is quantised and what its weights are; None for one that is not quantised.
    ///
    /// Reads little of the weights: the settings that some formats keep as tensors, and what decides between readings.
    /// `shapes` says which shape the architecture gives a weight; only optimum-quanto's packed weights need it.
    pub fn build(
        configs: &Configs<'_>,
        tensors: &[Stored],
        parts: &dyn Parts,
        shapes: &Shapes<'_>,
    ) -> Result<Option<Self>> {
        let Some(settings) = Settings::find(configs)? else { return Ok(None) };
        let mut scan = Scan {
            parts,
            dtype: dtype(configs),
            left: tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect(),
            made: Vec::new(),
            ignored: Vec::new(),
            notes: Vec::new(),
        };
        let keys = recognise(&mut scan, &settings, configs, shapes)?;
        let Scan { left, made: mut weights, mut ignored, notes, .. } = scan;
        if weights.is_empty() {
            return Err(Error::new(Code::TensorMissing, &settings.source)
                .found(format!("{} without a single quantised weight", settings.method))
                .expected("the tensors of that format")
                .help(
                    "the configuration is of another checkpoint, or the weights are stored in a way that is not known",
                ));
        }
        left.values().try_for_each(|tensor| settled(tensor))?;
        weights.sort_by(|a, b| a.name.cmp(&b.name));
        ignored.sort_by(|a, b| a.name.cmp(&b.name));
        distinct(&weights, &left)?;
        let plain = left.into_keys().map(str::to_owned).collect();
        Ok(Some(Self { method: settings.method, weights, plain, ignored, keys, notes }))
    }
}

fn recognise(scan: &mut Scan<'_>, settings: &Settings<'_>, configs: &Configs<'_>, shapes: &Shapes<'_>) -> Result<Keys> {
    let method = settings.method.as_str();
    match method {
        "gptq" | "gptqmodel" => gptq::recognise(scan, settings),
        "awq" => gptq::recognise_awq(scan, settings),
        "auto-round" | "auto_round" | "intel/auto-round" | "autoround" => match settings.text("packing_format") {
            Some(packing) if packing.ends_with("auto_gptq") => gptq::recognise(scan, settings),
            Some(packing) if packing.ends_with("auto_awq") => gptq::recognise_awq(scan, settings),
            _ => Err(settings.bad("packing_format", "auto_round:auto_gptq or auto_round:auto_awq")),
        },
        "compressed-tensors" | "compressed_tensors" => compressed::recognise(scan, settings),
        "fp8" | "mxfp8" => fp8::recognise(scan, settings),
        "fbgemm_fp8" => fp8::recognise_fbgemm(scan, settings),
        "mxfp4" => fp8::recognise_mxfp4(scan, settings),
        "modelopt" | "modelopt_fp4" | "modelopt_mixed" => modelopt::recognise(scan, settings, configs),
        "bitsandbytes" => bnb::recognise(scan, settings),
        "hqq" => slices::recognise_hqq(scan, settings),
        "quanto" => slices::recognise_quanto(scan, settings, shapes),
        _ => Err(refusal(settings)),
    }
}

/// Formats that are known, but not read.
const REFUSED: [(&str, &str); 16] = [
    ("aqlm", "additive codebooks (AQLM)"),
    ("vptq", "vector codebooks (VPTQ)"),
    ("quip", "lattice codebooks (QuIP#)"),
    ("spqr", "sparse outliers beside two levels of scales (SpQR)"),
    ("higgs", "rotated codebooks (HIGGS)"),
    ("eetq", "integers in the layout of a GPU's kernel (EETQ)"),
    ("bitnet", "ternary weights whose activations are quantised too (BitNet)"),
    ("torchao", "tensor subclasses, tiled for a device (torchao)"),
    ("sinq", "two-sided scales (SINQ)"),
    ("fp_quant", "rotated 4-bit floats (FP-Quant)"),
    ("fouroversix", "adaptively scaled NVFP4 (Four Over Six)"),
    ("quark", "AMD Quark's export"),
    ("nvfp4", "weights quantised while loading, which no file holds (nvfp4)"),
    ("metal", "the layout of Apple's kernels (metal)"),
    ("gguf", "a GGUF file"),
    ("marlin", "the layout of a GPU's kernel (marlin)"),
];

fn refusal(settings: &Settings<'_>) -> Error {
    let known = REFUSED.iter().find(|(name, _)| settings.method.starts_with(name)).map(|(_, what)| *what);
    Error::new(Code::QuantizationUnsupported, format!("{}.quant_method", settings.source))
        .found(known.map_or_else(|| settings.method.clone(), |what| format!("{}: {what}", settings.method)))
        .expected(
            "gptq, awq, auto-round, compressed-tensors, fp8, mxfp8, fbgemm_fp8, modelopt, mxfp4, bitsandbytes, hqq or quanto",
        )
        .help("use the checkpoint from which this one was quantised, or dequantise it with its own library first")
}

/// The type that the model computes in by its configuration: torch's default where it says nothing.
fn dtype(configs: &Configs<'_>) -> ElementType {
    let nested = configs.config.get("text_config").and_then(Value::as_object);
    let said = [Some(configs.config), nested]
        .into_iter()
        .flatten()
        .find_map(|config| ["dtype", "torch_dtype"].iter().find_map(|key| config.get(*key).and_then(Value::as_str)));
    match said.map(|said| said.trim_start_matches("torch.")) {
        Some("bfloat16") => ElementType::BF16,
        Some("float16") => ElementType::F16,
        _ => ElementType::F32,
    }
}

/// What is left over is float, or small integers of some buffer: anything else is a part of a weight that was not found.
fn settled(tensor: &Stored) -> Result<()> {
    use StoredType as T;
    let small_float = matches!(tensor.dtype, T::F4 | T::F6E2M3 | T::F6E3M2 | T::F8E4M3 | T::F8E5M2 | T::F8E8M0)
        || matches!(tensor.dtype, T::F8E4M3Fnuz | T::F8E5M2Fnuz);
    let codes = matches!(tensor.dtype, T::U8 | T::I8 | T::I32) && tensor.shape.len() > 1;
    let part = PARTS.iter().find(|ending| tensor.name.ends_with(**ending));
    if !small_float && !codes && part.is_none() {
        return Ok(());
    }
    Err(Error::new(Code::TensorUnexpected, format!("tensor {}", tensor.name))
        .found(format!(
            "{} {:?}, a part of a quantised weight whose other parts are not there",
            tensor.dtype, tensor.shape
        ))
        .expected("all parts of each quantised weight, under the names of the format")
        .help("the download is not complete, or the checkpoint mixes formats"))
}

/// Endings that only parts of quantised weights have.
const PARTS: [&str; 20] = [
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_global_scale",
    ".weight_scale_2",
    ".pre_quant_scale",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".W_q",
    "._data",
    "._scale",
    "._shift",
    "_blocks",
];

/// No name twice.
fn distinct(weights: &[Logical], left: &BTreeMap<&str, &Stored>) -> Result<()> {
    for weight in weights {
        if left.contains_key(weight.name.as_str()) {
            return Err(corrupt(&weight.name)
                .found("the weight twice: quantised and as it was")
                .expected("each weight once"));
        }
    }
    for pair in weights.windows(2) {
        if let [first, second] = pair
            && first.name == second.name
        {
            return Err(corrupt(&first.name).found("the weight twice, in two formats").expected("each weight once"));
        }
    }
    Ok(())
}
