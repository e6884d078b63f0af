//! Programs and libraries that are run and loaded unasked come from outside of the working directory: that may be a
//! repository, and nothing of a repository is executed.

use std::env;
use std::ffi::OsStr;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use crate::interrupt;

/// Why something was passed over.
pub(super) const REASON: &str = "it lies below the working directory, which may be a repository";

/// The programs that may be Python.
const PYTHONS: &[&str] = &["python3", "python", "py"];
/// Bytes of a program's words that are kept.
const LONGEST: u64 = 1 << 20;

/// True for a path that the working directory decides about.
pub(super) fn is_inside(path: &Path) -> bool {
    path.is_relative() || working_directory().is_some_and(|working| is_below(path, &working))
}

/// The working directory, unless it holds the user's home as well: then it is no repository, and what the user has
/// installed lies below it.
fn working_directory() -> Option<PathBuf> {
    let working = env::current_dir().ok()?;
    let home = dirs::home_dir();
    (working.parent().is_some() && !home.is_some_and(|home| is_below(&home, &working))).then_some(working)
}

fn is_below(path: &Path, folder: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.starts_with(folder) || real(path).starts_with(real(folder))
}

/// A program of the path that lies outside.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    program_in(&env::var_os("PATH")?, name)
}

/// The folders of a path that lie outside.
fn outer_folders(path: &OsStr) -> impl Iterator<Item = PathBuf> {
    env::split_paths(path).filter(|folder| !is_inside(folder))
}

fn program_in(path: &OsStr, name: &str) -> Option<PathBuf> {
    outer_folders(path)
        .map(|folder| folder.join(format!("{name}{}", env::consts::EXE_SUFFIX)))
        .find(|file| is_program(file))
}

#[cfg(unix)]
fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// The store's Pythons are links that can be run and not followed.
#[cfg(not(unix))]
fn is_program(file: &Path) -> bool {
    file.symlink_metadata().is_ok_and(|data| !data.is_dir())
}

/// Every Python, with its name.
pub(super) fn pythons() -> impl Iterator<Item = (&'static str, PathBuf)> {
    PYTHONS.iter().filter_map(|name| Some((*name, program(name)?)))
}

/// A program in a working directory of its own. Python's variables are kept from it, which may name folders to import
/// from, and what it writes meanwhile goes to `work`.
pub(super) fn command(program: &Path, work: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PYTHON")) {
        command.env_remove(name);
    }
    // What it runs comes from outside as well.
    if let Ok(path) = env::join_paths(outer_folders(&env::var_os("PATH").unwrap_or_default())) {
        command.env("PATH", path);
    }
    command.env("PYTHONDONTWRITEBYTECODE", "1").envs(["TMPDIR", "TEMP", "TMP"].map(|name| (name, work)));
    command.current_dir(work).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a program to its end. It ends with this one if that is ended meanwhile.
pub(super) fn output(command: &mut Command) -> io::Result<Output> {
    let mut child = command.spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let child = Arc::new(Mutex::new(child));
    let killed = Arc::clone(&child);
    let ending = interrupt::at_end(move || {
        let mut child = killed.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have ended by itself.
        let _ = child.kill().and_then(|()| child.wait());
    });
    let errors = std::thread::spawn(move || words(stderr));
    let stdout = words(stdout);
    let stderr = errors.join().unwrap_or_default();
    let status = child.lock().unwrap_or_else(PoisonError::into_inner).wait()?;
    drop(ending);
    Ok(Output { status, stdout, stderr })
}

/// What a program says; of endless words the first ones, and then the pipe closes.
fn words(pipe: Option<impl io::Read>) -> Vec<u8> {
    let mut said = Vec::new();
    if let Some(pipe) = pipe {
        // What was said before a failure is all there is.
        let _ = pipe.take(LONGEST).read_to_end(&mut said);
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_below_a_folder() {
        let root = tempfile::tempdir().unwrap();
        let (repository, other) = (root.path().join("repo"), root.path().join("repository"));
        std::fs::create_dir_all(repository.join("bin")).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        assert!(is_below(&repository.join("bin"), &repository) && is_below(&repository, &repository));
        assert!(is_below(&other.join("../repo/bin"), &repository), "by way of its parent");
        assert!(!is_below(&other, &repository) && !is_below(root.path(), &repository));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&repository, other.join("link")).unwrap();
            assert!(is_below(&other.join("link/bin"), &repository), "by way of a link");
        }
    }

    #[test]
    fn relative_folders_belong_to_the_working_directory() {
        assert!(is_inside(Path::new("lib")) && is_inside(Path::new("")) && is_inside(Path::new("../lib")));
        let working = env::current_dir().unwrap();
        assert!(is_inside(&working.join("src")) && !is_inside(working.parent().unwrap()));
    }

    #[cfg(unix)]
    #[test]
    fn a_program_comes_from_outside() {
        use std::os::unix::fs::PermissionsExt as _;
        let (root, inside) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in(".").unwrap());
        for folder in [root.path(), inside.path()] {
            let file = folder.join("tool");
            std::fs::write(&file, "#!/bin/sh\n").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let absolute = env::current_dir().unwrap().join(inside.path());
        let relative = inside.path().to_str().unwrap();
        let path = format!(":.:{relative}:{}:{}", absolute.display(), root.path().display());
        assert_eq!(program_in(OsStr::new(&path), "tool"), Some(root.path().join("tool")));
        assert_eq!(program_in(OsStr::new(&format!(":.:{relative}")), "tool"), None);
    }
}
