//! onnxruntime's shared library: where it is looked for, how it is installed, and the one environment that uses it.
//!
//! The library is loaded at run time, so the program builds and starts without one. [`ensure`] is what everything that
//! runs a model calls: it takes the first library that loads, and installs the pinned one when there is none. For a GPU
//! it takes the first one that has the CUDA provider beside it, and what that provider needs is found and loaded before;
//! nothing is installed unasked then, because CUDA's libraries take gigabytes.

mod cuda;
mod driver;
mod install;
mod install_cuda;
mod outside;
mod provider;
mod search;
mod wheels;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::Environment;
use serde::Serialize;

use crate::error::{Code, Error, Result};

pub use cuda::{Cuda, CudaLibrary, CudaSearch, check as check_cuda};
pub(crate) use driver::query as query_gpus;
pub use driver::{Driver, Gpu};
pub use provider::{Pinned, Provider};
pub use search::{Findings, Place, Search, State};

/// The release that [`install`] fetches for the processor.
pub const PINNED_VERSION: &str = "1.32.0";

/// The oldest release (1.x) that computes right what this program writes: 1.23.2 loads the files, and is wrong in attention
/// with a window beside a bias and in experts of 4 bits.
pub const OLDEST_MINOR: u32 = 24;

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
///
/// # Errors
/// No library that can be used; for a GPU also no driver, or a library of CUDA that is nowhere.
pub fn ensure(search: &Search, say: &mut dyn FnMut(&str)) -> Result<Library> {
    let found = search.run();
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
            Ok(_) => {
                prepare(search, &library)?;
                return Ok(library);
            }
            Err(error) => {
                let line = format!("passed over {}: {}", library.path.display(), error.found);
                say(&line);
                refused.push(line);
            }
        }
    }
    if search.explicit.is_some() {
        let help = match search.provider {
            Provider::Cpu => "name a libonnxruntime file of release 1.24 or later, or leave the option out",
            Provider::Cuda => "run `hf2onnx runtime install --provider cuda` and leave the option out",
        };
        let error = Error::new(Code::RuntimeMissing, "the library named by --runtime").found(refused.join("; "));
        return Err(error.help(help));
    }
    if search.provider == Provider::Cuda {
        return Err(no_gpu_library(&refused));
    }
    let library = install(search.provider, &search.cache, say)?;
    environment(&library.path)?;
    Ok(library)
}

/// Loads what the search's provider needs besides onnxruntime's own library.
///
/// # Errors
/// No driver, or a library of CUDA that is nowhere or does not load.
pub fn prepare(search: &Search, library: &Library) -> Result<()> {
    match search.provider {
        Provider::Cpu => Ok(()),
        Provider::Cuda => cuda::prepare(library, &search.cache),
    }
}

/// Installs the pinned release of a provider below `cache` (the folder of hf2onnx), or returns it when it is there.
///
/// # Errors
/// No pip, no network, no room, or a download that is damaged.
pub fn install(provider: Provider, cache: &Path, say: &mut dyn FnMut(&str)) -> Result<Library> {
    match provider {
        Provider::Cpu => install::install(cache, say),
        Provider::Cuda => install_cuda::install(cache, say),
    }
}

/// The installed release of a provider; nothing where there is none.
///
/// # Errors
/// It is damaged: for the processor its hash is compared with what was recorded, for a GPU the sizes of its files.
pub fn check_installed(provider: Provider, cache: &Path) -> Result<Option<Library>> {
    if !cache.join(provider.pinned().folder()).exists() {
        return Ok(None);
    }
    match provider {
        Provider::Cpu => install::check_installed(cache).map(Some),
        Provider::Cuda => install_cuda::check_installed(cache).map(Some),
    }
}

fn no_gpu_library(refused: &[String]) -> Error {
    let found =
        if refused.is_empty() { "no onnxruntime with the CUDA provider".to_owned() } else { refused.join("; ") };
    Error::new(Code::RuntimeMissing, "the CUDA provider")
        .found(found)
        .expected("the library of onnxruntime-gpu, with its provider beside it")
        .help(
            "run `hf2onnx runtime install --provider cuda` (1.6 GB to download), or name a library with --runtime or \
               ORT_DYLIB_PATH",
        )
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

    #[test]
    fn no_library_for_a_gpu_is_an_error_with_the_next_step_and_nothing_is_installed() {
        let root = tempfile::tempdir().unwrap();
        let (python, system) = (Some(Vec::new()), Vec::new());
        let cache = root.path().to_path_buf();
        let search = Search { provider: Provider::Cuda, variable: None, cache, python, system, explicit: None };
        let error = ensure(&search, &mut |_| {}).unwrap_err();
        assert!(error.help.contains("runtime install --provider cuda"), "{error}");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
