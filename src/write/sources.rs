//! Hashes of the checkpoint's files, from the bytes that come by on their way into the data files. What does not come
//! by, or not in the order of the file, is read for the hash alone.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use sha2::{Digest, Sha256};

use super::sink::Buffer;
use crate::error::{Code, Error, Result};
use crate::interrupt;
use crate::read::{Checkpoint, FileHash, hex};

/// Bytes that are read at a time.
const STEP: usize = 1 << 20;

/// Where in the checkpoint a build has come to.
#[derive(Debug)]
pub(super) struct Passed<'p> {
    /// Which of the checkpoint's files.
    pub(super) file: usize,
    /// Offset in that file.
    pub(super) offset: u64,
    /// What lies there, if it has been read as a whole.
    pub(super) bytes: Option<Arc<Buffer<'p>>>,
}

/// Takes what passes to the thread that hashes it.
pub(super) struct Sources<'p>(SyncSender<Passed<'p>>);

impl<'p> Sources<'p> {
    pub(super) fn pass(&self, passed: Passed<'p>) -> Result<()> {
        // The thread hangs up when it fails; `with_sources` says why.
        self.0.send(passed).map_err(|_| Error::new(Code::Io, "sources").found("they could not be hashed"))
    }
}

/// The checkpoint's files without their hashes.
pub(super) fn unhashed(checkpoint: &Checkpoint) -> Vec<FileHash> {
    let plain = |file: &crate::read::ShardFile| FileHash { name: file.name.clone(), size: file.size, sha256: None };
    checkpoint.files().iter().map(plain).collect()
}

/// Runs `produce`, which passes on what it reads (at most `queue` pieces wait), and then hashes what is left of the
/// checkpoint's files. An error of a source comes before one that it caused.
pub(super) fn with_sources<'p, T>(
    checkpoint: &Checkpoint,
    queue: usize,
    produce: impl FnOnce(&Sources<'p>) -> Result<T>,
) -> Result<(T, Vec<FileHash>)> {
    let unwanted = AtomicBool::new(false);
    thread::scope(|scope| {
        let (sender, passed) = sync_channel(queue);
        let hashing = scope.spawn(|| Hashing::new(checkpoint, &unwanted).run(passed));
        let produced = produce(&Sources(sender));
        unwanted.store(produced.is_err(), Ordering::Relaxed);
        let hashed = hashing.join().map_err(|_| Error::new(Code::Io, "sources").found("they could not be hashed"))?;
        match (produced, hashed) {
            (Ok(value), Ok(files)) => Ok((value, files)),
            (Err(error), Ok(_)) | (_, Err(error)) => Err(error),
        }
    })
}

struct Hashing<'c> {
    checkpoint: &'c Checkpoint,
    /// Set when nobody waits for the hashes any more.
    unwanted: &'c AtomicBool,
    hashes: Vec<FileHash>,
    /// The file that is being hashed, and how far.
    file: Option<usize>,
    position: u64,
    hash: Sha256,
    step: Vec<u8>,
}

impl<'c> Hashing<'c> {
    fn new(checkpoint: &'c Checkpoint, unwanted: &'c AtomicBool) -> Self {
        let hashes = unhashed(checkpoint);
        Self { checkpoint, unwanted, hashes, file: None, position: 0, hash: Sha256::new(), step: Vec::new() }
    }

    fn run(mut self, passed: Receiver<Passed<'_>>) -> Result<Vec<FileHash>> {
        for Passed { file, offset, bytes } in passed {
            if !self.enter(file)? {
                continue;
            }
            self.read_to(offset)?;
            let Some(bytes) = bytes else { continue };
            // A tensor that two initializers are made from comes by twice.
            let known = usize::try_from(self.position - offset).unwrap_or(usize::MAX);
            if let Some(new) = bytes.bytes.get(known..) {
                self.hash.update(new);
                self.position += new.len() as u64;
            }
        }
        for file in 0..self.hashes.len() {
            self.enter(file)?;
        }
        self.leave()?;
        Ok(self.hashes)
    }

    /// Turns to a file, which is over for the one before; false if it is over for this one as well.
    fn enter(&mut self, file: usize) -> Result<bool> {
        if self.file == Some(file) {
            return Ok(true);
        }
        self.leave()?;
        let open = self.hashes.get(file).is_some_and(|hash| hash.sha256.is_none());
        self.file = open.then_some(file);
        Ok(open)
    }

    /// Reads the rest of the file.
    fn leave(&mut self) -> Result<()> {
        let Some(size) = self.file.and_then(|file| self.hashes.get(file)).map(|hash| hash.size) else { return Ok(()) };
        self.read_to(size)?;
        let hash = std::mem::take(&mut self.hash);
        if let Some(slot) = self.file.take().and_then(|file| self.hashes.get_mut(file)) {
            slot.sha256 = Some(hex(&hash.finalize()));
        }
        self.position = 0;
        Ok(())
    }

    /// Reads what has not come by.
    fn read_to(&mut self, end: u64) -> Result<()> {
        let Range { mut start, end } = self.position..end;
        let Some(file) = self.file else { return Ok(()) };
        while start < end && !self.unwanted.load(Ordering::Relaxed) {
            interrupt::check()?;
            let length = usize::try_from(end - start).unwrap_or(usize::MAX).min(STEP);
            self.step.resize(length, 0);
            self.checkpoint.read_file(file, start, &mut self.step)?;
            self.hash.update(&self.step);
            start += length as u64;
        }
        self.position = self.position.max(end);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use proptest::prelude::*;

    use super::super::sink::Pool;
    use super::*;
    use crate::read::hash_files;

    /// Two files of one tensor each.
    fn checkpoint(dir: &std::path::Path) -> Checkpoint {
        for (name, length) in [("a", 3000_u16), ("b", 70)] {
            let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[{length}],"data_offsets":[0,{length}]}}}}"#);
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend((0..length).map(|i| (i % 251) as u8));
            std::fs::write(dir.join(format!("{name}.safetensors")), bytes).unwrap();
        }
        Checkpoint::open(dir).unwrap()
    }

    proptest! {
        /// Whatever comes by, in whatever order, once, twice or never.
        #[test]
        fn hashes_are_those_of_the_files(pieces in prop::collection::vec((0..2_usize, 0..3000_u64, 0..900_usize, any::<bool>()), 0..12)) {
            let dir = tempfile::tempdir().unwrap();
            let checkpoint = checkpoint(dir.path());
            let pool = Pool::new(2);
            let ((), hashes) = with_sources(&checkpoint, 2, |sources| {
                for (file, offset, length, with_bytes) in &pieces {
                    let size = checkpoint.files()[*file].size;
                    let offset = *offset.min(&size);
                    let mut buffer = pool.take((*length).min(usize::try_from(size - offset).unwrap()));
                    checkpoint.read_file(*file, offset, &mut buffer.bytes)?;
                    sources.pass(Passed { file: *file, offset, bytes: with_bytes.then(|| Arc::new(buffer)) })?;
                }
                Ok(())
            })
            .unwrap();
            let paths: Vec<_> = checkpoint.files().iter().map(|file| &file.path).collect();
            prop_assert_eq!(hashes, hash_files(&paths).unwrap());
        }
    }

    #[test]
    fn a_file_that_ends_early() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(dir.path());
        std::fs::OpenOptions::new().write(true).open(dir.path().join("b.safetensors")).unwrap().set_len(100).unwrap();
        let error = with_sources(&checkpoint, 2, |_| Ok(())).unwrap_err();
        assert_eq!(error.code, Code::WeightsCorrupt);
    }
}
