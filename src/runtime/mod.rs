//! onnxruntime's shared library: where it is looked for, how it is installed, and the one environment that uses it.
//!
//! The library is loaded at run time, so the program builds and starts without one. [`ensure`] is what everything that
//! runs a model calls: it takes the first library that loads, and installs the pinned one when there is none.

mod install;
mod search;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::Environment;
use serde::Serialize;

use crate::error::{Code, Error, Result};

pub use install::{check_installed, install};
pub use search::{Findings, Place, Search, State};

/// The release that [`install`] fetches.
pub const PINNED_VERSION: &str = "1.32.0";

/// The oldest release (1.x) whose interface this program can use.
pub const OLDEST_MINOR: u32 = 22;

/// Where a library was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Named on the command line.
    Flag,
    /// `ORT_DYLIB_PATH`.
    Variable,
    /// hf2onnx's own cache.
    Cache,
    /// The onnxruntime package of a Python installation.
    Python,
    /// The system's library folders.
    System,
}

impl Origin {
    /// The origin in words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Flag => "--runtime",
            Self::Variable => "ORT_DYLIB_PATH",
            Self::Cache => "hf2onnx's cache",
            Self::Python => "Python's site-packages",
            Self::System => "system libraries",
        }
    }
}

/// A library that can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Library {
    /// The file.
    pub path: PathBuf,
    /// Its version, where the file or its surroundings tell.
    pub version: Option<String>,
    /// Where it was found.
    pub origin: Origin,
}

/// The first library of the search that loads; when there is none, the pinned one is installed first.
///
/// `say` receives one line for everything that a user should know about: a library passed over, an installation.
pub fn ensure(search: &Search, say: &mut dyn FnMut(&str)) -> Result<Library> {
    let found = search.run();
    let only_flag = search.explicit.is_some();
    let mut refused = Vec::new();
    for place in &found.places {
        if let State::Skipped { reason } = &place.state {
            let line = format!("passed over {}: {reason}", place.shown());
            if matches!(place.origin, Origin::Flag | Origin::Variable) {
                say(&line);
            }
            refused.push(line);
        }
        let Some(library) = place.library() else { continue };
        match environment(&library.path) {
            Ok(_) => return Ok(library),
            Err(error) => {
                let line = format!("passed over {}: {}", library.path.display(), error.found);
                say(&line);
                refused.push(line);
            }
        }
    }
    if only_flag {
        return Err(Error::new(Code::RuntimeMissing, "the library named by --runtime")
            .found(refused.join("; "))
            .help("name a libonnxruntime file of release 1.22 or later, or leave the option out"));
    }
    let library = install(&search.cache, say)?;
    environment(&library.path)?;
    Ok(library)
}

static ENVIRONMENT: OnceLock<(PathBuf, Environment)> = OnceLock::new();
static LOADING: Mutex<()> = Mutex::new(());

/// The process's environment; the first call loads the library at `path`, and later calls return what was loaded then.
pub fn environment(path: &Path) -> Result<&'static Environment> {
    let _guard = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((loaded, environment)) = ENVIRONMENT.get() {
        if loaded != path {
            tracing::debug!("{} is loaded already, {} is not used", loaded.display(), path.display());
        }
        return Ok(environment);
    }
    let absolute = std::path::absolute(path).map_err(|e| Error::io(path, &e))?;
    let failed = |found: String| {
        Error::new(Code::RuntimeMissing, path.display())
            .found(found)
            .expected(format!("onnxruntime 1.{OLDEST_MINOR} or later for this machine"))
            .help("run `hf2onnx runtime install`, or name another library with --runtime")
    };
    let environment = ort::init_from(&absolute)
        .map_err(|e| failed(e.to_string()))?
        .with_name("hf2onnx")
        .with_telemetry(false)
        .build()
        .map_err(|e| failed(e.to_string()))?;
    environment.set_log_level(ort::logging::LogLevel::Error);
    Ok(&ENVIRONMENT.get_or_init(|| (path.to_path_buf(), environment)).1)
}

/// The environment, if a library was loaded.
pub fn loaded() -> Option<&'static Environment> {
    ENVIRONMENT.get().map(|(_, environment)| environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ensure_loads_a_library_and_a_second_call_returns_the_same() {
        let library = ensure(&Search::default(), &mut |_| {}).unwrap();
        assert!(library.path.is_file());
        assert!(loaded().is_some());
        environment(Path::new("/nowhere/else")).unwrap();
    }

    #[test]
    fn a_named_library_that_is_absent_is_an_error_and_nothing_else_is_tried() {
        let search = Search { explicit: Some("/nowhere/libonnxruntime.so".into()), ..Search::default() };
        let error = ensure(&search, &mut |_| {}).unwrap_err();
        assert_eq!(error.code, Code::RuntimeMissing);
        assert!(error.found.contains("/nowhere/libonnxruntime.so"), "{error}");
    }
}
