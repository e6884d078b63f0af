//! The cache's layout, which all of Hugging Face's tools share:
//! `models--org--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<file> -> blobs}`.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Watch;
use super::id::{Id, is_commit};
use super::select::{self, CONFIG, INDEX, SINGLE};
use crate::error::{Error, Result};
use crate::regular;

/// One model's part of the cache.
pub(crate) struct Place {
    folder: PathBuf,
    locks: PathBuf,
}

impl Place {
    pub(crate) fn new(cache: &Path, id: &Id) -> Self {
        let name = format!("models--{}", id.name().replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// The commit that a revision was when it was last asked for.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = regular::read_text(&self.folder.join("refs").join(revision), 1000).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Remembers which commit a branch or tag is.
    pub(crate) fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        create_parent(&path)?;
        fs::write(&path, commit).map_err(|error| Error::io(&path, &error))
    }

    /// Keeps other processes from the same blob while the answer lives; Python's library takes the same lock.
    pub(crate) fn lock(&self, etag: &str, name: &str, watch: &dyn Watch) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let file = File::options().create(true).append(true).open(&path).map_err(|error| Error::io(&path, &error))?;
        let locked = match file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => {
                watch.say(&format!("waiting for {name}, which another process downloads"));
                file.lock()
            }
            Err(TryLockError::Error(error)) => Err(error),
        };
        match locked {
            // Some network file systems have no locks; then the last one to rename wins, with the same content.
            Err(error) if error.kind() != io::ErrorKind::Unsupported => Err(Error::io(&path, &error)),
            _ => Ok(file),
        }
    }

    /// Puts a blob into a snapshot: by a relative link, or where links are not allowed (Windows without developer
    /// mode) by moving a fresh blob there and copying one that other snapshots may use.
    pub(crate) fn link(&self, etag: &str, snapshot: &Path, name: &str, fresh: bool) -> Result<()> {
        let pointer = snapshot.join(name);
        create_parent(&pointer)?;
        remove(&pointer)?;
        let up = "../".repeat(2 + name.split('/').count() - 1);
        let blob = self.blob(etag);
        symlink(Path::new(&format!("{up}blobs/{etag}")), &pointer)
            .or_else(|_| if fresh { fs::rename(&blob, &pointer) } else { fs::copy(&blob, &pointer).map(drop) })
            .map_err(|error| Error::io(&pointer, &error))
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target.to_string_lossy().replace('/', "\\"), link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Creates the folder that a file will lie in.
pub(crate) fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))
}

/// Removes a file or link, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path, &error)),
        _ => Ok(()),
    }
}

/// The content of a file of bounded size.
pub(crate) fn small_file(path: &Path) -> io::Result<Vec<u8>> {
    regular::read(path, regular::INDEX)
}

/// How much of a model a snapshot holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Configuration and weights, and perhaps a tokenizer.
    Complete {
        /// True if a file of a tokenizer is there.
        tokenizer: bool,
    },
    /// These are missing; nothing is there at all if none is named.
    Incomplete(Vec<String>),
}

impl State {
    pub(crate) fn absent() -> Self {
        Self::Incomplete(Vec::new())
    }

    /// Looks at a snapshot. A link whose blob is not there counts as missing.
    pub(crate) fn of(dir: &Path) -> Self {
        let Ok(entries) = fs::read_dir(dir) else { return Self::absent() };
        let names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        let is_there = |name: &str| dir.join(name).is_file();
        let mut missing = Vec::new();
        if !is_there(CONFIG) {
            missing.push(CONFIG.to_owned());
        }
        let listed = |name: &str| names.iter().any(|other| other == name);
        if listed(SINGLE) || !listed(INDEX) {
            let loose = select::loose(names.iter().map(String::as_str));
            let weights = if listed(SINGLE) || loose.is_empty() { vec![SINGLE.to_owned()] } else { loose };
            missing.extend(weights.into_iter().filter(|name| !is_there(name)));
            // Numbered shards without their index: nobody knows whether they are all.
            if !listed(SINGLE) && names.iter().any(|name| name.contains("-of-") && name.ends_with(".safetensors")) {
                missing.push(INDEX.to_owned());
            }
        } else {
            match small_file(&dir.join(INDEX)).ok().and_then(|bytes| select::shards("", &bytes).ok()) {
                Some(shards) => missing.extend(shards.into_iter().filter(|name| !is_there(name))),
                None => missing.push(INDEX.to_owned()),
            }
        }
        if missing.is_empty() {
            Self::Complete { tokenizer: names.iter().any(|name| select::is_tokenizer(name) && is_there(name)) }
        } else {
            Self::Incomplete(missing)
        }
    }
}

/// Which model of the hub a directory is a snapshot of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Source {
    /// `org/name`.
    pub repository: String,
    /// The commit, in hexadecimal digits.
    pub commit: String,
}

/// The model and commit, if a directory is a snapshot in a cache: its path says both.
pub fn source(dir: &Path) -> Option<Source> {
    let dir = dir.canonicalize().ok()?;
    let commit = dir.file_name()?.to_str().filter(|name| is_commit(name))?;
    let snapshots = dir.parent().filter(|parent| parent.ends_with("snapshots"))?;
    let name = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    Some(Source { repository: name.replacen("--", "/", 1), commit: commit.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_complete_with_every_shard() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let missing = |names: &[&str]| State::Incomplete(names.iter().map(ToString::to_string).collect());
        assert_eq!(State::of(&dir.path().join("none")), State::absent());
        assert_eq!(State::of(dir.path()), missing(&[CONFIG, SINGLE]));
        put(CONFIG, "{}");
        put("model-1-of-2.safetensors", "");
        assert_eq!(State::of(dir.path()), missing(&[INDEX]));
        put(INDEX, r#"{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}"#);
        assert_eq!(State::of(dir.path()), missing(&["model-2-of-2.safetensors"]));
        put("model-2-of-2.safetensors", "");
        assert_eq!(State::of(dir.path()), State::Complete { tokenizer: false });
        put("tokenizer.json", "{}");
        assert_eq!(State::of(dir.path()), State::Complete { tokenizer: true });
        put(SINGLE, "");
        assert_eq!(State::of(dir.path()), State::Complete { tokenizer: true });
    }

    #[test]
    fn a_snapshots_path_says_what_it_is() {
        let cache = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let dir = cache.path().join("models--org--name").join("snapshots").join(commit);
        fs::create_dir_all(&dir).unwrap();
        let expected = Source { repository: "org/name".to_owned(), commit: commit.to_owned() };
        assert_eq!(source(&dir), Some(expected));
        assert_eq!(source(cache.path()), None);
    }
}
