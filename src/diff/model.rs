//! A built directory, opened: its record, its graph, and where each initializer's bytes lie.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message as _;
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use crate::onnx::{GraphProto, ModelProto, TensorProto};
use crate::read::{contained, json_file};

/// A protobuf message is never larger.
const MAX_GRAPH: u64 = 1 << 31;
const AGAIN: &str = "build the directory again";

/// A built directory.
pub(super) struct Built {
    pub(super) dir: PathBuf,
    pub(super) record: Map<String, Value>,
    /// The model without its graph.
    pub(super) header: ModelProto,
    /// The graph without its initializers.
    pub(super) graph: GraphProto,
    /// The graph file as it is stored.
    pub(super) bytes: Vec<u8>,
    /// Bytes of the graph file in fields that this crate has no name for.
    pub(super) unread: usize,
    pub(super) initializers: BTreeMap<String, Initializer>,
    /// The real paths of graph, data files and record, which are compared by what they say.
    pub(super) own: BTreeSet<PathBuf>,
}

/// An initializer and where its bytes are.
pub(super) struct Initializer {
    /// `TensorProto.DataType`.
    pub(super) data_type: i32,
    pub(super) dims: Vec<i64>,
    pub(super) length: u64,
    pub(super) place: Place,
}

/// Where the bytes of an initializer lie.
pub(super) enum Place {
    /// In the graph file.
    Inline(Vec<u8>),
    /// In a data file, from this byte on.
    File(Arc<DataFile>, u64),
}

/// A data file that is open.
pub(super) struct DataFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
    size: u64,
    identity: Option<same_file::Handle>,
}

impl DataFile {
    fn open(path: PathBuf) -> Result<Self> {
        let io = |error: std::io::Error| Error::io(&path, &error);
        // Asked before it is opened: opening a pipe would wait for its writer.
        let metadata = fs::metadata(&path).map_err(io)?;
        if !metadata.is_file() {
            return Err(Error::new(Code::ModelInvalid, path.display()).found("not a regular file").expected("a file"));
        }
        let file = File::open(&path).map_err(io)?;
        let identity = file.try_clone().and_then(same_file::Handle::from_file).ok();
        Ok(Self { file, size: metadata.len(), identity, path })
    }

    /// True if both are the same file, by whatever names.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.identity.is_some() && self.identity == other.identity
    }
}

impl Built {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let record_path = dir.join("hf2onnx.json");
        if !record_path.is_file() {
            return Err(Error::new(Code::Io, dir.display())
                .found("no hf2onnx.json")
                .expected("a directory that `hf2onnx build` wrote")
                .help("check the path"));
        }
        let record_path = contained(dir, "hf2onnx.json")?;
        let record = json_file(&record_path)?;
        let Some(name) = record.get("onnx").and_then(Value::as_str) else {
            return Err(Error::new(Code::ConfigInvalid, format!("{}: key `onnx`", record_path.display()))
                .found(record.get("onnx").map_or("nothing".into(), Value::to_string))
                .expected("the graph file's name")
                .help(AGAIN));
        };
        let path = contained(dir, name)?;
        let bytes = read_graph(&path)?;
        let invalid = |found: String| {
            Error::new(Code::ModelInvalid, path.display()).found(found).expected("an ONNX model").help(AGAIN)
        };
        let mut header = ModelProto::decode(bytes.as_slice()).map_err(|error| invalid(error.to_string()))?;
        let unread = bytes.len().saturating_sub(header.encoded_len());
        let mut graph = header.graph.take().ok_or_else(|| invalid("no graph".into()))?;
        let mut locator = Locator { model: &path, folder: path.parent().unwrap_or(dir), files: BTreeMap::new() };
        let mut initializers = BTreeMap::new();
        for tensor in std::mem::take(&mut graph.initializer) {
            let name = tensor.name.clone();
            if initializers.insert(name.clone(), locator.initializer(tensor)?).is_some() {
                return Err(invalid(format!("two initializers `{name}`")));
            }
        }
        let mut own: BTreeSet<PathBuf> = locator.files.into_values().map(|file| file.path.clone()).collect();
        own.extend([path, record_path]);
        Ok(Self { dir: dir.to_owned(), record, header, graph, bytes, unread, initializers, own })
    }

    /// `model_type`, target and dtype.
    pub(super) fn summary(&self) -> String {
        let model_type = self.record.get("spec").and_then(|spec| spec.get("model_type"));
        let words = [model_type, self.record.get("target"), self.record.get("dtype")];
        words.map(|word| word.and_then(Value::as_str).unwrap_or("?")).join(", ")
    }
}

fn read_graph(path: &Path) -> Result<Vec<u8>> {
    let io = |error: std::io::Error| Error::io(path, &error);
    let metadata = fs::metadata(path).map_err(io)?;
    if !metadata.is_file() || metadata.len() > MAX_GRAPH {
        let found = if metadata.is_file() { format!("{} bytes", metadata.len()) } else { "not a regular file".into() };
        return Err(Error::new(Code::ModelInvalid, path.display())
            .found(found)
            .expected(format!("a file of at most {MAX_GRAPH} bytes")));
    }
    fs::read(path).map_err(io)
}

/// Opens data files, each once.
struct Locator<'m> {
    model: &'m Path,
    folder: &'m Path,
    files: BTreeMap<String, Arc<DataFile>>,
}

impl Locator<'_> {
    fn initializer(&mut self, tensor: TensorProto) -> Result<Initializer> {
        let invalid = |found: String| {
            let subject = format!("{}: initializer `{}`", self.model.display(), tensor.name.escape_debug());
            Error::new(Code::ModelInvalid, subject).found(found)
        };
        let bits = bits(tensor.data_type).ok_or_else(|| {
            invalid(format!("element type {}", tensor.data_type)).expected("an element type of a fixed size")
        })?;
        let needed = length(&tensor.dims, bits)
            .ok_or_else(|| invalid(format!("shape {:?}", tensor.dims)).expected("sizes whose product is a size"))?;
        if tensor.data_location != 1 {
            if tensor.raw_data.len() as u64 != needed {
                let found = format!("{} bytes in the graph file's raw_data", tensor.raw_data.len());
                return Err(invalid(found).expected(format!("{needed}, by type and shape")).help(AGAIN));
            }
            let TensorProto { data_type, dims, raw_data, .. } = tensor;
            return Ok(Initializer { data_type, dims, length: needed, place: Place::Inline(raw_data) });
        }
        let entry = |key: &str| tensor.external_data.iter().find(|entry| entry.key == key).map(|e| e.value.as_str());
        let number = |key: &str, default: u64| match entry(key) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| invalid(format!("{key} `{}`", text.escape_debug()))),
        };
        let (offset, length) = (number("offset", 0)?, number("length", needed)?);
        if length != needed {
            return Err(invalid(format!("length {length}")).expected(format!("{needed}, by type and shape")));
        }
        let location = entry("location").ok_or_else(|| invalid("external data without a location".into()))?;
        let file = match self.files.get(location) {
            Some(file) => Arc::clone(file),
            None => Arc::new(DataFile::open(contained(self.folder, location)?)?),
        };
        if offset.checked_add(length).is_none_or(|end| end > file.size) {
            return Err(invalid(format!("{length} bytes from {offset} on"))
                .expected(format!("a range within the {} bytes of {}", file.size, file.path.display()))
                .help("the data file is cut short or belongs to another graph: build the directory again"));
        }
        self.files.entry(location.to_owned()).or_insert_with(|| Arc::clone(&file));
        let TensorProto { data_type, dims, .. } = tensor;
        Ok(Initializer { data_type, dims, length, place: Place::File(file, offset) })
    }
}

/// Bytes of a tensor; elements of less than a byte are packed without gaps.
fn length(dims: &[i64], bits: u64) -> Option<u64> {
    let count = dims.iter().try_fold(1_u64, |count, dim| count.checked_mul(u64::try_from(*dim).ok()?))?;
    Some(count.checked_mul(bits)?.div_ceil(8))
}

/// The name and the bits of an element of `TensorProto.DataType`, as `onnx.proto3` numbers them.
const TYPES: [(i32, &str, u64); 25] = [
    (1, "f32", 32),
    (2, "u8", 8),
    (3, "i8", 8),
    (4, "u16", 16),
    (5, "i16", 16),
    (6, "i32", 32),
    (7, "i64", 64),
    (9, "bool", 8),
    (10, "f16", 16),
    (11, "f64", 64),
    (12, "u32", 32),
    (13, "u64", 64),
    (14, "complex64", 64),
    (15, "complex128", 128),
    (16, "bf16", 16),
    (17, "f8e4m3fn", 8),
    (18, "f8e4m3fnuz", 8),
    (19, "f8e5m2", 8),
    (20, "f8e5m2fnuz", 8),
    (21, "u4", 4),
    (22, "i4", 4),
    (23, "f4e2m1", 4),
    (24, "f8e8m0", 8),
    (25, "u2", 2),
    (26, "i2", 2),
];

fn bits(data_type: i32) -> Option<u64> {
    TYPES.iter().find(|(number, ..)| *number == data_type).map(|(.., bits)| *bits)
}

/// The name of an element type, or its number.
pub(super) fn type_name(data_type: i32) -> String {
    let known = TYPES.iter().find(|(number, ..)| *number == data_type);
    known.map_or_else(|| format!("type {data_type}"), |(_, name, _)| (*name).to_owned())
}

impl Initializer {
    /// `f32[2, 3]`.
    pub(super) fn ty(&self) -> String {
        let dims: Vec<String> = self.dims.iter().map(ToString::to_string).collect();
        format!("{}[{}]", type_name(self.data_type), dims.join(", "))
    }

    /// Reads bytes from `start` on, which lie within the initializer.
    pub(super) fn read(&self, start: u64, buffer: &mut [u8]) -> Result<()> {
        match &self.place {
            Place::Inline(bytes) => {
                let from = usize::try_from(start).unwrap_or(usize::MAX);
                let part = from.checked_add(buffer.len()).and_then(|end| bytes.get(from..end));
                if let Some(part) = part {
                    buffer.copy_from_slice(part);
                }
                Ok(())
            }
            Place::File(data, offset) => {
                read_at(&data.file, buffer, offset.saturating_add(start)).map_err(|error| Error::io(&data.path, &error))
            }
        }
    }

    /// True if both are the same bytes of the same file, so that nothing has to be read.
    pub(super) fn is_same_place(&self, other: &Self) -> bool {
        match (&self.place, &other.place) {
            (Place::File(a, at), Place::File(b, bt)) => at == bt && self.length == other.length && a.is(b),
            _ => false,
        }
    }
}

/// Reads at a position, whatever the file's own position is; several threads may do so at once.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
    }
    #[cfg(windows)]
    {
        let (mut rest, mut offset) = (buffer, offset);
        while !rest.is_empty() {
            let count = std::os::windows::fs::FileExt::seek_read(file, rest, offset)?;
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            rest = rest.get_mut(count..).unwrap_or_default();
            offset = offset.saturating_add(count as u64);
        }
        Ok(())
    }
}
