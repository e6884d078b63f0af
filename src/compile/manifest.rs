//! `hf2onnx.json`: the record of a build.

use serde::Serialize;
use serde_json::Value;

use super::{Compiled, KvCache, Options, Weights};
use crate::build::Logits;
use crate::describe::Accounting;
use crate::error::Result;
use crate::hub;
use crate::lower::{Note, Padding};
use crate::opset::Positions;
use crate::read::{FileHash, hash_files};
use crate::recipe::{Calibrated, Quantization};
use crate::spec::ModelSpec;
use crate::write::{Streamed, Zeros};

/// `hf2onnx.json`: what was built, from what, and how far it was verified.
#[derive(Debug, Serialize)]
pub(super) struct Manifest {
    hf2onnx: &'static str,
    target: String,
    dtype: String,
    padding: &'static str,
    positions: &'static str,
    logits: &'static str,
    weights: &'static str,
    quantization: Option<Quantization>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache: Option<CacheRecord>,
    onnx: String,
    pub(super) verification: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hub: Option<hub::Source>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ignored_adapter: Option<FileHash>,
    sources: Vec<FileHash>,
    outputs: Vec<FileHash>,
    spec: ModelSpec,
    config_keys: Accounting,
    parameters: Vec<ParameterEntry>,
    dropped_tensors: std::collections::BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) notes: Vec<String>,
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    rounded_to_zero: std::collections::BTreeMap<String, Zeros>,
    lowering: Vec<Note>,
}

/// A cache that is not float.
#[derive(Debug, Serialize)]
struct CacheRecord {
    r#type: &'static str,
    scales: &'static str,
    calibration: Calibrated,
}

/// What a parameter was made from.
#[derive(Debug, Serialize)]
struct ParameterEntry {
    name: String,
    shape: Vec<usize>,
    from: String,
}

impl Manifest {
    pub(super) fn new(compiled: &Compiled, options: &Options, streamed: Streamed, graph: FileHash) -> Result<Self> {
        let Streamed { rounded_to_zero, notes, .. } = &streamed;
        let (rounded_to_zero, notes) = (rounded_to_zero.clone(), compiled.notes.iter().chain(notes).cloned().collect());
        let mut sources = hash_files(&compiled.repository.configurations())?;
        let mut outputs = vec![graph];
        outputs.extend(streamed.outputs);
        // What is linked is both.
        outputs.extend(compiled.layout.linked.iter().filter_map(|index| streamed.sources.get(*index)).cloned());
        sources.extend(streamed.sources);
        let parameters = compiled.plan.parameters.iter().map(|parameter| ParameterEntry {
            name: parameter.name.clone(),
            shape: parameter.shape.clone(),
            from: parameter.weight.to_string(),
        });
        Ok(Self {
            hf2onnx: env!("CARGO_PKG_VERSION"),
            target: options.target.name.clone(),
            dtype: options.element.to_string(),
            padding: match options.padding {
                Padding::Any => "any",
                Padding::Right => "right",
            },
            positions: match options.positions {
                Positions::Ids => "position_ids",
                Positions::Mask => "attention_mask",
            },
            logits: match options.logits {
                Logits::All => "all",
                Logits::Last => "last",
            },
            quantization: compiled.quantization.clone(),
            kv_cache: match &options.cache {
                KvCache::Quantized(kind, Some(measured)) => {
                    let calibration = measured.record.clone();
                    Some(CacheRecord { r#type: kind.as_str(), scales: "per channel", calibration })
                }
                KvCache::Quantized(_, None) | KvCache::Float => None,
            },
            weights: match options.weights {
                Weights::Pack { .. } => "pack",
                Weights::Link { .. } => "link",
            },
            onnx: format!("onnx/{}", compiled.file_name(options)),
            verification: None,
            hub: hub::source(&compiled.repository.dir),
            ignored_adapter: compiled.repository.ignored_adapter()?,
            sources,
            outputs,
            spec: compiled.description.spec.clone(),
            config_keys: compiled.description.accounting.clone(),
            parameters: parameters.collect(),
            dropped_tensors: compiled.plan.dropped.clone(),
            notes,
            rounded_to_zero,
            lowering: compiled.lowered.notes.clone(),
        })
    }

    /// Says on what matrices were calibrated.
    pub(super) fn calibrated(&mut self, record: Option<Calibrated>) {
        if let Some(quantization) = &mut self.quantization {
            quantization.calibration = record;
        }
    }
}
