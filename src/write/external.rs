//! External data: one file that holds the bytes of all large initializers, written front to back.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Code, Error, Result};
use crate::read::{FileHash, file_name, hex};

/// Tensors of at least a page start on a page, so that they can be mapped one by one.
const PAGE: u64 = 4096;
/// Smaller ones start on a cache line.
const LINE: u64 = 64;

/// Where a tensor lies in the data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes before it.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

/// Writes an external data file (`onnx/model.onnx_data`) and hashes it on the way.
pub struct ExternalWriter<'a> {
    path: PathBuf,
    file: BufWriter<File>,
    hash: Sha256,
    position: u64,
    /// Bytes of the current tensor that are still to come.
    pending: u64,
    progress: Box<dyn FnMut(u64) + Send + 'a>,
}

impl<'a> ExternalWriter<'a> {
    /// Creates the file. `progress` is told of every chunk's bytes as they are written.
    pub fn create(path: &Path, progress: impl FnMut(u64) + Send + 'a) -> Result<Self> {
        let file = File::create(path).map_err(|error| Error::io(path, &error))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 20, file),
            hash: Sha256::new(),
            position: 0,
            pending: 0,
            progress: Box::new(progress),
        })
    }

    /// Writes a whole tensor.
    pub fn append(&mut self, bytes: &[u8]) -> Result<Extent> {
        let extent = self.begin(bytes.len() as u64)?;
        self.chunk(bytes)?;
        Ok(extent)
    }

    /// Starts a tensor of `length` bytes, which come by [`ExternalWriter::chunk`].
    pub fn begin(&mut self, length: u64) -> Result<Extent> {
        self.check_whole()?;
        let alignment = if length >= PAGE { PAGE } else { LINE };
        let offset = self.position.next_multiple_of(alignment);
        // Less than one alignment, so less than a page.
        let zeros = [0; 4096];
        let gap = usize::try_from(offset.saturating_sub(self.position)).unwrap_or(0);
        self.write(zeros.get(..gap).unwrap_or_default())?;
        self.pending = length;
        Ok(Extent { offset, length })
    }

    /// Writes the next bytes of the tensor that was begun.
    pub fn chunk(&mut self, bytes: &[u8]) -> Result<()> {
        let count = bytes.len() as u64;
        self.pending = self.pending.checked_sub(count).ok_or_else(|| {
            Error::new(Code::Io, self.path.display())
                .found(format!("{count} more bytes of a tensor"))
                .expected(format!("at most {}, as was announced", self.pending))
        })?;
        self.write(bytes)?;
        (self.progress)(count);
        Ok(())
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Writes what is buffered and closes the file. Its name, size and hash are the answer.
    pub fn finish(mut self) -> Result<FileHash> {
        self.check_whole()?;
        self.file.flush().map_err(|error| Error::io(&self.path, &error))?;
        Ok(FileHash { name: file_name(&self.path), size: self.position, sha256: hex(&self.hash.finalize()) })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, &error))?;
        self.hash.update(bytes);
        self.position = self.position.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn check_whole(&self) -> Result<()> {
        if self.pending == 0 {
            return Ok(());
        }
        Err(Error::new(Code::Io, self.path.display())
            .found(format!("a tensor that lacks its last {} bytes", self.pending))
            .expected("every tensor in its announced length"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::read::hash_files;

    #[test]
    fn tensors_are_aligned_and_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.onnx_data");
        let mut seen = 0;
        let mut writer = ExternalWriter::create(&path, |count| seen += count).unwrap();
        assert_eq!(writer.append(&[1; 10]).unwrap(), Extent { offset: 0, length: 10 });
        assert_eq!(writer.append(&[2; 70]).unwrap(), Extent { offset: 64, length: 70 });
        assert_eq!(writer.append(&[]).unwrap(), Extent { offset: 192, length: 0 });
        assert_eq!(writer.begin(5000).unwrap(), Extent { offset: 4096, length: 5000 });
        writer.chunk(&[3; 4000]).unwrap();
        writer.chunk(&[4; 1000]).unwrap();
        let hash = writer.finish().unwrap();
        assert_eq!(seen, 5080);
        assert_eq!(hash, hash_files(&[&path]).unwrap()[0]);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len(), bytes[10], bytes[133], bytes[4096], bytes[9095]), (9096, 0, 2, 3, 4));
    }

    #[test]
    fn lengths_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ExternalWriter::create(&dir.path().join("d"), |_| ()).unwrap();
        writer.begin(4).unwrap();
        assert!(writer.chunk(&[0; 5]).is_err());
        writer.begin(4).unwrap_err();
        writer.chunk(&[0; 3]).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("last 1 bytes"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk() {
        let mut writer = ExternalWriter::create(Path::new("/dev/full"), |_| ()).unwrap();
        let error = writer.append(&vec![0; 4 << 20]).unwrap_err();
        assert_eq!(error.code, Code::Io);
        assert!(error.help.contains("disk space"), "{error}");
    }
}
