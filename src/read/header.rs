//! The header of a safetensors file: eight bytes of length, then JSON. Nothing in it is believed
//! before it is checked against the file.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::checkpoint::TensorInfo;
use crate::element::StoredType;
use crate::error::{Code, Error, Result};

/// The format's own limit on the JSON's length.
const MAX_HEADER: u64 = 100_000_000;
/// Longer names and deeper shapes than any model has; they bound what a hostile header can cost.
const MAX_NAME: usize = 4096;
const MAX_RANK: usize = 64;

/// One checked tensor of a header; `offset` counts from the start of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: StoredType,
    pub(crate) shape: Vec<usize>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Entry {
    /// The tensor as one of a checkpoint's file of this number.
    pub(crate) fn into_info(self, file: usize) -> TensorInfo {
        let Self { name, dtype, shape, offset, length } = self;
        TensorInfo { name, dtype, shape, file, offset, length, encoded: false }
    }
}

/// Reads and checks the header of a file of `size` bytes. The tensors come sorted by name.
pub(crate) fn read_header(mut file: impl Read, size: u64, path: &Path) -> Result<Vec<Entry>> {
    let mut prefix = [0; 8];
    let Some(after_prefix) = size.checked_sub(8) else {
        return Err(truncated(path, format!("{size} bytes in all"), "at least 8 bytes"));
    };
    file.read_exact(&mut prefix).map_err(|error| Error::io(path, &error))?;
    if let Some(error) = impostor(prefix, path) {
        return Err(error);
    }
    let length = u64::from_le_bytes(prefix);
    if length > MAX_HEADER {
        return Err(corrupt(path)
            .found(format!("a header of {length} bytes"))
            .expected(format!("at most {MAX_HEADER} bytes"))
            .help("this is no safetensors file, or its first bytes are damaged: download it again"));
    }
    let Some(data_length) = after_prefix.checked_sub(length) else {
        return Err(truncated(
            path,
            format!("a header of {length} bytes in a file of {size} bytes"),
            "a header that ends before the file does",
        ));
    };
    // At most the file's own size, which was checked just now.
    let mut json = vec![0; usize::try_from(length).map_err(|_| corrupt(path).found("a huge header"))?];
    file.read_exact(&mut json).map_err(|error| Error::io(path, &error))?;
    parse(&json, data_length, path)
}

/// The tensors of a safetensors file that is in memory, sorted by name; `path` names it in errors.
pub fn safetensors_header(file: &[u8], path: &Path) -> Result<Vec<TensorInfo>> {
    let entries = read_header(file, file.len() as u64, path)?;
    Ok(entries.into_iter().map(|entry| entry.into_info(0)).collect())
}

/// Checks the JSON of a header against the length of the data behind it.
pub(crate) fn parse(json: &[u8], data_length: u64, path: &Path) -> Result<Vec<Entry>> {
    let text = std::str::from_utf8(json)
        .map_err(|error| corrupt(path).found(format!("a header that is not UTF-8: {error}")).help(DOWNLOAD))?;
    if !text.starts_with('{') {
        return Err(corrupt(path)
            .found("a header that does not start with `{`")
            .expected("a JSON object")
            .help(DOWNLOAD));
    }
    let raw: RawHeader = serde_json::from_str(text)
        .map_err(|error| corrupt(path).found(format!("a header that is not valid: {error}")).help(DOWNLOAD))?;
    let data_start = 8 + json.len() as u64;
    let mut entries = Vec::with_capacity(raw.0.len());
    for (name, tensor) in raw.0 {
        entries.push(check_tensor(name, &tensor, data_start, data_length, path)?);
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    for pair in entries.windows(2) {
        if let [first, second] = pair
            && first.name == second.name
        {
            return Err(corrupt_tensor(path, &first.name)
                .found("the name stands twice in the header")
                .expected("each name once")
                .help(DOWNLOAD));
        }
    }
    check_coverage(&entries, data_start, data_length, path)?;
    Ok(entries)
}

const DOWNLOAD: &str = "the file is damaged: download it again";

fn check_tensor(name: String, raw: &RawTensor, data_start: u64, data_length: u64, path: &Path) -> Result<Entry> {
    let error = || corrupt_tensor(path, &name);
    let dtype = StoredType::parse(&raw.dtype).ok_or_else(|| {
        let known: Vec<_> = StoredType::ALL.iter().map(|dtype| dtype.as_str()).collect();
        error()
            .found(format!("dtype `{}`", shorten(&raw.dtype)))
            .expected(format!("one of {}", known.join(", ")))
            .help("the file is damaged, or newer than this version of hf2onnx")
    })?;
    let (begin, end) = raw.data_offsets;
    let Some(length) = end.checked_sub(begin) else {
        return Err(error()
            .found(format!("data_offsets [{begin}, {end}]"))
            .expected("an end that is not before its beginning")
            .help(DOWNLOAD));
    };
    let shape: Option<Vec<usize>> = raw.shape.0.iter().map(|&dimension| usize::try_from(dimension).ok()).collect();
    let needed = shape.as_ref().and_then(|shape| dtype.byte_length(shape));
    let (Some(shape), Some(needed)) = (shape, needed) else {
        return Err(error()
            .found(format!("shape {:?} of {dtype}", raw.shape.0))
            .expected("a size in whole bytes that fits 63 bits")
            .help(DOWNLOAD));
    };
    if needed != length {
        return Err(error()
            .found(format!("{length} bytes (data_offsets [{begin}, {end}])"))
            .expected(format!("{needed} bytes for shape {shape:?} of {dtype}"))
            .help(DOWNLOAD));
    }
    if end > data_length {
        return Err(error()
            .found(format!("{data_length} bytes of data in the file"))
            .expected(format!("at least {end}: the tensor lies at {begin}..{end}"))
            .help("the file is cut short: download it again"));
    }
    // Can not overflow: `begin` lies inside the file. Saturating keeps that out of the argument.
    Ok(Entry { offset: data_start.saturating_add(begin), name, dtype, shape, length })
}

/// The format wants every byte of the data to belong to one tensor.
fn check_coverage(entries: &[Entry], data_start: u64, data_length: u64, path: &Path) -> Result<()> {
    let mut in_order: Vec<_> = entries.iter().collect();
    in_order.sort_by_key(|entry| (entry.offset, entry.length));
    let mut covered = data_start;
    let mut previous: Option<&Entry> = None;
    for entry in in_order {
        let before = previous.map_or("the header".to_owned(), |entry| quoted(&entry.name));
        if entry.offset != covered {
            let (at, end) = (entry.offset - data_start, covered - data_start);
            let what = if entry.offset < covered { "overlaps" } else { "leaves a gap behind" };
            return Err(corrupt_tensor(path, &entry.name)
                .found(format!("its data starts at {at}, which {what} {before}"))
                .expected(format!("data that starts at {end}, where {before} ends"))
                .help(DOWNLOAD));
        }
        covered = covered.saturating_add(entry.length);
        previous = Some(entry);
    }
    let end = covered - data_start;
    if end != data_length {
        return Err(corrupt(path)
            .found(format!("{} bytes behind the last tensor", data_length - end))
            .expected(format!("{end} bytes of data, as the header says"))
            .help(DOWNLOAD));
    }
    Ok(())
}

/// Files that are often found under a safetensors name.
fn impostor(prefix: [u8; 8], path: &Path) -> Option<Error> {
    let (what, help) = match &prefix {
        b"version " => (
            "a Git LFS pointer instead of the file itself",
            "run `git lfs pull` in the repository, or download it with `hf download`",
        ),
        [b'P', b'K', 3, 4, ..] => (
            "a zip archive (a PyTorch pickle?) under a safetensors name",
            "convert the weights with `save_pretrained(..., safe_serialization=True)`",
        ),
        [b'<', b'!' | b'h', ..] => ("an HTML page instead of the file", "download the file again"),
        _ => return None,
    };
    Some(corrupt(path).found(what).expected("a safetensors file").help(help))
}

fn corrupt(path: &Path) -> Error {
    Error::new(Code::WeightsCorrupt, path.display())
}

fn corrupt_tensor(path: &Path, name: &str) -> Error {
    Error::new(Code::WeightsCorrupt, format!("{}: tensor {}", path.display(), quoted(name)))
}

fn truncated(path: &Path, found: String, expected: &str) -> Error {
    corrupt(path).found(found).expected(expected).help("the file is cut short: download it again")
}

/// A name from a file, safe to print: no control characters, not endless.
pub(crate) fn quoted(name: &str) -> String {
    format!("`{}`", shorten(name))
}

fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(200).flat_map(char::escape_debug).collect();
    if text.chars().nth(200).is_some() {
        short.push('…');
    }
    short
}

/// The header as it is written, duplicates included.
struct RawHeader(Vec<(String, RawTensor)>);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: RawShape,
    data_offsets: (u64, u64),
}

struct RawShape(Vec<u64>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name.len() > MAX_NAME {
                        return Err(A::Error::custom("a tensor's name is longer than 4096 bytes"));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let tensor = map
                        .next_value()
                        .map_err(|error| A::Error::custom(format!("tensor {}: {error}", quoted(&name))))?;
                    tensors.push((name, tensor));
                }
                Ok(RawHeader(tensors))
            }
        }
        deserializer.deserialize_map(Header)
    }
}

impl<'de> Deserialize<'de> for RawShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = RawShape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<RawShape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = seq.next_element()? {
                    if shape.len() == MAX_RANK {
                        return Err(A::Error::custom("a shape of more than 64 dimensions"));
                    }
                    shape.push(dimension);
                }
                Ok(RawShape(shape))
            }
        }
        deserializer.deserialize_seq(Shape)
    }
}
