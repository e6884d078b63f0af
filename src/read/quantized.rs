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
use crate::encoding::{
    AffineRows, Catalogue, Configs, Layout, Logical, Parts, Role, Shapes, Stored, affine_rows, decode_rows, order,
};
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
                whole.push((part.tensor.name.as_str(), recent.part(checkpoint, &part.tensor)?));
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

/// What many threads ask for, for one piece of a weight after the other: the last parts, and the last matrices whose
/// rows are found across their stored rows.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Vec<Kept>>);

/// Bytes under the name of their tensor; the number of a matrix where it is not the part.
#[derive(Debug)]
struct Kept {
    name: String,
    matrix: Option<usize>,
    size: u64,
    /// Made by who comes first, while the others wait.
    bytes: Arc<Mutex<Option<Arc<Vec<u8>>>>>,
}

/// Bytes that are kept; something larger is kept alone.
const KEPT: u64 = 64 << 20;

impl Recent {
    fn part(&self, checkpoint: &Checkpoint, tensor: &Stored) -> Result<Arc<Vec<u8>>> {
        let read = || checkpoint.part(&tensor.name, 0..tensor.bytes());
        self.get((&tensor.name, None, tensor.bytes()), read)
    }

    fn get(
        &self,
        (name, matrix, size): (&str, Option<usize>, u64),
        make: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<Vec<u8>>> {
        let place = {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let known = kept.iter().find(|kept| kept.name == name && kept.matrix == matrix);
            if let Some(known) = known {
                Arc::clone(&known.bytes)
            } else {
                let bytes = Arc::default();
                kept.push(Kept { name: name.to_owned(), matrix, size, bytes: Arc::clone(&bytes) });
                let mut total = kept.iter().fold(0, |total: u64, kept| total.saturating_add(kept.size));
                while total > KEPT && kept.len() > 1 {
                    total = total.saturating_sub(kept.remove(0).size);
                }
                bytes
            }
        };
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = place.as_ref() {
            return Ok(Arc::clone(bytes));
        }
        let bytes = Arc::new(make()?);
        *place = Some(Arc::clone(&bytes));
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
    /// Integers, scales and zero points of rows of a quantised weight, all axes but the last counted together; the
    /// columns as [`Self::column_order`] says.
    ///
    /// # Errors
    /// A weight that has no such form, or is not quantised.
    pub fn affine_rows(&self, tensor: &TensorInfo, rows: Range<usize>) -> Result<AffineRows> {
        let Some(logical) = self.logical(tensor) else {
            return Err(Error::new(Code::QuantizationUnsupported, quoted(&tensor.name)).found("no quantised weight"));
        };
        let held = Held::new(self, logical)?;
        let order = order(logical, &held)?;
        affine_rows(logical, &held, rows, order.as_deref())
    }

    /// The order in which [`Self::affine_rows`] gives the columns of a quantised weight, one group after the other:
    /// column j of its integers is column `order[j]` of the weight. None where that is their own order.
    ///
    /// # Errors
    /// Groups that no order turns into blocks.
    pub fn column_order(&self, tensor: &TensorInfo) -> Result<Option<Vec<usize>>> {
        self.logical(tensor).map_or(Ok(None), |logical| order(logical, &Window(self)))
    }

    /// Decodes the bytes of a quantised weight from `first` on, as its float type would be stored.
    pub(super) fn decode(&self, logical: &Logical, mut first: u64, mut out: &mut [u8]) -> Result<()> {
        let size = logical.dtype.size() as u64;
        let row = (logical.columns() as u64).saturating_mul(size).max(1);
        let (Layout::Transposed { rows: matrix }, Some(recent)) = (logical.encoding.layout, self.recent()) else {
            return self.decode_into(logical, row, first, out);
        };
        // Rows of such a matrix are not worth decoding one by one.
        let length = row.saturating_mul(matrix as u64).max(1);
        while !out.is_empty() {
            let (index, skipped) = (place(logical, first / length)?, place(logical, first % length)?);
            let make = || {
                let mut bytes = vec![0; place(logical, length)?];
                self.decode_into(logical, row, first - first % length, &mut bytes).map(|()| bytes)
            };
            let bytes = recent.get((&logical.name, Some(index), length), make)?;
            let piece = bytes.get(skipped..).unwrap_or_default();
            let (now, rest) = out.split_at_mut(piece.len().min(out.len()));
            if now.is_empty() {
                return Err(short(logical));
            }
            now.copy_from_slice(piece.get(..now.len()).unwrap_or_default());
            (first, out) = (first.saturating_add(now.len() as u64), rest);
        }
        Ok(())
    }

    fn decode_into(&self, logical: &Logical, row: u64, first: u64, out: &mut [u8]) -> Result<()> {
        let size = logical.dtype.size();
        let end = first.saturating_add(out.len() as u64);
        let rows = place(logical, first / row)?..place(logical, end.div_ceil(row))?;
        let values = decode_rows(logical, &Held::new(self, logical)?, rows)?;
        let skipped = place(logical, first % row)?;
        let fault = |reason: String| corrupt(logical).found(reason);
        if skipped == 0 && out.len() == values.len().saturating_mul(size) {
            return write_floats(&values, logical.dtype, out).map_err(fault);
        }
        let mut bytes = vec![0; values.len().saturating_mul(size)];
        write_floats(&values, logical.dtype, &mut bytes).map_err(fault)?;
        let wanted = bytes.get(skipped..skipped.saturating_add(out.len()));
        out.copy_from_slice(wanted.ok_or_else(|| short(logical))?);
        Ok(())
    }
}

fn corrupt(logical: &Logical) -> Error {
    Error::new(Code::WeightsCorrupt, quoted(&logical.name))
}

fn short(logical: &Logical) -> Error {
    corrupt(logical).found("fewer rows than its shape says")
}

fn place(logical: &Logical, at: u64) -> Result<usize> {
    usize::try_from(at).map_err(|_| corrupt(logical).found(format!("byte {at}")))
}
