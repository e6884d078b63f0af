//! Data files: written front to back by one thread, and hashed on the way by another.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};

use sha2::{Digest, Sha256};

use crate::error::{Code, Error, Result};
use crate::read::{FileHash, file_name, hex};

/// Buffers that are used again: fresh memory costs a page fault for every 4 KiB. The one that was given back first is
/// taken first, so memory is that of all of them, however fast the disk is.
#[derive(Debug)]
pub(super) struct Pool(Mutex<VecDeque<Vec<u8>>>);

impl Pool {
    /// A pool that grows beyond `count` buffers only when all of them are in use.
    pub(super) fn new(count: usize) -> Self {
        Self(Mutex::new(vec![Vec::new(); count].into()))
    }

    /// A buffer of this many bytes, whatever they are.
    pub(super) fn take(&self, length: usize) -> Buffer<'_> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front().unwrap_or_default();
        bytes.resize(length, 0);
        Buffer { bytes, pool: self }
    }
}

/// Bytes from a pool, which go back there.
#[derive(Debug)]
pub(super) struct Buffer<'p> {
    pub(super) bytes: Vec<u8>,
    pool: &'p Pool,
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(std::mem::take(&mut self.bytes));
    }
}

/// What the threads are told, in the order of the bytes.
#[derive(Debug, Clone)]
enum Piece<'p> {
    Zeros(u64),
    Bytes(Arc<Buffer<'p>>),
    EndOfFile,
}

/// Takes the bytes of one data file after the other.
pub(super) struct Sink<'s, 'p> {
    writer: SyncSender<Piece<'p>>,
    hasher: SyncSender<Piece<'p>>,
    written: ScopedJoinHandle<'s, Result<()>>,
    hashed: ScopedJoinHandle<'s, Vec<FileHash>>,
    position: u64,
}

impl<'s, 'p: 's> Sink<'s, 'p> {
    /// Starts the threads. `queue` is how many chunks may wait for each of them.
    pub(super) fn start(scope: &'s Scope<'s, '_>, paths: Vec<PathBuf>, queue: usize) -> Self {
        let names: Vec<String> = paths.iter().map(|path| file_name(path)).collect();
        let (writer, to_write) = sync_channel(queue);
        let (hasher, to_hash) = sync_channel(queue);
        let written = scope.spawn(move || write(&paths, &to_write));
        let hashed = scope.spawn(move || hash(names, &to_hash));
        Self { writer, hasher, written, hashed, position: 0 }
    }
}

impl<'p> Sink<'_, 'p> {
    /// The next bytes of the file, which start at `offset`: zeros fill what lies before.
    pub(super) fn put(&mut self, offset: u64, bytes: Arc<Buffer<'p>>) -> Result<()> {
        let gap = offset.checked_sub(self.position).ok_or_else(|| {
            Error::new(Code::SpecInvalid, "layout").found("a tensor that starts within the one before it")
        })?;
        if gap > 0 {
            self.send(&Piece::Zeros(gap))?;
        }
        self.position = offset.saturating_add(bytes.bytes.len() as u64);
        self.send(&Piece::Bytes(bytes))
    }

    /// Ends the file.
    pub(super) fn end(&mut self) -> Result<()> {
        self.position = 0;
        self.send(&Piece::EndOfFile)
    }

    /// Waits until everything is written. Name, size and hash of each file are the answer.
    pub(super) fn finish(self) -> Result<Vec<FileHash>> {
        drop((self.writer, self.hasher));
        let gone = |_| Error::new(Code::Io, "weights").found("a thread that writes them ended early");
        self.written.join().map_err(gone)??;
        self.hashed.join().map_err(gone)
    }

    fn send(&self, piece: &Piece<'p>) -> Result<()> {
        // The writer hangs up when it fails; `finish` says why.
        let stopped = |_| Error::new(Code::Io, "weights").found("the data file can not be written");
        self.writer.send(piece.clone()).map_err(stopped)?;
        self.hasher.send(piece.clone()).map_err(stopped)
    }
}

fn write(paths: &[PathBuf], pieces: &Receiver<Piece>) -> Result<()> {
    for path in paths {
        write_file(path, pieces).map_err(|error| Error::io(path, &error))?;
    }
    Ok(())
}

fn write_file(path: &Path, pieces: &Receiver<Piece>) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    for piece in pieces {
        match piece {
            Piece::Zeros(count) => zeros(count, |zeros| file.write_all(zeros))?,
            Piece::Bytes(chunk) => file.write_all(&chunk.bytes)?,
            Piece::EndOfFile => break,
        }
    }
    // What is not on the disk yet is waited for when the directory is put in its place.
    Ok(())
}

fn hash(names: Vec<String>, pieces: &Receiver<Piece>) -> Vec<FileHash> {
    let one = |name: String| {
        let (mut hash, mut size) = (Sha256::new(), 0);
        for piece in pieces {
            match piece {
                Piece::Zeros(count) => {
                    size += count;
                    let _ = zeros(count, |zeros| {
                        hash.update(zeros);
                        Ok(())
                    });
                }
                Piece::Bytes(chunk) => {
                    size += chunk.bytes.len() as u64;
                    hash.update(&chunk.bytes);
                }
                Piece::EndOfFile => break,
            }
        }
        FileHash { name, size, sha256: Some(hex(&hash.finalize())) }
    };
    names.into_iter().map(one).collect()
}

/// Gaps are smaller than a page.
fn zeros(mut count: u64, mut put: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    while count > 0 {
        let now = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROS.len());
        put(ZEROS.get(..now).unwrap_or_default())?;
        count -= now as u64;
    }
    Ok(())
}

/// Runs `produce` with a sink for these files. An error of the disk comes before one that it caused.
pub(super) fn with_sink<'p, T>(
    paths: Vec<PathBuf>,
    queue: usize,
    produce: impl FnOnce(&mut Sink<'_, 'p>) -> Result<T>,
) -> Result<(T, Vec<FileHash>)> {
    thread::scope(|scope| {
        let mut sink = Sink::start(scope, paths, queue);
        let produced = produce(&mut sink);
        let finished = sink.finish();
        match (produced, finished) {
            (Ok(value), Ok(files)) => Ok((value, files)),
            (Err(error), Ok(_)) | (_, Err(error)) => Err(error),
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::read::hash_files;

    #[test]
    fn gaps_are_zeros_and_files_are_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let paths = vec![dir.path().join("a"), dir.path().join("a_1")];
        let pool = Pool::new(2);
        let filled = |length, value| {
            let mut buffer = pool.take(length);
            buffer.bytes.fill(value);
            Arc::new(buffer)
        };
        let ((), files) = with_sink(paths.clone(), 2, |sink| {
            sink.put(0, filled(10, 1))?;
            sink.put(64, filled(70, 2))?;
            sink.put(9000, filled(5, 3))?;
            sink.end()?;
            sink.put(0, filled(3, 4))?;
            sink.end()
        })
        .unwrap();
        assert_eq!(files, hash_files(&paths).unwrap());
        let bytes = std::fs::read(&paths[0]).unwrap();
        assert_eq!((bytes.len(), bytes[10], bytes[63], bytes[64], bytes[133], bytes[9004]), (9005, 0, 0, 2, 2, 3));
        assert_eq!(std::fs::read(&paths[1]).unwrap(), [4; 3]);
    }

    #[test]
    fn tensors_do_not_overlap() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Pool::new(2);
        let error = with_sink(vec![dir.path().join("a")], 2, |sink| {
            sink.put(0, Arc::new(pool.take(10)))?;
            sink.put(9, Arc::new(pool.take(1)))
        });
        assert_eq!(error.unwrap_err().code, Code::SpecInvalid);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk() {
        let pool = Pool::new(2);
        let error = with_sink(vec!["/dev/full".into()], 1, |sink| {
            (0..100).try_for_each(|i| sink.put(i << 20, Arc::new(pool.take(1 << 20))))
        });
        let error = error.unwrap_err();
        assert_eq!(error.code, Code::Io);
        assert!(error.help.contains("disk space"), "{error}");
    }
}
