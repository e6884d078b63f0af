//! Python, for the checks that other projects' own code makes: a virtual environment that is made once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use super::{TestResult, keep_first, repository, scratch, short};

/// Runs a script of `tests/python` and returns what it printed; fails with its words when it fails.
pub fn run(script: &str, arguments: &[&Path]) -> TestResult<String> {
    let path = repository().join("tests").join("python").join(script);
    let ran = Command::new(environment()?)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PYTHONUTF8", "1")
        .arg(&path)
        .args(arguments)
        .output()?;
    let printed = String::from_utf8_lossy(&ran.stdout).into_owned();
    if ran.status.success() {
        return Ok(printed);
    }
    Err(format!("{script} {arguments:?}: {}\n{printed}{}", ran.status, String::from_utf8_lossy(&ran.stderr)).into())
}

/// The environment's Python, with what `tests/python/requirements.txt` asks for.
pub fn environment() -> TestResult<&'static Path> {
    static PYTHON: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = PYTHON.get_or_init(|| make().map_err(|error| error.to_string()));
    made.as_deref().map_err(|error| error.clone().into())
}

/// Makes the environment beside its place and moves it there when it is whole. Only `python -m` is run from it, since
/// the scripts that pip installs name the place where they were installed.
fn make() -> TestResult<PathBuf> {
    let requirements = repository().join("tests").join("python").join("requirements.txt");
    let (interpreter, version) = interpreter()?;
    let mut hash = Sha256::new_with_prefix(fs::read(&requirements)?);
    hash.update(&version);
    let done = scratch().join(format!("python-{}", short(&hash.finalize())));
    if !done.is_dir() {
        fs::create_dir_all(scratch())?;
        let fresh = tempfile::Builder::new().prefix(".python-").tempdir_in(scratch())?;
        let venv = [Path::new("-m"), Path::new("venv"), fresh.path()];
        must(&interpreter, &venv, "needs Python's venv module (on Debian: apt install python3-venv)")?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"].map(Path::new);
        must(&python_of(fresh.path()), &[&pip[..], &[&requirements]].concat(), "needs pip, and PyPI within reach")?;
        keep_first(fresh, &done)?;
    }
    Ok(python_of(&done))
}

/// The Python to start from, and its version.
fn interpreter() -> TestResult<(PathBuf, Vec<u8>)> {
    let chosen = std::env::var_os("PYTHON").map(PathBuf::from);
    let candidates = chosen.into_iter().chain(["python3", "python"].map(PathBuf::from));
    for candidate in candidates {
        let program = "import sys; print(sys.version_info[:3]); sys.exit(sys.version_info < (3, 10))";
        if let Ok(ran) = Command::new(&candidate).args(["-c", program]).output()
            && ran.status.success()
        {
            return Ok((candidate, ran.stdout));
        }
    }
    Err("these tests need Python 3.10 or later: install it, or name it in the variable PYTHON".into())
}

fn python_of(environment: &Path) -> PathBuf {
    let inside: [&str; 2] = if cfg!(windows) { ["Scripts", "python.exe"] } else { ["bin", "python"] };
    environment.join(inside[0]).join(inside[1])
}

fn must(program: &Path, arguments: &[&Path], help: &str) -> TestResult {
    let ran = Command::new(program).args(arguments).output()?;
    if ran.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&ran.stderr);
    Err(format!("{} {arguments:?}: {}\n{words}\nhelp: this {help}", program.display(), ran.status).into())
}
