//! The one place that writes to stdout and stderr.

use std::io::{self, Write as _};
use std::process::ExitCode;

use serde::Serialize;

use crate::error::{Code, Error, Result};
use crate::interrupt;

/// Where results go. A reader that closes the pipe has seen enough: that is no failure.
#[derive(Debug)]
pub struct Output {
    json: bool,
    closed: bool,
    failure: Option<io::Error>,
    done: u8,
    failed: u8,
}

impl Output {
    /// An output; with `json` results and errors are JSON.
    pub fn new(json: bool) -> Self {
        Self { json, closed: false, failure: None, done: 0, failed: 1 }
    }

    /// True if results are wanted as JSON.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// The exit code of a command that succeeds, and of one that fails.
    pub fn set_exit_codes(&mut self, done: u8, failed: u8) {
        (self.done, self.failed) = (done, failed);
    }

    /// True once nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.closed || self.failure.is_some()
    }

    /// Writes text as it is.
    pub fn piece(&mut self, text: &str) {
        if self.is_closed() {
            return;
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => self.closed = true,
            Err(e) => self.failure = Some(e),
        }
    }

    /// Writes a line.
    pub fn line(&mut self, text: &str) {
        self.piece(&format!("{text}\n"));
    }

    /// Writes a result as JSON.
    pub fn value(&mut self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(|e| Error::new(Code::Io, "the result").found(e))?;
        self.line(&text);
        Ok(())
    }

    /// Tells the user something that is no result.
    pub fn say(&self, text: &str) {
        // Nothing can be done when stderr is gone.
        let _ = writeln!(io::stderr(), "{text}");
    }

    /// From now on Ctrl-C and its like ask for an end instead of being it.
    pub fn interruptible(&self) -> Result<()> {
        let json = self.json;
        interrupt::install(move |error| {
            let _ = writeln!(io::stderr(), "{}", if json { error.to_json().to_string() } else { error.to_string() });
        })
    }

    /// Prints the error, if there is one, and returns the exit code.
    pub fn finish(mut self, result: Result<()>) -> ExitCode {
        let result = result.and_then(|()| match self.failure.take() {
            Some(error) => Err(Error::new(Code::Io, "stdout").found(error)),
            None => Ok(()),
        });
        match result {
            Ok(()) => ExitCode::from(self.done),
            Err(error) => {
                self.say(&if self.json { error.to_json().to_string() } else { error.to_string() });
                // As shells say of a program that Ctrl-C ended.
                ExitCode::from(if error.code == Code::Interrupted { 130 } else { self.failed })
            }
        }
    }
}
