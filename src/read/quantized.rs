//! Quantised checkpoints as the rest of the compiler sees them: tensors of floats under the names of the unquantised
//! checkpoint, decoded where they are read.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};

use super::checkpoint::{Checkpoint, TensorInfo};
use super::header::quoted;
use super::json::json_file;
use super::path::contained;
use crate::element::{ElementType, StoredType};
use crate::encoding::{Catalogue, Configs, Logical, Parts, Role, Shapes, Stored, decode_rows};
use crate::error::{Code, Error, Result};
use crate::weight::write_floats;

/// Files beside config.json that can say how weights are stored.
const SIDECARS: [&str; 3] = ["quantize_config.json", "hf_quant_config.json", "quanto_qmap.json"];
/// Keys of config.json that do.
const KEYS: [&str; 2] = ["quantization_config", "compression_config"];

/// What a repository's files say of how its weights are stored.
#[derive(Debug, Default)]
pub(super) struct Settings {
    /// config.json as it was.
    config: Map<String, Value>,
    /// In the order of [`SIDECARS`].
    sidecars: [Option<Map<String, Value>>; 3],
}

impl Settings {
    /// Takes the settings out of a configuration, which then says what the model is and no more, and reads the sidecars.
    pub(super) fn take(dir: &Path, config: &mut Map<String, Value>) -> Result<Self> {
        let whole = config.clone();
        for key in KEYS {
            config.shift_remove(key);
            if let Some(Value::Object(text)) = config.get_mut("text_config") {
                text.shift_remove(key);
            }
        }
        let mut sidecars = [None, None, None];
        for (slot, name) in sidecars.iter_mut().zip(SIDECARS) {
            if dir.join(name).symlink_metadata().is_ok() {
                *slot = Some(json_file(&contained(dir, name)?)?);
            }
        }
        Ok(Self { config: whole, sidecars })
    }

    /// Names of the sidecars that are there.
    pub(super) fn files(&self) -> impl Iterator<Item = &'static str> {
        SIDECARS.iter().zip(&self.sidecars).filter(|(_, map)| map.is_some()).map(|(name, _)| *name)
    }

    /// Keys of config.json that were taken out, with what stands there.
    pub(super) fn taken(&self) -> impl Iterator<Item = (String, &Value)> {
        let nested = self.config.get("text_config").and_then(Value::as_object);
        let places = [("", Some(&self.config)), ("text_config.", nested)];
        places.into_iter().flat_map(|(prefix, map)| {
            KEYS.iter().filter_map(move |key| Some((format!("{prefix}{key}"), map?.get(*key)?)))
        })
    }

    /// Recognises the quantised weights of a checkpoint, and has it present them decoded.
    pub(super) fn decode(&self, checkpoint: &mut Checkpoint, shapes: &Shapes<'_>) -> Result<()> {
        let [quantize_config, hf_quant_config, quanto_qmap] = self.sidecars.each_ref().map(Option::as_ref);
        let configs = Configs { config: &self.config, quantize_config, hf_quant_config, quanto_qmap };
        let stored = |tensor: &TensorInfo| Stored {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        };
        let tensors: Vec<Stored> = checkpoint.stored().iter().map(stored).collect();
        match Catalogue::build(&configs, &tensors, &Window(checkpoint), shapes)? {
            Some(catalogue) => checkpoint.present(catalogue),
            None => Ok(()),
        }
    }
}

/// Stored tensors, read where they are asked for.
struct Window<'c>(&'c Checkpoint);

impl Parts for Window<'_> {
    fn bytes(&self, tensor: &str, range: Range<u64>) -> Result<Cow<'_, [u8]>> {
        self.0.part(tensor, range).map(Cow::Owned)
    }
}

/// What reading some rows of a weight takes: parts that every row needs are held whole.
struct Held<'c> {
    checkpoint: &'c Checkpoint,
    whole: Vec<(&'c str, Arc<Vec<u8>>)>,
}

impl<'c> Held<'c> {
    fn new(checkpoint: &'c Checkpoint, logical: &'c Logical) -> Result<Self> {
        let spread = logical.encoding.layout.is_spread();
        let parts = logical.parts.iter().filter(|part| part.role != Role::Codes || spread);
        let mut whole = Vec::new();
        for part in parts {
            if let Some(recent) = checkpoint.recent() {
                whole.push((part.tensor.name.as_str(), recent.get(checkpoint, &part.tensor)?));
            }
        }
        Ok(Self { checkpoint, whole })
    }
}

impl Parts for Held<'_> {
    fn bytes(&self, tensor: &str, range: Range<u64>) -> Result<Cow<'_, [u8]>> {
        let Some((_, bytes)) = self.whole.iter().find(|(name, _)| *name == tensor) else {
            return self.checkpoint.part(tensor, range).map(Cow::Owned);
        };
        let at = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        bytes.get(at(range.start)..at(range.end)).map(Cow::Borrowed).ok_or_else(|| outside(tensor, &range))
    }
}

pub(super) fn outside(tensor: &str, range: &Range<u64>) -> Error {
    Error::new(Code::WeightsCorrupt, quoted(tensor)).found(format!("no bytes {range:?}"))
}

/// Parts are asked for by many threads and for one piece of a weight after the other: the last ones are kept.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Vec<(String, Arc<Vec<u8>>)>>);

/// Bytes that are kept; a larger part is kept alone.
const KEPT: usize = 64 << 20;

impl Recent {
    fn get(&self, checkpoint: &Checkpoint, tensor: &Stored) -> Result<Arc<Vec<u8>>> {
        // Held while reading, so that a part is read once however many threads want it.
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = kept.iter().find(|(name, _)| *name == tensor.name) {
            return Ok(Arc::clone(bytes));
        }
        let bytes = Arc::new(checkpoint.part(&tensor.name, 0..tensor.bytes())?);
        kept.push((tensor.name.clone(), Arc::clone(&bytes)));
        let mut total: usize = kept.iter().map(|(_, bytes)| bytes.len()).sum();
        while total > KEPT && kept.len() > 1 {
            let (_, oldest) = kept.remove(0);
            total -= oldest.len();
        }
        Ok(bytes)
    }
}

/// The element type of decoded values as a file would store it.
pub(super) fn stored_type(element: ElementType) -> StoredType {
    match element {
        ElementType::F16 => StoredType::F16,
        ElementType::BF16 => StoredType::BF16,
        _ => StoredType::F32,
    }
}

impl Checkpoint {
    /// Decodes the bytes of a quantised weight from `first` on, as its float type would be stored.
    pub(super) fn decode(&self, logical: &Logical, first: u64, out: &mut [u8]) -> Result<()> {
        let fault = |reason: String| Error::new(Code::WeightsCorrupt, quoted(&logical.name)).found(reason);
        let size = logical.dtype.size();
        let row = (logical.columns() as u64).saturating_mul(size as u64).max(1);
        let end = first.saturating_add(out.len() as u64);
        let at = |at: u64| usize::try_from(at).map_err(|_| fault(format!("{at} rows")));
        let (start, rows) = (first / row, at(first / row)?..at(end.div_ceil(row))?);
        let values = decode_rows(logical, &Held::new(self, logical)?, rows)?;
        let skipped = at(first.saturating_sub(start.saturating_mul(row)))?;
        if skipped == 0 && out.len() == values.len().saturating_mul(size) {
            return write_floats(&values, logical.dtype, out).map_err(fault);
        }
        let mut bytes = vec![0; values.len().saturating_mul(size)];
        write_floats(&values, logical.dtype, &mut bytes).map_err(fault)?;
        let wanted = bytes.get(skipped..skipped.saturating_add(out.len()));
        out.copy_from_slice(wanted.ok_or_else(|| fault("fewer rows than its shape says".to_owned()))?);
        Ok(())
    }
}
