//! Files mapped into memory: the one module with `unsafe`, because mapping has no safe interface.
#![allow(unsafe_code)]

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

use memmap2::Mmap;

use crate::error::{Code, Error, Result};

/// A file that is mapped when its bytes are first asked for.
#[derive(Debug)]
pub(crate) struct LazyMap {
    path: PathBuf,
    size: u64,
    modified: Option<SystemTime>,
    map: OnceLock<Mmap>,
}

impl LazyMap {
    /// Remembers what the file was when its header was read.
    pub(crate) fn new(path: &Path, metadata: &Metadata) -> Self {
        Self { path: path.to_owned(), size: metadata.len(), modified: metadata.modified().ok(), map: OnceLock::new() }
    }

    /// The bytes at `offset..offset + length`.
    pub(crate) fn slice(&self, offset: u64, length: u64) -> Result<&[u8]> {
        if length == 0 {
            return Ok(&[]);
        }
        let map = self.mapped()?;
        let range =
            usize::try_from(offset).ok().zip(offset.checked_add(length).and_then(|end| usize::try_from(end).ok()));
        range
            .and_then(|(start, end)| map.get(start..end))
            .ok_or_else(|| self.changed(format!("{} bytes are mapped", map.len())))
    }

    /// Tells the system that these pages are not needed soon. Memory falls; the bytes stay readable.
    pub(crate) fn release(&self, offset: u64, length: u64) {
        #[cfg(unix)]
        if let (Some(map), Ok(offset), Ok(length)) = (self.map.get(), usize::try_from(offset), usize::try_from(length))
            && length > 0
            && offset.checked_add(length).is_some_and(|end| end <= map.len())
        {
            // SAFETY: on a read-only mapping of a file, dropped pages are read again from that
            // same file, so no slice that is still borrowed can see other bytes. Failure is
            // harmless: the pages stay.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, length) };
        }
        #[cfg(not(unix))]
        let _ = (offset, length);
    }

    fn mapped(&self) -> Result<&Mmap> {
        // Asked every time: touching a page behind the end of a file that was cut short would end
        // the process with SIGBUS instead of an error.
        self.check_unchanged()?;
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let file = File::open(&self.path).map_err(|error| Error::io(&self.path, &error))?;
        // SAFETY: the mapping is read-only and never handed out as mutable. Its bytes can change
        // under us only if another process writes to the checkpoint; `check_unchanged` refuses
        // what it can see of that, and weights are plain numbers, valid whatever their bits are.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(&self.path, &error))?;
        Ok(self.map.get_or_init(|| map))
    }

    fn check_unchanged(&self) -> Result<()> {
        let now = std::fs::metadata(&self.path).map_err(|error| Error::io(&self.path, &error))?;
        if now.len() != self.size {
            return Err(self.changed(format!("{} bytes", now.len())));
        }
        if now.modified().ok() != self.modified {
            return Err(self.changed("a later modification time"));
        }
        Ok(())
    }

    fn changed(&self, found: impl std::fmt::Display) -> Error {
        Error::new(Code::WeightsCorrupt, self.path.display())
            .found(format!("the file changed while it was being read: {found}"))
            .expected(format!("the {} bytes that were there at the start", self.size))
            .help("wait until nothing writes to the repository (a download?) and run again")
    }
}
