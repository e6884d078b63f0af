//! Hashes of files: what a build was made from, and what it made.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::interrupt;
use crate::regular;

/// A file's name, size and hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileHash {
    /// File name without its directories.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256, in lower-case hexadecimal digits; none for a file that was not read as a whole.
    pub sha256: Option<String>,
}

/// Hashes files on all cores, each streamed. The answers stand in the order of the paths.
pub fn hash_files<P: AsRef<Path> + Sync>(paths: &[P]) -> Result<Vec<FileHash>> {
    let never = AtomicBool::new(false);
    paths.par_iter().map(|path| hash_file(path.as_ref(), &never)).collect()
}

/// The hash of a file that is still in memory.
pub(crate) fn hash_bytes(name: &str, bytes: &[u8]) -> FileHash {
    FileHash { name: name.to_owned(), size: bytes.len() as u64, sha256: Some(hex(&Sha256::digest(bytes))) }
}

/// Hashes a file from front to back; without an answer worth having once `stop` is set.
pub(crate) fn hash_file(path: &Path, stop: &AtomicBool) -> Result<FileHash> {
    let io = |error: std::io::Error| Error::io(path, &error);
    let (mut file, _) = regular::open(path).map_err(io)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size: u64 = 0;
    while !stop.load(Ordering::Relaxed) {
        interrupt::check()?;
        let count = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(io(error)),
        };
        hash.update(buffer.get(..count).unwrap_or_default());
        size = size.saturating_add(count as u64);
    }
    Ok(FileHash { name: file_name(path), size, sha256: Some(hex(&hash.finalize())) })
}

/// The last component of a path, as text.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(PathBuf::from(path).as_os_str()).to_string_lossy().into_owned()
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String can not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
