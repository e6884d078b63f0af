//! What the suites share: the golden cases with their weights restored, the command line, and Python.

// every suite compiles this module for itself and uses a part of it
#![allow(dead_code, unreachable_pub)]

pub mod changed;
pub mod hub;
pub mod models;
pub mod packers;
pub mod python;
pub mod quantized;
pub mod rounding;
pub mod weights;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sha2::{Digest, Sha256};

/// What a test returns: any error fails it, with its message.
pub type TestResult<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// A golden case: a folder of `golden/cases`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// Name of the folder.
    pub name: String,
    /// The folder, without weights.
    pub dir: PathBuf,
}

impl Case {
    /// The case of this name.
    pub fn named(name: &str) -> TestResult<Self> {
        let dir = repository().join("golden").join("cases").join(name);
        if dir.is_dir() { Ok(Self { name: name.to_owned(), dir }) } else { Err(format!("no case {name}").into()) }
    }

    /// The reference outputs.
    pub fn golden(&self) -> PathBuf {
        self.dir.join("golden.safetensors")
    }

    /// A repository with the case's weights: restored once for each content, and shared by all tests. Read only.
    pub fn repo(&self) -> TestResult<PathBuf> {
        let place = scratch().join("cases");
        let done = place.join(format!("{}-{}", self.name, digest(&self.dir)?));
        if !done.is_dir() {
            fs::create_dir_all(&place)?;
            let fresh = tempfile::Builder::new().prefix(".restore-").tempdir_in(&place)?;
            restore(self, fresh.path())?;
            keep_first(fresh, &done)?;
        }
        Ok(done)
    }

    /// A user's template for this case, where it has one.
    pub fn template(&self) -> Option<PathBuf> {
        let path = self.dir.join("template.toml");
        path.is_file().then_some(path)
    }
}

/// Every golden case, by name.
pub fn cases() -> TestResult<Vec<Case>> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(repository().join("golden").join("cases"))? {
        let dir = entry?.path();
        if let Some(name) = dir.file_name().and_then(|name| name.to_str()).filter(|_| dir.is_dir()) {
            cases.push(Case { name: name.to_owned(), dir: dir.clone() });
        }
    }
    cases.sort();
    Ok(cases)
}

/// Writes a case's weights bit for bit into `into`, and copies its other files.
pub fn restore(case: &Case, into: &Path) -> TestResult {
    weights::restore(&case.dir.join("weights.json"), into)?;
    for entry in fs::read_dir(&case.dir)? {
        let path = entry?.path();
        if let Some(name) = path.file_name().filter(|name| *name != "weights.json" && path.is_file()) {
            fs::copy(&path, into.join(name))?;
        }
    }
    Ok(())
}

/// The trained model that is stored with its weights.
pub fn kjv_llama() -> PathBuf {
    repository().join("golden").join("kjv-llama")
}

/// Copies the trained model's files into a folder.
pub fn copy_kjv_llama(to: &Path) -> TestResult {
    for entry in fs::read_dir(kjv_llama())? {
        let path = entry?.path();
        fs::copy(&path, to.join(path.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

/// Root of this repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where tests may write; cargo keeps it between runs.
pub fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Runs `hf2onnx`.
pub fn hf2onnx<I: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = I>) -> TestResult<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_hf2onnx")).args(arguments).output()?)
}

/// Runs `hf2onnx build` and fails with its words when it fails.
pub fn build(repo: &Path, output: &Path, target: &str, template: Option<&Path>) -> TestResult {
    let mut arguments = vec!["build".as_ref(), repo.as_os_str(), "--output".as_ref(), output.as_os_str()];
    arguments.extend(["--target".as_ref(), std::ffi::OsStr::new(target)]);
    if let Some(template) = template {
        arguments.extend(["--template".as_ref(), template.as_os_str()]);
    }
    let ran = hf2onnx(arguments)?;
    if ran.status.success() && output.is_dir() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&ran.stderr);
    Err(format!("build of {} for {target}: {}\n{words}", repo.display(), ran.status).into())
}

/// Moves a finished directory into place; whoever comes first wins, and both have the same content.
pub fn keep_first(fresh: tempfile::TempDir, done: &Path) -> TestResult {
    let fresh = fresh.keep();
    if let Err(error) = fs::rename(&fresh, done) {
        fs::remove_dir_all(&fresh)?;
        if !done.is_dir() {
            return Err(error.into());
        }
    }
    Ok(())
}

/// A short name for a folder's content.
fn digest(dir: &Path) -> TestResult<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.sort();
    let mut hash = Sha256::new();
    for file in files.iter().filter(|file| file.is_file()) {
        let bytes = fs::read(file)?;
        hash.update(file.file_name().map(std::ffi::OsStr::to_string_lossy).unwrap_or_default().as_bytes());
        hash.update(u64::try_from(bytes.len())?.to_le_bytes());
        hash.update(&bytes);
    }
    hash.update(weights::RULE.to_le_bytes());
    Ok(short(&hash.finalize()))
}

/// The first eight bytes in hexadecimal.
pub fn short(hash: &[u8]) -> String {
    use std::fmt::Write as _;
    hash.iter().take(8).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
