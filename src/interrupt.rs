//! Ctrl-C, SIGTERM and their like: the first one asks for an end, the second one is the end.
//!
//! Work that leaves something behind calls [`check`] often (once for each chunk that it writes, or step that it runs)
//! and returns the error, so that what it holds is dropped and cleans up behind itself. Work that waits for others (a
//! server, a program, a file system) may not come to that: what stands at [`at_end`] is done for it after a moment, and
//! the program ends.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Code, Error, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// How long work may take to end by itself.
const GRACE: Duration = Duration::from_millis(1500);

/// Listens from now on. Without this call the system ends the program at once, as it does by default. `report` is told
/// of an end that work did not come to by itself.
///
/// # Errors
/// Another handler is installed already.
pub fn install(report: impl Fn(&Error) + Send + Sync + 'static) -> Result<()> {
    let report = std::sync::Arc::new(report);
    let handler = move || {
        if REQUESTED.swap(true, Ordering::Relaxed) {
            // 128 + SIGINT, as shells say it.
            #[expect(clippy::exit, reason = "the user has asked twice and waits for nothing any more")]
            std::process::exit(130);
        }
        let report = std::sync::Arc::clone(&report);
        std::thread::spawn(move || {
            std::thread::sleep(GRACE);
            ENDINGS.run(|| {
                report(&interrupted());
                #[expect(clippy::exit, reason = "the work waits for somebody who may never answer")]
                std::process::exit(130);
            });
        });
    };
    ctrlc::set_handler(handler).map_err(|error| Error::new(Code::Io, "the handler of Ctrl-C").found(error))
}

/// True once an end was asked for.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// An error once an end was asked for.
///
/// # Errors
/// [`Code::Interrupted`].
pub fn check() -> Result<()> {
    if requested() { Err(interrupted()) } else { Ok(()) }
}

fn interrupted() -> Error {
    Error::new(Code::Interrupted, "hf2onnx")
        .found("Ctrl-C, or a request of the system to end")
        .help("no output was left half made: run it again")
}

/// What is done when the program is ended while work goes on.
struct Endings(Mutex<BTreeMap<u64, Box<dyn FnOnce() + Send>>>);

static ENDINGS: Endings = Endings(Mutex::new(BTreeMap::new()));

impl Endings {
    /// Does what is there, the last first, and then `last`. Whoever forgets an ending meanwhile waits for it.
    fn run(&self, last: impl FnOnce()) {
        let mut endings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, work) in std::mem::take(&mut *endings).into_iter().rev() {
            work();
        }
        last();
    }
}

/// Something to be done at the program's end; dropped, it is forgotten.
#[derive(Debug)]
#[must_use = "it is forgotten when it is dropped"]
pub struct Ending(u64);

/// Has something done when the program is ended while work goes on.
pub fn at_end(work: impl FnOnce() + Send + 'static) -> Ending {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    ENDINGS.0.lock().unwrap_or_else(PoisonError::into_inner).insert(number, Box::new(work));
    Ending(number)
}

/// Has a directory removed when the program is ended while work goes on.
pub fn remove_at_end(directory: &Path) -> Ending {
    let directory = directory.to_owned();
    at_end(move || remove(&directory))
}

/// Removes a directory into which somebody may be writing.
pub(crate) fn remove(directory: &Path) {
    for _ in 0..50 {
        match std::fs::remove_dir_all(directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        ENDINGS.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn endings_are_done_in_reverse_unless_they_are_forgotten() {
        let endings = Endings(Mutex::new(BTreeMap::new()));
        let done: Arc<Mutex<Vec<u64>>> = Arc::default();
        for number in 0..3 {
            let done = Arc::clone(&done);
            endings.0.lock().unwrap().insert(number, Box::new(move || done.lock().unwrap().push(number)));
        }
        endings.0.lock().unwrap().remove(&1);
        endings.run(|| done.lock().unwrap().push(9));
        assert_eq!(*done.lock().unwrap(), [2, 0, 9]);
        endings.run(|| done.lock().unwrap().push(8));
        assert_eq!(*done.lock().unwrap(), [2, 0, 9, 8]);
    }

    #[test]
    fn an_ending_is_forgotten_with_its_guard() {
        let directory = tempfile::tempdir().unwrap();
        let ending = remove_at_end(directory.path());
        let number = ending.0;
        assert!(ENDINGS.0.lock().unwrap().contains_key(&number));
        drop(ending);
        assert!(!ENDINGS.0.lock().unwrap().contains_key(&number));
    }
}
