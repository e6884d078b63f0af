//! Files that are read at positions, from many threads, and never mapped: a file that is cut short while it is read
//! is an error, where touching a mapped page behind its new end would end the process (SIGBUS).

use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::error::{Code, Error, Result};
use crate::regular;

/// Files that are held open at once: a checkpoint may have more shards than a process may open files, of which some
/// systems allow 256.
const HELD: usize = 64;

/// The files of a checkpoint that were read last, open.
#[derive(Debug, Default)]
pub(crate) struct Handles(Mutex<VecDeque<(PathBuf, Arc<File>)>>);

impl Handles {
    /// The file of this path, opened by `open` if it is not held.
    fn get(&self, path: &Path, open: impl FnOnce() -> Result<File>) -> Result<Arc<File>> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = held.iter().position(|(held, _)| held == path)
            && let Some(found) = held.remove(at)
        {
            let file = Arc::clone(&found.1);
            held.push_front(found);
            return Ok(file);
        }
        let file = Arc::new(open()?);
        held.truncate(HELD - 1);
        held.push_front((path.to_owned(), Arc::clone(&file)));
        Ok(file)
    }
}

/// A file that has to stay what it was when it was first seen.
#[derive(Debug)]
pub(crate) struct StableFile {
    path: PathBuf,
    size: u64,
    modified: Option<SystemTime>,
    handles: Arc<Handles>,
}

impl StableFile {
    /// Remembers what the file was when its header was read. It is opened when bytes are first asked for.
    pub(crate) fn new(path: &Path, metadata: &Metadata, handles: &Arc<Handles>) -> Self {
        let (path, handles) = (path.to_owned(), Arc::clone(handles));
        Self { path, size: metadata.len(), modified: metadata.modified().ok(), handles }
    }

    /// Reads the bytes from `offset` on until `out` is full.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        read_exact_at(&*self.open()?, offset, out).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                self.changed(format!("it ends before byte {}", offset + out.len() as u64))
            }
            _ => Error::io(&self.path, &error),
        })
    }

    /// Tells the system that these bytes will be read soon, where it takes such advice. They may lie behind the end.
    #[cfg_attr(
        not(any(target_os = "linux", target_os = "android")),
        expect(clippy::unused_self, reason = "elsewhere there is nobody to tell")
    )]
    pub(crate) fn will_need(&self, offset: u64, length: u64) {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        self.advise(offset, length, rustix::fs::Advice::WillNeed);
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let _ = (offset, length);
    }

    /// Tells the system that it need not keep these bytes in memory: what is written meanwhile wants the room.
    #[cfg_attr(
        not(any(target_os = "linux", target_os = "android")),
        expect(clippy::unused_self, reason = "elsewhere there is nobody to tell")
    )]
    pub(crate) fn will_not_need(&self, offset: u64, length: u64) {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        self.advise(offset, length, rustix::fs::Advice::DontNeed);
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let _ = (offset, length);
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn advise(&self, offset: u64, length: u64, advice: rustix::fs::Advice) {
        if let Ok(file) = self.open() {
            // It is only advice: the same bytes are read without it.
            let _ = rustix::fs::fadvise(&*file, offset, std::num::NonZeroU64::new(length), advice);
        }
    }

    /// An error if the file is no longer what it was, as far as its size and modification time tell.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let now = std::fs::metadata(&self.path).map_err(|error| Error::io(&self.path, &error))?;
        if now.len() != self.size {
            return Err(self.changed(format!("{} bytes", now.len())));
        }
        if now.modified().ok() != self.modified {
            return Err(self.changed("a later modification time"));
        }
        Ok(())
    }

    fn open(&self) -> Result<Arc<File>> {
        self.handles.get(&self.path, || {
            self.check_unchanged()?;
            let (file, _) = regular::open(&self.path).map_err(|error| Error::io(&self.path, &error))?;
            Ok(file)
        })
    }

    fn changed(&self, found: impl std::fmt::Display) -> Error {
        Error::new(Code::WeightsCorrupt, self.path.display())
            .found(format!("the file changed while it was being read: {found}"))
            .expected(format!("the {} bytes that were there at the start", self.size))
            .help("wait until nothing writes to the repository (a download?) and run again")
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                out = out.get_mut(count..).unwrap_or_default();
                offset += count as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_files_are_open_than_may_be() {
        let dir = tempfile::tempdir().unwrap();
        let handles = Arc::new(Handles::default());
        let files: Vec<StableFile> = (0..4 * HELD)
            .map(|index| {
                let path = dir.path().join(index.to_string());
                std::fs::write(&path, index.to_string()).unwrap();
                StableFile::new(&path, &path.metadata().unwrap(), &handles)
            })
            .collect();
        let opened = std::cell::Cell::new(0);
        let read = |index: usize| {
            let before = handles.0.lock().unwrap().iter().any(|(path, _)| *path == files[index].path);
            opened.set(opened.get() + usize::from(!before));
            let mut bytes = vec![0; index.to_string().len()];
            files[index].read(0, &mut bytes).unwrap();
            assert_eq!(bytes, index.to_string().as_bytes());
            assert!(handles.0.lock().unwrap().len() <= HELD);
        };
        (0..files.len()).for_each(read);
        assert_eq!(opened.get(), files.len());
        // Those that were read last are still open, the first one is not.
        (files.len() - HELD..files.len()).for_each(read);
        assert_eq!(opened.get(), files.len());
        read(0);
        assert_eq!(opened.get(), files.len() + 1);
    }
}
