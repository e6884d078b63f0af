//! Safetensors files and their index, as transformers saves them.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use super::{Checkpoint, Layout, Summary, Tensor, draw};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::write::{Force, Staging};

/// Bytes that one thread draws at a time.
const PIECE: u64 = 1 << 20;
/// Pieces that are drawn together while those before them are written.
const BATCH: usize = 16;

/// A consecutive part of a tensor.
struct Piece<'a> {
    tensor: &'a Tensor,
    first: u64,
    bytes: usize,
}

/// Writes a checkpoint into a directory that appears whole or not at all: `model.safetensors`, or shards and their
/// index, and `config.json`. `progress` is told of every chunk's bytes.
pub fn write(
    checkpoint: &Checkpoint,
    layout: &Layout,
    output: &Path,
    mut progress: impl FnMut(u64),
) -> Result<Summary> {
    let tensors = &checkpoint.tensors;
    let dtype = dtype(layout.element)?;
    let staging = Staging::new(output, Force::No)?;
    let shards = split(tensors, layout)?;
    let count = shards.len();
    let mut summary = Summary { tensors: tensors.len(), bytes: 0, files: Vec::new() };
    let mut weight_map = BTreeMap::new();
    for (index, mut shard) in shards.into_iter().enumerate() {
        // Tensors of one type stand in the order of their names.
        shard.sort_by(|a, b| a.name.cmp(&b.name));
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        let bytes = write_shard(&shard, dtype, layout, &staging.path().join(&name), &mut progress)?;
        summary.bytes = summary.bytes.saturating_add(bytes);
        summary.files.push(name);
    }
    let put = |name: &str, content: &[u8]| {
        let path = staging.path().join(name);
        fs::write(&path, content).map_err(|error| Error::io(&path, &error))
    };
    put("config.json", &checkpoint.config)?;
    if count > 1 {
        put("model.safetensors.index.json", &index(&weight_map, tensors, summary.bytes)?)?;
    }
    staging.commit()?;
    Ok(summary)
}

fn dtype(element: ElementType) -> Result<Dtype> {
    match element {
        ElementType::F32 => Ok(Dtype::F32),
        ElementType::F16 => Ok(Dtype::F16),
        ElementType::BF16 => Ok(Dtype::BF16),
        other => Err(Error::new(Code::UsageInvalid, "element type").found(other).expected("f32, f16 or bf16")),
    }
}

/// Fills each file up to the limit before the next one is begun; a tensor is never cut.
fn split<'a>(tensors: &'a [Tensor], layout: &Layout) -> Result<Vec<Vec<&'a Tensor>>> {
    let mut shards = vec![Vec::new()];
    let mut size = 0_u64;
    for tensor in tensors {
        let bytes = bytes(tensor, layout)?;
        if shards.last().is_some_and(|shard: &Vec<_>| !shard.is_empty())
            && size.saturating_add(bytes) > layout.shard_size
        {
            shards.push(Vec::new());
            size = 0;
        }
        size = size.saturating_add(bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    Ok(shards)
}

/// Bytes of all tensors.
pub(super) fn total(tensors: &[Tensor], layout: &Layout) -> Result<u64> {
    let total = tensors.iter().try_fold(0_u64, |total, tensor| Ok(total.saturating_add(bytes(tensor, layout)?)))?;
    if i64::try_from(total).is_ok() {
        return Ok(total);
    }
    Err(Error::new(Code::SpecInvalid, "the checkpoint").found(format!("{total} bytes")).expected("fewer than 2^63"))
}

fn bytes(tensor: &Tensor, layout: &Layout) -> Result<u64> {
    let bytes =
        tensor.elements()?.checked_mul(layout.element.size() as u64).filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| {
        Error::new(Code::SpecInvalid, format!("tensor {}", tensor.name))
            .found(format!("shape {:?}", tensor.shape))
            .expected("a size in bytes that fits 63 bits")
    })
}

fn index(weight_map: &BTreeMap<String, String>, tensors: &[Tensor], bytes: u64) -> Result<Vec<u8>> {
    let parameters = tensors.iter().map(Tensor::elements).sum::<Result<u64>>()?;
    let metadata = json!({ "total_parameters": parameters, "total_size": bytes });
    let index = json!({ "metadata": metadata, "weight_map": weight_map });
    let text = serde_json::to_string_pretty(&index)
        .map_err(|error| Error::new(Code::Io, "model.safetensors.index.json").found(error))?;
    Ok((text + "\n").into_bytes())
}

/// Writes one file; the answer is its bytes of data.
fn write_shard(
    shard: &[&Tensor],
    dtype: Dtype,
    layout: &Layout,
    path: &Path,
    progress: &mut impl FnMut(u64),
) -> Result<u64> {
    let io = |error: std::io::Error| Error::io(path, &error);
    let (header, data) = header(shard, dtype, layout, path)?;
    let mut file = File::create(path).map_err(io)?;
    file.write_all(&header).map_err(io)?;
    if layout.sparse {
        file.set_len(data.saturating_add(header.len() as u64)).map_err(io)?;
        progress(data);
        return Ok(data);
    }
    let (mut ready, mut next) = (Vec::new(), Vec::new());
    for batch in pieces(shard, layout)?.chunks(BATCH) {
        let (written, ()) = rayon::join(|| file.write_all(&ready), || draw_batch(batch, layout, &mut next));
        written.map_err(io)?;
        progress(ready.len() as u64);
        std::mem::swap(&mut ready, &mut next);
    }
    file.write_all(&ready).map_err(io)?;
    progress(ready.len() as u64);
    Ok(data)
}

/// Everything before the data, and the length of the data.
fn header(shard: &[&Tensor], dtype: Dtype, layout: &Layout, path: &Path) -> Result<(Vec<u8>, u64)> {
    let error = || Error::new(Code::SpecInvalid, path.display());
    let mut at = 0_usize;
    let mut infos = Vec::with_capacity(shard.len());
    for tensor in shard {
        let length = usize::try_from(bytes(tensor, layout)?).ok();
        let end = length.and_then(|length| at.checked_add(length));
        let end =
            end.ok_or_else(|| error().found("more bytes than can be addressed").help("use a smaller shard size"))?;
        let info = TensorInfo { dtype, shape: tensor.shape.clone(), data_offsets: (at, end) };
        infos.push((tensor.name.clone(), info));
        at = end;
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(|found| error().found(found))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|found| error().found(found))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok((header, at as u64))
}

fn pieces<'a>(shard: &[&'a Tensor], layout: &Layout) -> Result<Vec<Piece<'a>>> {
    let mut pieces = Vec::new();
    let size = layout.element.size() as u64;
    for tensor in shard {
        let end = bytes(tensor, layout)?;
        let mut at = 0;
        while at < end {
            let length = PIECE.min(end - at);
            // At most a mebibyte.
            let bytes = usize::try_from(length).unwrap_or(0);
            pieces.push(Piece { tensor, first: at / size, bytes });
            at += length;
        }
    }
    Ok(pieces)
}

fn draw_batch(batch: &[Piece<'_>], layout: &Layout, buffer: &mut Vec<u8>) {
    buffer.resize(batch.iter().map(|piece| piece.bytes).sum(), 0);
    let mut rest = buffer.as_mut_slice();
    let mut work = Vec::with_capacity(batch.len());
    for piece in batch {
        let (own, after) = std::mem::take(&mut rest).split_at_mut(piece.bytes);
        work.push((piece, own));
        rest = after;
    }
    work.into_par_iter().for_each(|(piece, out)| {
        let key = draw::key(&piece.tensor.name, layout.seed);
        draw::fill(key, piece.first, piece.tensor.mean, layout.element, out);
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Tensor { name: name.to_owned(), shape: shape.to_vec(), mean: 0.0 }
    }

    fn layout(shard_size: u64) -> Layout {
        Layout { element: ElementType::BF16, seed: 0, shard_size, sparse: false }
    }

    #[test]
    fn files_are_filled_and_tensors_kept_whole() {
        let tensors = [("c", 3), ("b", 2), ("a", 9), ("d", 1)].map(|(name, size)| tensor(name, &[size]));
        let shards = split(&tensors, &layout(10)).unwrap();
        let names: Vec<Vec<&str>> = shards.iter().map(|s| s.iter().map(|t| t.name.as_str()).collect()).collect();
        assert_eq!(names, [vec!["c", "b"], vec!["a"], vec!["d"]]);
    }

    #[test]
    fn a_tensor_of_many_pieces_is_one_drawing() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint { tensors: vec![tensor("big", &[3, 700_001])], config: b"{}".to_vec() };
        let summary = write(&checkpoint, &layout(u64::MAX), &dir.path().join("out"), |_| {}).unwrap();
        assert_eq!(summary.files, ["model.safetensors"]);
        let file = fs::read(dir.path().join("out/model.safetensors")).unwrap();
        let mut whole = vec![0; 3 * 700_001 * 2];
        draw::fill(draw::key("big", 0), 0, 0.0, ElementType::BF16, &mut whole);
        assert!(file.ends_with(&whole));
        assert_eq!(summary.bytes, whole.len() as u64);
    }

    #[test]
    fn sizes_that_overflow_are_errors() {
        let error = split(&[tensor("huge", &[usize::MAX, 2])], &layout(10)).unwrap_err();
        assert!(error.to_string().contains("huge"), "{error}");
        assert!(split(&[tensor("huge", &[usize::MAX / 2])], &layout(10)).is_err());
    }
}
