//! A checkpoint: the safetensors files of a repository as one list of tensors.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::file::{Handles, StableFile};
use super::header::{Entry, quoted, read_header};
use super::locate::{INDEX, Index, Weights, locate};
use super::path::contained;
use super::quantized::{Recent, outside, stored_type};
use crate::element::StoredType;
use crate::encoding::{Catalogue, Logical, Role};
use crate::error::{Code, Error, Result};
use crate::regular;

/// A tensor of the checkpoint: what its file's header says of it, or what it is once it is decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the checkpoint.
    pub name: String,
    /// Element type; of a quantised weight the one that it is decoded to.
    pub dtype: StoredType,
    /// Shape; empty for a scalar. The size in bytes fits 63 bits.
    pub shape: Vec<usize>,
    /// Which of [`Checkpoint::files`] holds it; of a quantised weight, its codes.
    pub file: usize,
    /// Where its bytes start, from the start of the file; of a quantised weight, its codes.
    pub offset: u64,
    /// How many bytes it takes; of a quantised weight, decoded.
    pub length: u64,
    /// True for a quantised weight, whose bytes stand in no file: reading decodes them.
    pub encoded: bool,
}

/// One safetensors file of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardFile {
    /// Name inside the repository.
    pub name: String,
    /// Where it lies, with links followed.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
}

/// The weights of a repository. Headers are read and checked when it is opened; data is read when
/// it is asked for, piece by piece.
///
/// Once [`super::Repository::decode`] has recognised a quantised checkpoint, its weights appear under the names and
/// shapes that they have without quantisation, as floats, and their parts do not appear.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<ShardFile>,
    stable: Vec<StableFile>,
    handles: Arc<Handles>,
    /// Sorted by name.
    tensors: Vec<TensorInfo>,
    /// How it is quantised, if it is.
    quantized: Option<Quantized>,
    /// Where its files contradict each other, and which was believed.
    notes: Vec<String>,
}

#[derive(Debug)]
struct Quantized {
    catalogue: Catalogue,
    /// What the files hold, sorted by name.
    stored: Vec<TensorInfo>,
    recent: Recent,
}

impl Checkpoint {
    /// Opens the weights in a directory: `model.safetensors`, else the shards that
    /// `model.safetensors.index.json` names, else every other safetensors file in it.
    pub fn open(dir: &Path) -> Result<Self> {
        let Weights { names, index } = locate(dir)?;
        let (files, stable, tensors, notes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut checkpoint = Self { files, stable, handles: Arc::default(), tensors, quantized: None, notes };
        for name in names {
            checkpoint.add_file(dir, name)?;
        }
        checkpoint.tensors.sort_by(|a, b| (&a.name, a.file).cmp(&(&b.name, b.file)));
        if let Some(index) = index {
            checkpoint.compare(&index);
        }
        checkpoint.check_duplicates()?;
        Ok(checkpoint)
    }

    /// Every tensor, in the order of the names.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        find(&self.tensors, name)
    }

    /// How the checkpoint is quantised, if it is and has been decoded.
    pub fn catalogue(&self) -> Option<&Catalogue> {
        self.quantized.as_ref().map(|quantized| &quantized.catalogue)
    }

    /// How a tensor is stored in words: its element type, or its format where it is quantised.
    pub fn storage(&self, tensor: &TensorInfo) -> String {
        self.logical(tensor).map_or_else(|| tensor.dtype.to_string(), |logical| logical.encoding.format.clone())
    }

    /// How a quantised weight is stored.
    pub fn logical(&self, tensor: &TensorInfo) -> Option<&Logical> {
        self.catalogue().filter(|_| tensor.encoded)?.get(&tensor.name)
    }

    /// Where its files contradict each other, and which was believed.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The files, in the order of the names.
    pub fn files(&self) -> &[ShardFile] {
        &self.files
    }

    /// Reads the bytes of a tensor from `first` on, counted from its start, until `out` is full. An error when the
    /// file is no longer what it was when the checkpoint was opened.
    pub fn read(&self, tensor: &TensorInfo, first: u64, out: &mut [u8]) -> Result<()> {
        let end = first.saturating_add(out.len() as u64);
        if let (Some(logical), true) = (self.logical(tensor), end <= tensor.length) {
            return self.decode(logical, first, out);
        }
        let (Some(file), true) = (self.stable.get(tensor.file), end <= tensor.length && !tensor.encoded) else {
            return Err(Error::new(Code::TensorMissing, quoted(&tensor.name))
                .found(format!("bytes {first}..{end} of {}, or a tensor of another checkpoint", tensor.length)));
        };
        file.read(tensor.offset.saturating_add(first), out)
    }

    /// Reads one of the files from `offset` on until `out` is full.
    pub(crate) fn read_file(&self, file: usize, offset: u64, out: &mut [u8]) -> Result<()> {
        let lost = || Error::new(Code::Io, format!("file {file} of a checkpoint that has {}", self.files.len()));
        self.stable.get(file).ok_or_else(lost)?.read(offset, out)
    }

    /// Tells the system that a part of one of the files will be read soon.
    pub(crate) fn will_need(&self, file: usize, offset: u64, length: u64) {
        if let Some(file) = self.stable.get(file) {
            file.will_need(offset, length);
        }
    }

    /// Tells the system that a part of one of the files will not be read again.
    pub(crate) fn will_not_need(&self, file: usize, offset: u64, length: u64) {
        if let Some(file) = self.stable.get(file) {
            file.will_not_need(offset, length);
        }
    }

    /// All bytes of a tensor, little-endian.
    pub fn bytes(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        // The length was compared with the file's when the checkpoint was opened.
        let length = usize::try_from(tensor.length).map_err(|_| Error::new(Code::Io, quoted(&tensor.name)))?;
        let mut bytes = vec![0; length];
        self.read(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// An error if a file is no longer what it was when the checkpoint was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.stable.iter().try_for_each(StableFile::check_unchanged)
    }

    /// What the files hold, sorted by name.
    pub(super) fn stored(&self) -> &[TensorInfo] {
        self.quantized.as_ref().map_or(&self.tensors, |quantized| &quantized.stored)
    }

    /// Bytes of a stored tensor.
    pub(super) fn part(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let tensor = find(self.stored(), name).filter(|tensor| range.start <= range.end && range.end <= tensor.length);
        let file = tensor.and_then(|tensor| self.stable.get(tensor.file));
        let length = usize::try_from(range.end.saturating_sub(range.start));
        let (Some(tensor), Some(file), Ok(length)) = (tensor, file, length) else { return Err(outside(name, &range)) };
        let mut bytes = vec![0; length];
        file.read(tensor.offset.saturating_add(range.start), &mut bytes)?;
        Ok(bytes)
    }

    /// Parts that were read a moment ago.
    pub(super) fn recent(&self) -> Option<&Recent> {
        self.quantized.as_ref().map(|quantized| &quantized.recent)
    }

    /// From here on the weights of the catalogue stand for their parts.
    pub(super) fn present(&mut self, catalogue: Catalogue) -> Result<()> {
        let plain = catalogue.plain.iter().filter_map(|name| find(&self.tensors, name)).cloned();
        let mut tensors: Vec<TensorInfo> = plain.collect();
        for logical in &catalogue.weights {
            let codes = logical.part(Role::Codes).and_then(|part| find(&self.tensors, &part.name));
            let dtype = stored_type(logical.dtype);
            let (Some(codes), Some(length)) = (codes, dtype.byte_length(&logical.shape)) else {
                return Err(Error::new(Code::WeightsCorrupt, format!("tensor {}", quoted(&logical.name)))
                    .found(format!("{:?}", logical.shape))
                    .expected("codes, and a shape that fits memory"));
            };
            let (name, shape) = (logical.name.clone(), logical.shape.clone());
            tensors.push(TensorInfo { name, dtype, shape, length, encoded: true, ..codes.clone() });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let stored = std::mem::replace(&mut self.tensors, tensors);
        self.quantized = Some(Quantized { catalogue, stored, recent: Recent::default() });
        Ok(())
    }

    fn add_file(&mut self, dir: &Path, name: String) -> Result<()> {
        let path = contained(dir, &name)?;
        // Named as the user knows it: a link's target in a cache is a bare hash.
        let shown = dir.join(&name);
        let (file, metadata) = regular::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotSeekable => Error::new(Code::WeightsCorrupt, shown.display())
                .found(error)
                .expected("a safetensors file")
                .help("put the file itself in its place"),
            _ => Error::io(&path, &error),
        })?;
        let index = self.files.len();
        let entries = read_header(std::io::BufReader::new(file), metadata.len(), &shown)?;
        self.tensors.extend(entries.into_iter().map(|entry| {
            let Entry { name, dtype, shape, offset, length } = entry;
            TensorInfo { name, dtype, shape, file: index, offset, length, encoded: false }
        }));
        self.stable.push(StableFile::new(&path, &metadata, &self.handles));
        self.files.push(ShardFile { name, path, size: metadata.len() });
        Ok(())
    }

    fn file_name(&self, file: usize) -> &str {
        self.files.get(file).map_or("", |file| &file.name)
    }

    /// Where the index and the shards' headers differ, the headers are followed, as in transformers: what a model needs
    /// is in one of them, or binding misses it.
    fn compare(&mut self, index: &Index) {
        let mut elsewhere = Vec::new();
        for tensor in &self.tensors {
            let holder = self.file_name(tensor.file);
            match index.map.get(&tensor.name) {
                Some(shard) if shard == holder => {}
                Some(shard) => elsewhere.push(format!("{} is in {holder}, not in {shard}", quoted(&tensor.name))),
                None => elsewhere.push(format!("{} is in {holder}, and not in the index", quoted(&tensor.name))),
            }
        }
        let absent = index.map.iter().filter(|(name, _)| self.get(name).is_none());
        elsewhere.extend(absent.map(|(name, shard)| format!("{} is not in {shard}, nor in another", quoted(name))));
        if let Some(first) = elsewhere.first() {
            let more = if elsewhere.len() > 1 { format!(", and {} more", elsewhere.len() - 1) } else { String::new() };
            self.notes.push(format!("{INDEX} is not what its shards hold, which were believed: {first}{more}"));
        }
        if let Some(first) = index.unnamed.first() {
            let more =
                if index.unnamed.len() > 1 { format!(" and {} more", index.unnamed.len() - 1) } else { String::new() };
            self.notes.push(format!("{} does not name {}{more}: not read", INDEX, quoted(first)));
        }
    }

    fn check_duplicates(&self) -> Result<()> {
        for pair in self.tensors.windows(2) {
            if let [first, second] = pair
                && first.name == second.name
            {
                let (one, other) = (self.file_name(first.file), self.file_name(second.file));
                return Err(Error::new(Code::WeightsCorrupt, format!("tensor {}", quoted(&first.name)))
                    .found(format!("it stands in {one} and in {other}"))
                    .expected("each tensor in one file")
                    .help(
                        "each file that the index names is read, without an index every .safetensors file: keep one model's files in the directory",
                    ));
            }
        }
        Ok(())
    }
}

/// The tensor of this name in a sorted list.
fn find<'t>(tensors: &'t [TensorInfo], name: &str) -> Option<&'t TensorInfo> {
    let at = tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
    tensors.get(at)
}
