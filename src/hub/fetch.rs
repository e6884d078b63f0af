//! Files from the hub into the cache: several at once, each resumed, checked and only then linked into the snapshot.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::cache::{self, Place};
use super::client::{Check, Client, Failure, Listed, Remote, Revision};
use super::pace::Pace;
use super::select::{self, INDEX, SINGLE, Weights};
use super::{Settings, Watch};
use crate::error::{Code, Error, Result};

/// Bytes read between two looks at whether another file has failed.
const CHUNK: usize = 1 << 18;
/// No wait between two attempts is longer than this many times the first one.
const LONGEST_PAUSE: u32 = 32;

/// Downloads what is missing of a revision. The answer is its snapshot's directory.
pub(crate) fn snapshot(client: &Client, place: &Place, settings: &Settings, watch: &dyn Watch) -> Result<PathBuf> {
    let revision = patiently(client, settings, || client.revision())?;
    watch.say(&format!("{} at {}: into {}", client.id, revision.commit, place.folder().display()));
    let dir = place.snapshot(&revision.commit);
    let stopped = AtomicBool::new(false);
    let download = Download { client, place, settings, watch, revision: &revision, dir: &dir, stopped: &stopped };
    let subject = client.id.to_string();
    let names = revision.files.iter().map(|file| file.name.as_str());
    let weights = select::weights(&subject, names)?;
    let mut first: BTreeSet<&str> =
        revision.files.iter().map(|file| file.name.as_str()).filter(|name| select::is_wanted(name)).collect();
    // Small files come first: they may say that the rest is in vain, and only the index knows the shards.
    let rest = if weights == Weights::Indexed {
        first.insert(INDEX);
        download.files(&first)?;
        let index = dir.join(INDEX);
        let bytes = cache::small_file(&index).map_err(|error| Error::io(&index, &error))?;
        select::shards(&subject, &bytes)?
    } else {
        download.files(&first)?;
        match weights {
            Weights::Loose(names) => names.into_iter().collect(),
            _ => BTreeSet::from([SINGLE.to_owned()]),
        }
    };
    download.files(&rest.iter().map(String::as_str).collect())?;
    // Last, so that a branch never points at less than it did.
    place.remember(client.id.revision(), &revision.commit)?;
    Ok(dir)
}

/// Repeats a request whose failures may pass.
fn patiently<T>(client: &Client, settings: &Settings, mut request: impl FnMut() -> Result<T, Failure>) -> Result<T> {
    let mut failed = 0;
    loop {
        match request() {
            Ok(answer) => return Ok(answer),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing(why)) => {
                failed += 1;
                pause(client, settings, failed, &why)?;
            }
        }
    }
}

/// Waits after a failure, longer each time, and gives up after the last attempt.
fn pause(client: &Client, settings: &Settings, failed: u32, why: &str) -> Result<()> {
    crate::interrupt::check()?;
    tracing::debug!("{}: attempt {failed}: {why}", client.id);
    if failed >= settings.attempts {
        return Err(client.gave_up(why));
    }
    thread::sleep(settings.pause * 2_u32.saturating_pow(failed - 1).min(LONGEST_PAUSE));
    Ok(())
}

struct Download<'a> {
    client: &'a Client<'a>,
    place: &'a Place,
    settings: &'a Settings,
    watch: &'a dyn Watch,
    revision: &'a Revision,
    dir: &'a Path,
    stopped: &'a AtomicBool,
}

impl Download<'_> {
    /// Fetches files, several at once. The first error stops all.
    fn files(&self, names: &BTreeSet<&str>) -> Result<()> {
        let listed = names.iter().map(|name| {
            self.revision.files.iter().find(|file| file.name == **name).ok_or_else(|| self.not_listed(name))
        });
        let listed = listed.collect::<Result<Vec<_>>>()?;
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        thread::scope(|scope| {
            for _ in 0..self.settings.at_once.clamp(1, listed.len().max(1)) {
                scope.spawn(|| {
                    while let Some(file) = listed.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if self.stopped.load(Ordering::Relaxed) {
                            break;
                        }
                        if let Err(error) = self.file(file) {
                            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                            self.stopped.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn not_listed(&self, name: &str) -> Error {
        Error::new(Code::ShardMissing, format!("{}: {name}", self.client.id))
            .found("no such file at the revision")
            .expected(format!("every shard that {INDEX} names"))
            .help("the repository is not complete: choose another revision, or tell its owner")
    }

    /// Brings one file into the snapshot.
    fn file(&self, listed: &Listed) -> Result<()> {
        let remote = patiently(self.client, self.settings, || self.client.remote(&self.revision.commit, listed))?;
        self.watch.grow(remote.size);
        let pointer = self.dir.join(&remote.name);
        if has_size(&pointer, remote.size) {
            self.watch.advance(remote.size);
            return Ok(());
        }
        let _lock = self.place.lock(&remote.etag, &remote.name, self.watch)?;
        let blob = self.place.blob(&remote.etag);
        let fresh = !has_size(&blob, remote.size);
        if fresh {
            cache::create_parent(&blob)?;
            let part = self.checked(&remote, &blob)?;
            fs::rename(&part, &blob).map_err(|error| Error::io(&blob, &error))?;
        } else {
            self.watch.advance(remote.size);
        }
        self.place.link(&remote.etag, self.dir, &remote.name, fresh)
    }

    /// Fetches a file, and once more if it is not what the hub says.
    fn checked(&self, remote: &Remote, blob: &Path) -> Result<PathBuf> {
        let mut path = blob.as_os_str().to_owned();
        // The name that Python's library gives it: either goes on where the other one stopped.
        path.push(".incomplete");
        let path = PathBuf::from(path);
        let mut last = String::new();
        for _ in 0..2 {
            let mut part = Part::open(&path, remote, self.watch)?;
            self.fill(&mut part, remote)?;
            let Some(found) = part.finish(remote)? else { return Ok(path) };
            self.watch.retreat(remote.size);
            cache::remove(&path)?;
            self.watch.say(&format!("{}: {found}", remote.name));
            last = found;
        }
        let expected = match &remote.check {
            Check::Sha256(hash) => format!("sha256 {hash}"),
            Check::Git(hash) => format!("git's hash {hash}"),
            Check::Size => format!("{} bytes", remote.size),
        };
        Err(Error::new(Code::DownloadCorrupt, format!("{}: {}", self.client.id, remote.name))
            .found(format!("{last}, twice"))
            .expected(expected)
            .help("it was removed, and the next run fetches it again; if that fails too, check the proxy or mirror"))
    }

    /// Streams until the file has its size, with a new connection whenever one breaks.
    fn fill(&self, part: &mut Part, remote: &Remote) -> Result<()> {
        let mut failed = 0;
        let mut pace = Pace::new(&self.settings.clock);
        while part.length < remote.size {
            match self.stream(part, remote, &mut pace) {
                Ok(()) => {}
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(why)) => {
                    failed = if pace.failed() { 1 } else { failed + 1 };
                    pause(
                        self.client,
                        self.settings,
                        failed,
                        &format!("{} after {} of {} bytes: {why}", remote.name, part.length, remote.size),
                    )?;
                }
            }
        }
        Ok(())
    }

    fn stream(&self, part: &mut Part, remote: &Remote, pace: &mut Pace<'_>) -> Result<(), Failure> {
        let stream = self.client.stream(&self.revision.commit, &remote.name, part.length)?;
        if stream.start != part.length {
            self.watch.retreat(part.length);
            part.restart(remote)?;
        }
        let mut body = stream.body.into_reader();
        let mut buffer = vec![0; CHUNK];
        while part.length < remote.size {
            crate::interrupt::check()?;
            if self.stopped.load(Ordering::Relaxed) {
                // Another file's error is the one that is told.
                return Err(self.client.gave_up("stopped").into());
            }
            let count = body.read(&mut buffer).map_err(|error| Failure::Passing(error.to_string()))?;
            if count == 0 {
                return Err(Failure::Passing("the connection closed".to_owned()));
            }
            // What comes behind the end is no part of the file; its hash decides about the rest.
            let left = usize::try_from(remote.size - part.length).unwrap_or(usize::MAX);
            let bytes = buffer.get(..count.min(left)).unwrap_or_default();
            part.append(bytes)?;
            self.watch.advance(bytes.len() as u64);
            pace.advance(bytes.len() as u64).map_err(Failure::Passing)?;
        }
        Ok(())
    }
}

fn has_size(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|data| data.is_file() && data.len() == size)
}

/// A file that is not yet whole, and the hash of what is there.
struct Part {
    path: PathBuf,
    file: File,
    length: u64,
    hash: Hash,
}

enum Hash {
    Sha256(Sha256),
    Git(Sha1),
    None,
}

impl Hash {
    fn new(remote: &Remote) -> Self {
        match remote.check {
            Check::Sha256(_) => Self::Sha256(Sha256::new()),
            Check::Git(_) => Self::Git(Sha1::new_with_prefix(format!("blob {}\0", remote.size))),
            Check::Size => Self::None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
            Self::None => {}
        }
    }
}

impl Part {
    /// Opens what an earlier run left, or begins.
    fn open(path: &Path, remote: &Remote, watch: &dyn Watch) -> Result<Self> {
        let io = |error: std::io::Error| Error::io(path, &error);
        let file = File::options().read(true).append(true).create(true).open(path).map_err(io)?;
        let mut part = Self { path: path.to_owned(), file, length: 0, hash: Hash::new(remote) };
        if part.file.metadata().map_err(io)?.len() > remote.size {
            part.restart(remote)?;
        }
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = part.file.read(&mut buffer).map_err(io)?;
            if count == 0 {
                break;
            }
            part.hash.update(buffer.get(..count).unwrap_or_default());
            part.length += count as u64;
        }
        watch.advance(part.length);
        Ok(part)
    }

    fn restart(&mut self, remote: &Remote) -> Result<()> {
        self.file.set_len(0).map_err(|error| Error::io(&self.path, &error))?;
        (self.length, self.hash) = (0, Hash::new(remote));
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, &error))?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// What is wrong with the whole file, if something is.
    fn finish(self, remote: &Remote) -> Result<Option<String>> {
        self.file.sync_all().map_err(|error| Error::io(&self.path, &error))?;
        Ok(match (self.hash, &remote.check) {
            (Hash::Sha256(hash), Check::Sha256(expected)) => {
                let found = format!("{:x}", hash.finalize());
                (found != *expected).then(|| format!("sha256 {found}"))
            }
            (Hash::Git(hash), Check::Git(expected)) => {
                let found = format!("{:x}", hash.finalize());
                (found != *expected).then(|| format!("git's hash {found}"))
            }
            _ => None,
        })
    }
}
