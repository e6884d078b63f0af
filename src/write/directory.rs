//! An output directory that appears whole or not at all.
//!
//! It is built under `.{name}.hf2onnx-partial-{random}` beside its final place and renamed when it is
//! complete. A locked file `….lock` says that its builder lives: the system drops the lock when the
//! process ends, however it ends, and the next build of the same output removes what was left.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Code, Error, Result};
use crate::interrupt::{self, Ending};
use crate::read::hash_bytes;

/// Whether an existing output may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// An output that exists is an error.
    No,
    /// An empty directory, and one that hf2onnx wrote, may be replaced.
    Yes,
}

/// A directory under construction. Dropped without [`Staging::commit`], it is removed.
#[derive(Debug)]
pub struct Staging {
    output: PathBuf,
    path: PathBuf,
    force: Force,
    /// Removed last, after the directory is gone or renamed.
    _lock: NamedTempFile,
    _parents: Parents,
    /// What a program that is ended meanwhile does with all of it.
    ending: Option<Ending>,
}

const MARK: &str = ".hf2onnx-partial-";
const LOCK: &str = ".lock";
const OLD: &str = ".old";

impl Staging {
    /// Starts an output directory, and removes what dead builds of the same output left behind.
    pub fn new(output: &Path, force: Force) -> Result<Self> {
        let output = resolve(output)?;
        let (Some(name), Some(parent)) = (output.file_name(), output.parent()) else {
            return Err(Error::new(Code::UsageInvalid, output.display())
                .found("a path without a name")
                .expected("an output directory that can be made")
                .help("give a path such as out/my-model"));
        };
        let prefix: OsString = [OsStr::new("."), &short(name), OsStr::new(MARK)].iter().copied().collect();
        remove_leftovers(parent, &prefix, &output);
        check_replaceable(&output, force)?;
        let unusable = |error: &Error| {
            let found = format!("{}: {}", parent.display(), error.found);
            Error::new(Code::Io, output.display())
                .found(found)
                .expected("an output in a directory where files can be made")
                .help("choose another --output, or check the permissions")
        };
        let parents = Parents::create(parent).map_err(|error| unusable(&error))?;
        let lock = make_lock(parent, &prefix).map_err(|error| unusable(&error))?;
        // `…-abc.lock` belongs to `…-abc`.
        let path = lock.path().with_extension("");
        fs::create_dir(&path).map_err(|error| unusable(&Error::io(&path, &error)))?;
        let ending = Some(end(&path, lock.path(), parents.0.clone()));
        Ok(Self { output, path, force, _lock: lock, _parents: parents, ending })
    }

    /// Where to write: a directory that exists and is empty at first.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the directory in its place. Everything is on the disk before it appears there.
    ///
    /// # Errors
    /// The output exists and may not be replaced, the disk refuses, or the user asked for an end.
    pub fn commit(mut self) -> Result<()> {
        settle(&self.path)?;
        interrupt::check()?;
        // From here on nobody may remove it: it may be the output already.
        drop(self.ending.take());
        check_replaceable(&self.output, self.force)?;
        let io = |error: std::io::Error| Error::io(&self.output, &error);
        if self.output.symlink_metadata().is_ok() {
            if exchange(&self.path, &self.output) {
                // What was replaced goes with the staging directory's name.
                return sync_parent(&self.output);
            }
            let aside = with_suffix(&self.path, OLD);
            fs::rename(&self.output, &aside).map_err(io)?;
            if let Err(error) = fs::rename(&self.path, &self.output) {
                let _ = fs::rename(&aside, &self.output);
                return Err(io(error));
            }
            if let Err(error) = fs::remove_dir_all(&aside) {
                tracing::warn!("the replaced output stays in {}: {error}", aside.display());
            }
        } else {
            fs::rename(&self.path, &self.output).map_err(io)?;
        }
        sync_parent(&self.output)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a commit there is nothing under this name, or what was replaced.
        if let Err(error) = fs::remove_dir_all(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("{} could not be removed: {error}", self.path.display());
        }
    }
}

/// A name from which names for what lies beside it can be made: file systems end them at 255 bytes, some at less. One
/// that is cut short keeps its hash, so that no two outputs share theirs.
fn short(name: &OsStr) -> OsString {
    const LONGEST: usize = 120;
    let text = name.to_string_lossy();
    if name.len() <= LONGEST {
        return name.to_owned();
    }
    let within = |bytes: &mut usize, letter: char| {
        *bytes += letter.len_utf8();
        (*bytes <= LONGEST - 17).then_some(letter)
    };
    let start: String = text.chars().scan(0, within).collect();
    let hash = hash_bytes("", name.as_encoded_bytes()).sha256.unwrap_or_default();
    format!("{start}-{}", hash.get(..16).unwrap_or_default()).into()
}

/// Removes all that a build has made when the program is ended meanwhile.
fn end(path: &Path, lock: &Path, parents: Vec<PathBuf>) -> Ending {
    let (path, lock) = (path.to_owned(), lock.to_owned());
    interrupt::at_end(move || {
        interrupt::remove(&path);
        // What is left is in nobody's way: the next build of the same output removes it.
        let _ = fs::remove_file(&lock);
        drop(Parents(parents));
    })
}

/// Directories made above the output; dropped, those that are still empty go again.
#[derive(Debug)]
struct Parents(Vec<PathBuf>);

impl Parents {
    fn create(parent: &Path) -> Result<Self> {
        let mut made = Self(Vec::new());
        let absent: Vec<_> = parent.ancestors().take_while(|path| !path.exists()).collect();
        for path in absent.into_iter().rev().filter(|path| !path.as_os_str().is_empty()) {
            match fs::create_dir(path) {
                Ok(()) => made.0.push(path.to_owned()),
                // Another build was faster.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(path, &error)),
            }
        }
        Ok(made)
    }
}

impl Drop for Parents {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            // Fails, as it should, when the output or anything else lies in it.
            let _ = fs::remove_dir(path);
        }
    }
}

/// The output's path, absolute, so that a later change of the working directory does not matter. A
/// link to a directory means that directory: renaming over the link would lose it.
fn resolve(output: &Path) -> Result<PathBuf> {
    let io = |error: std::io::Error| Error::io(output, &error);
    match output.symlink_metadata() {
        Ok(_) => dunce::canonicalize(output).map_err(io),
        // Told before anything is computed, not when the output gets its name.
        Err(error) if error.kind() == ErrorKind::InvalidFilename => {
            Err(Error::new(Code::UsageInvalid, output.display())
                .found(error)
                .expected("names that the file system takes, of 255 bytes at most on most")
                .help("choose a shorter --output"))
        }
        Err(error) if error.kind() == ErrorKind::NotADirectory => Err(Error::new(Code::Io, output.display())
            .found("a file where a directory would have to be")
            .expected("a path where a directory can be made")
            .help("choose another --output")),
        Err(_) => std::path::absolute(output).map_err(io),
    }
}

fn check_replaceable(output: &Path, force: Force) -> Result<()> {
    let error = || Error::new(Code::OutputExists, output.display());
    let Ok(metadata) = output.symlink_metadata() else {
        return Ok(());
    };
    if !metadata.is_dir() {
        return Err(error()
            .found("a file")
            .expected("a path where a directory can be made")
            .help("choose another --output"));
    }
    if force == Force::No {
        let expected = "a path where nothing is yet";
        return Err(error()
            .found("it exists")
            .expected(expected)
            .help("choose another --output, or replace it with --force"));
    }
    let empty = fs::read_dir(output).map_err(|error| Error::io(output, &error))?.next().is_none();
    if empty || output.join("hf2onnx.json").is_file() {
        return Ok(());
    }
    Err(error()
        .found("a directory that holds other files and no hf2onnx.json")
        .expected("an output of hf2onnx, or an empty directory: --force replaces nothing else")
        .help("choose another --output, or remove the directory yourself"))
}

/// Makes the locked file that says that this build lives.
fn make_lock(parent: &Path, prefix: &OsStr) -> Result<NamedTempFile> {
    let io = |error: std::io::Error| Error::io(parent, &error);
    for _ in 0..16 {
        let mut lock = tempfile::Builder::new().prefix(prefix).suffix(LOCK).tempfile_in(parent).map_err(io)?;
        match lock.as_file().try_lock() {
            // Another build took the new file for a left-over one and is about to remove it.
            Err(TryLockError::WouldBlock) => continue,
            // A file system without locks: this build's directory is never seen as left over.
            Err(TryLockError::Error(error)) => tracing::debug!("no file locks: {error}"),
            // It may have been removed before it was locked.
            Ok(()) if !lock.path().exists() => continue,
            Ok(()) => {}
        }
        // For people who wonder whose it is.
        writeln!(lock, "{}", std::process::id()).map_err(io)?;
        return Ok(lock);
    }
    Err(Error::new(Code::Io, parent.display())
        .found("other builds of the same output start and end all the time")
        .help("build to another --output"))
}

/// Removes the directories of builds that did not end by themselves. Nothing here is an error: what
/// can not be removed is in nobody's way.
fn remove_leftovers(parent: &Path, prefix: &OsStr, output: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    let mut builds = BTreeSet::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            let mut path = entry.path();
            if path.extension().is_some_and(|end| end == "lock" || end == "old") {
                path.set_extension("");
            }
            builds.insert(path);
        }
    }
    for build in builds {
        remove_leftover(&build, output);
    }
}

fn remove_leftover(build: &Path, output: &Path) {
    let lock_path = with_suffix(build, LOCK);
    // Held until the build is removed. A build without this file has ended: it is made first and
    // removed last.
    let lock = match OpenOptions::new().read(true).write(true).open(&lock_path) {
        Ok(lock) => Some(lock),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(_) => return,
    };
    if lock.as_ref().is_some_and(|lock| lock.try_lock().is_err()) {
        return;
    }
    tracing::info!("removing {}, left by a build that was interrupted", build.display());
    let old = with_suffix(build, OLD);
    if old.is_dir() && output.symlink_metadata().is_err() {
        // Interrupted between the two renames: the output from before is still whole.
        let _ = fs::rename(&old, output);
    }
    let _ = fs::remove_dir_all(&old);
    let _ = fs::remove_dir_all(build);
    // Windows removes no file that is open, and a lock file alone is harmless.
    let _ = fs::remove_file(&lock_path);
    drop(lock);
    let _ = fs::remove_file(&lock_path);
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    PathBuf::from(path)
}

/// Gives everything its mode and waits until it is on the disk.
fn settle(directory: &Path) -> Result<()> {
    let io = |path: &Path, error: std::io::Error| Error::io(path, &error);
    for entry in fs::read_dir(directory).map_err(|error| io(directory, error))? {
        let path = entry.map_err(|error| io(directory, error))?.path();
        let metadata = path.symlink_metadata().map_err(|error| io(&path, error))?;
        if metadata.is_dir() {
            settle(&path)?;
        } else if metadata.is_file() && !is_shared(&metadata) {
            set_mode(&path, 0o644)?;
            // Windows flushes only what is open for writing.
            let file = OpenOptions::new().read(true).write(cfg!(windows)).open(&path);
            file.and_then(|file| file.sync_all()).map_err(|error| io(&path, error))?;
        }
    }
    set_mode(directory, 0o755)?;
    sync_directory(directory)
}

/// True for a hard link to a file that is not ours, whose mode is its owner's business.
#[cfg(unix)]
fn is_shared(metadata: &fs::Metadata) -> bool {
    std::os::unix::fs::MetadataExt::nlink(metadata) > 1
}

#[cfg(not(unix))]
fn is_shared(_: &fs::Metadata) -> bool {
    false
}

#[cfg(unix)]
fn set_mode(path: &Path, mode: u32) -> Result<()> {
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::set_permissions(path, permissions).map_err(|error| Error::io(path, &error))
}

#[cfg(not(unix))]
#[allow(clippy::unnecessary_wraps)] // as on Unix
fn set_mode(_: &Path, _: u32) -> Result<()> {
    Ok(())
}

/// Exchanges two directories in one step. False where the system has no such call; then nothing has changed.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(a: &Path, b: &Path) -> bool {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok()
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> bool {
    false
}

fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), sync_directory)
}

/// Makes the names in a directory last. Windows has no such call, and needs none.
fn sync_directory(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path).and_then(|file| file.sync_all()).map_err(|error| Error::io(path, &error))?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
