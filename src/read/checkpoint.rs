//! A checkpoint: the safetensors files of a repository as one list of tensors.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::file::StableFile;
use super::header::{Entry, quoted, read_header};
use super::locate::{Index, Weights, locate};
use super::path::contained;
use crate::element::StoredType;
use crate::error::{Code, Error, Result};

/// A tensor of the checkpoint: what its file's header says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: StoredType,
    /// Shape; empty for a scalar. The size in bytes fits 63 bits.
    pub shape: Vec<usize>,
    /// Which of [`Checkpoint::files`] holds it.
    pub file: usize,
    /// Where its bytes start, from the start of the file.
    pub offset: u64,
    /// How many bytes it takes.
    pub length: u64,
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
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<ShardFile>,
    stable: Vec<StableFile>,
    /// Sorted by name.
    tensors: Vec<TensorInfo>,
}

impl Checkpoint {
    /// Opens the weights in a directory: `model.safetensors`, else the shards that
    /// `model.safetensors.index.json` names, else every other safetensors file in it.
    pub fn open(dir: &Path) -> Result<Self> {
        let Weights { names, index } = locate(dir)?;
        let mut checkpoint = Self { files: Vec::new(), stable: Vec::new(), tensors: Vec::new() };
        for name in names {
            checkpoint.add_file(dir, name)?;
        }
        checkpoint.tensors.sort_by(|a, b| (&a.name, a.file).cmp(&(&b.name, b.file)));
        if let Some(index) = index {
            checkpoint.compare(&index)?;
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
        let at = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.tensors.get(at)
    }

    /// The files, in the order of the names.
    pub fn files(&self) -> &[ShardFile] {
        &self.files
    }

    /// Reads the bytes of a tensor from `first` on, counted from its start, until `out` is full. An error when the
    /// file is no longer what it was when the checkpoint was opened.
    pub fn read(&self, tensor: &TensorInfo, first: u64, out: &mut [u8]) -> Result<()> {
        let end = first.saturating_add(out.len() as u64);
        let (Some(file), true) = (self.stable.get(tensor.file), end <= tensor.length) else {
            return Err(Error::new(Code::TensorMissing, quoted(&tensor.name))
                .found(format!("bytes {first}..{end} of {}, or a tensor of another checkpoint", tensor.length)));
        };
        file.read(tensor.offset.saturating_add(first), out)
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

    fn add_file(&mut self, dir: &Path, name: String) -> Result<()> {
        let path = contained(dir, &name)?;
        let io = |error: std::io::Error| Error::io(&path, &error);
        let file = File::open(&path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        // Named as the user knows it: a link's target in a cache is a bare hash.
        let shown = dir.join(&name);
        if !metadata.is_file() {
            return Err(Error::new(Code::WeightsCorrupt, shown.display())
                .found("not a regular file")
                .expected("a safetensors file"));
        }
        let index = self.files.len();
        let entries = read_header(std::io::BufReader::new(file), metadata.len(), &shown)?;
        self.tensors.extend(entries.into_iter().map(|entry| {
            let Entry { name, dtype, shape, offset, length } = entry;
            TensorInfo { name, dtype, shape, file: index, offset, length }
        }));
        self.stable.push(StableFile::new(&path, &metadata));
        self.files.push(ShardFile { name, path, size: metadata.len() });
        Ok(())
    }

    fn file_name(&self, file: usize) -> &str {
        self.files.get(file).map_or("", |file| &file.name)
    }

    /// The index and the shards have to tell the same story, or one of them is of another download.
    fn compare(&self, index: &Index) -> Result<()> {
        let error = |name: &str| {
            Error::new(Code::WeightsCorrupt, format!("{}: tensor {}", index.path.display(), quoted(name)))
                .help("index and shards are not of the same model: download both again")
        };
        for tensor in &self.tensors {
            let holder = self.file_name(tensor.file);
            match index.map.get(&tensor.name) {
                Some(shard) if shard == holder => {}
                Some(shard) => {
                    return Err(error(&tensor.name)
                        .found(format!("it is in {holder}"))
                        .expected(format!("in {shard}, as the index says")));
                }
                None => {
                    return Err(error(&tensor.name)
                        .found(format!("it is in {holder}, but not in the index"))
                        .expected("every tensor of a shard in the index"));
                }
            }
        }
        match index.map.iter().find(|(name, _)| self.get(name).is_none()) {
            Some((name, shard)) => Err(error(name)
                .found(format!("{shard} does not hold it"))
                .expected(format!("in {shard}, as the index says"))),
            None => Ok(()),
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
                        "without an index every .safetensors file is read: keep one model's files in the directory",
                    ));
            }
        }
        Ok(())
    }
}
