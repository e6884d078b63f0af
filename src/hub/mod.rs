//! Repositories of the Hugging Face hub: `org/name@revision` becomes a directory of the local cache, which is shared
//! with Python's `huggingface_hub`.
//!
//! A complete snapshot in the cache is used without a word to the network. What is missing is downloaded, several
//! files at once, resumed where a connection broke, and checked against the hashes that the hub gives. The server's
//! answers are untrusted: names, commits and hashes are checked before they become paths.

mod cache;
mod client;
mod fetch;
mod id;
mod pace;
mod select;
mod settings;

use std::path::{Path, PathBuf};

pub use cache::{Source, source};
pub use id::Id;
pub use pace::Clock;
#[cfg(test)]
pub(crate) use select::is_wanted;
pub use settings::Settings;

use crate::error::{Code, Error, Result};
use cache::{Place, State};
use client::Client;

/// Who follows a download. Called from several threads at once.
pub trait Watch: Sync {
    /// The download is larger than was known, by this many bytes.
    fn grow(&self, bytes: u64);
    /// Bytes are there.
    fn advance(&self, bytes: u64);
    /// Bytes that were there have to be fetched again.
    fn retreat(&self, bytes: u64);
    /// Something that the user should know.
    fn say(&self, text: &str);
}

/// Nobody follows.
impl Watch for () {
    fn grow(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn retreat(&self, _: u64) {}
    fn say(&self, _: &str) {}
}

/// The directory that a user's REPO means: itself if something of this name exists or it can not be an id of the hub,
/// and otherwise the model's snapshot in the cache, downloaded if need be.
///
/// # Errors
///
/// The `hub-*` codes, and `download-corrupt`. What is no id is left to the reader to refuse.
pub fn directory(repo: &Path, settings: &Settings, watch: &dyn Watch) -> Result<PathBuf> {
    if repo.symlink_metadata().is_ok() {
        return Ok(repo.to_owned());
    }
    match repo.to_str().and_then(Id::parse) {
        Some(id) => snapshot(&id, settings, watch),
        None => Ok(repo.to_owned()),
    }
}

/// The snapshot of a model in the cache, downloaded if it is not complete.
pub fn snapshot(id: &Id, settings: &Settings, watch: &dyn Watch) -> Result<PathBuf> {
    let place = Place::new(&settings.cache, id);
    let here = place.commit(id.revision()).map(|commit| place.snapshot(&commit));
    let state = here.as_deref().map_or_else(State::absent, State::of);
    let usable = match (here, &state) {
        (Some(dir), State::Complete { tokenizer: true }) => return Ok(dir),
        // Who loaded only the model left no tokenizer: the hub knows whether there is one.
        (Some(dir), State::Complete { tokenizer: false }) => Some(dir),
        _ => None,
    };
    if settings.offline {
        return usable.ok_or_else(|| offline(id, &place, &state));
    }
    let client = Client::new(id, settings)?;
    match (fetch::snapshot(&client, &place, settings, watch), usable) {
        (Err(error), Some(dir)) if error.code == Code::HubUnreachable => Ok(dir),
        (result, _) => result,
    }
}

fn offline(id: &Id, place: &Place, state: &State) -> Error {
    let found = match state {
        State::Incomplete(missing) if !missing.is_empty() => format!("a snapshot without {}", missing.join(", ")),
        _ => format!("nothing of revision `{}` in {}", id.revision(), place.folder().display()),
    };
    Error::new(Code::HubOffline, id)
        .found(format!("{found}, and HF_HUB_OFFLINE forbids the network"))
        .expected("a complete snapshot in the cache, or a directory")
        .help(format!(
            "run once without HF_HUB_OFFLINE, or `hf download {}` where there is a network and copy {} here",
            id.download_arguments(),
            place.folder().display()
        ))
}
