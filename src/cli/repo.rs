//! The REPO of a command: a directory, or a model of the hub that becomes one.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use super::Output;
use crate::error::Result;
use crate::hub::{self, Settings, Watch};

/// The directory that a REPO means; a model that the cache lacks is downloaded, which stderr shows.
pub(super) fn directory(repo: &Path, output: &Output) -> Result<PathBuf> {
    if repo.exists() {
        return Ok(repo.to_owned());
    }
    let bar = if output.is_json() { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let shown = Shown { bar, output };
    let found = hub::directory(repo, &Settings::from_environment()?, &shown);
    shown.bar.finish_and_clear();
    found
}

/// A download on stderr.
struct Shown<'a> {
    bar: ProgressBar,
    output: &'a Output,
}

impl Watch for Shown<'_> {
    fn grow(&self, bytes: u64) {
        self.bar.inc_length(bytes);
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn retreat(&self, bytes: u64) {
        self.bar.dec(bytes);
    }

    fn say(&self, text: &str) {
        self.bar.suspend(|| self.output.say(text));
    }
}
