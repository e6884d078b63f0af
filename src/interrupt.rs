//! Ctrl-C, SIGTERM and their like: the first one asks for an end, the second one is the end.
//!
//! Work that leaves something behind calls [`check`] often (once for each chunk that it writes, or step that it runs)
//! and returns the error, so that what it holds is dropped and cleans up behind itself.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Code, Error, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Listens from now on. Without this call the system ends the program at once, as it does by default.
///
/// # Errors
/// Another handler is installed already.
pub fn install() -> Result<()> {
    let handler = || {
        if REQUESTED.swap(true, Ordering::Relaxed) {
            // 128 + SIGINT, as shells say it.
            #[expect(clippy::exit, reason = "the user has asked twice and waits for nothing any more")]
            std::process::exit(130);
        }
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
    if requested() {
        return Err(Error::new(Code::Interrupted, "hf2onnx")
            .found("Ctrl-C, or a request of the system to end")
            .help("no output was left half made: run it again"));
    }
    Ok(())
}
