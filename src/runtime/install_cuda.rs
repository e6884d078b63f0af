//! Installing the pinned onnxruntime for a GPU: pip downloads its wheel, and the wheels of CUDA and cuDNN that it needs,
//! whose hashes are known, and unpacks them into a folder of hf2onnx's cache; every library is compared with the list in
//! its wheel.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::install::{Work, recorded_hash};
use super::search::cached;
use super::{Library, Origin, Provider, wheels};
use crate::error::{Code, Error, Result};
use crate::write::free_space;

/// Bytes that the installation takes while it runs: 1.6 GB of wheels, and what comes out of the largest one twice.
const ROOM: u64 = 6_000_000_000;

/// Installs the pinned release below `cache`, or returns it when it is there.
pub(super) fn install(cache: &Path, say: &mut dyn FnMut(&str)) -> Result<Library> {
    if let Ok(library) = check_installed(cache) {
        return Ok(library);
    }
    fs::create_dir_all(cache).map_err(|e| Error::io(cache, &e))?;
    if let Some(free) = free_space(cache).filter(|free| *free < ROOM) {
        return Err(Error::new(Code::DiskFull, cache.display())
            .found(format!("{free} bytes free"))
            .expected(format!("{ROOM} for the wheels of onnxruntime-gpu, CUDA and cuDNN and what is in them"))
            .help("free some disk space, or set XDG_CACHE_HOME to a folder on another disk"));
    }
    let work = Work::new(cache)?;
    let (target, packages) = (folder(cache), work.path().join("packages"));
    let names = wheels::packages(Provider::Cuda).join(", ");
    say(&format!("installing {names} with pip (1.6 GB to download), into {}", target.display()));
    let downloaded = wheels::download(Provider::Cuda, &work.path().join("wheels"))?;
    wheels::unpack(&downloaded, &packages, work.path()).map_err(|found| {
        Error::new(Code::RuntimeMissing, Provider::Cuda.pinned().folder())
            .found(found)
            .expected("pip to unpack the wheels")
            .help("update pip, or install onnxruntime-gpu[cuda,cudnn] yourself and name the library with --runtime")
    })?;
    verify(&packages, true)?;
    // Another process may have installed it meanwhile: then what it put there is used, if it is whole.
    if fs::rename(&packages, &target).is_err() {
        if let Ok(library) = check_installed(cache) {
            return Ok(library);
        }
        fs::remove_dir_all(&target).map_err(|e| Error::io(&target, &e))?;
        fs::rename(&packages, &target).map_err(|e| Error::io(&target, &e))?;
    }
    let library = check_installed(cache)?;
    say(&format!("installed {}", library.path.display()));
    Ok(library)
}

/// The installed library, if all libraries of its folder have the sizes that they should have.
pub(super) fn check_installed(cache: &Path) -> Result<Library> {
    verify(&folder(cache), false)?;
    let capi = cached(cache, Provider::Cuda);
    let entries = fs::read_dir(&capi).map_err(|e| Error::io(&capi, &e))?;
    let library = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(OsStr::to_str).is_some_and(super::search::is_library_name));
    let path = library.ok_or_else(|| damaged(&capi, "no onnxruntime library"))?;
    Ok(Library { path, version: Some(Provider::Cuda.pinned().version.to_owned()), origin: Origin::Cache })
}

fn folder(cache: &Path) -> PathBuf {
    cache.join(Provider::Cuda.pinned().folder())
}

/// Compares every library of a folder of packages with its line in RECORD: its size, and its hash if that is asked for.
fn verify(packages: &Path, hash: bool) -> Result<()> {
    let entries = fs::read_dir(packages).map_err(|e| Error::io(packages, &e))?;
    let mut libraries = 0;
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().ends_with(".dist-info")) {
        let path = entry.path().join("RECORD");
        let list = fs::read_to_string(&path).map_err(|e| Error::io(&path, &e))?;
        for line in list.lines() {
            let mut fields = line.rsplitn(3, ',');
            let (size, recorded, name) = (fields.next(), fields.next(), fields.next());
            let (Some(size), Some(recorded), Some(name)) = (size, recorded, name) else { continue };
            let name = name.trim_matches('"');
            if is_library(name) {
                verify_one(packages, name, size, hash.then_some(recorded))?;
                libraries += 1;
            }
        }
    }
    if libraries == 0 {
        return Err(damaged(packages, "no libraries"));
    }
    Ok(())
}

fn verify_one(packages: &Path, name: &str, size: &str, recorded: Option<&str>) -> Result<()> {
    let path = packages.join(name);
    let found = fs::metadata(&path).map_err(|e| Error::io(&path, &e))?.len();
    if size.trim().parse() != Ok(found) {
        return Err(damaged(&path, format!("{found} bytes, RECORD says {size}")));
    }
    let Some(recorded) = recorded else { return Ok(()) };
    let mut file = fs::File::open(&path).map_err(|e| Error::io(&path, &e))?;
    let mut sha256 = Sha256::new();
    io::copy(&mut file, &mut sha256).map_err(|e| Error::io(&path, &e))?;
    let computed = recorded_hash(&sha256.finalize());
    if computed == recorded { Ok(()) } else { Err(damaged(&path, format!("{computed}, RECORD says {recorded}"))) }
}

/// True for what a loader loads; a path that leads out of the packages is none.
fn is_library(name: &str) -> bool {
    let inside = Path::new(name).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    let file = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    // `libcublas.so.13`: its extension is a number.
    inside && file.split('.').skip(1).any(|part| matches!(part, "so" | "dll"))
}

fn damaged(subject: &Path, found: impl std::fmt::Display) -> Error {
    Error::new(Code::RuntimeMissing, subject.display())
        .found(found)
        .expected("the libraries as their wheels list them")
        .help("delete the folder and run `hf2onnx runtime install --provider cuda`")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder as pip leaves it, with one library whose content is `content`, listed as `library`.
    fn packages(root: &Path, content: &[u8]) -> PathBuf {
        let folder = root.join(Provider::Cuda.pinned().folder());
        let name = format!("onnxruntime/capi/libonnxruntime.so.{}", Provider::Cuda.pinned().version);
        let info = folder.join("onnxruntime_gpu-1.31.1.dist-info");
        fs::create_dir_all(folder.join("onnxruntime/capi")).unwrap();
        fs::create_dir_all(&info).unwrap();
        fs::write(folder.join(&name), content).unwrap();
        let hash = recorded_hash(&Sha256::digest(b"library"));
        let list = format!("onnxruntime/__init__.py,sha256=x,1\n../../out.so,sha256=x,1\n{name},{hash},7\n");
        fs::write(info.join("RECORD"), list).unwrap();
        folder
    }

    #[test]
    fn libraries_are_compared_with_their_wheels_lists() {
        let root = tempfile::tempdir().unwrap();
        assert!(verify(&packages(root.path(), b"library"), true).is_ok());
        assert!(check_installed(root.path()).unwrap().path.is_file());
        let error = verify(&packages(root.path(), b"Library"), true).unwrap_err();
        assert!(error.found.contains("RECORD says sha256="), "{error}");
        packages(root.path(), b"short");
        let error = check_installed(root.path()).unwrap_err();
        assert!(error.found.contains("5 bytes") && error.help.contains("--provider cuda"), "{error}");
        fs::remove_dir_all(root.path().join("onnxruntime-gpu-1.31.1/onnxruntime_gpu-1.31.1.dist-info")).unwrap();
        assert!(check_installed(root.path()).is_err());
    }
}
