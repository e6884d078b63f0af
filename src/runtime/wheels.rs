//! The wheels that may be installed: a list of their hashes, and what is asked of a wheel before anything in it counts.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::outside::{self, pythons};
use super::{Pinned, Provider};
use crate::error::{Code, Error, Result};
use crate::interrupt;
use crate::read::hex;

/// In the form of `sha256sum`.
const LIST: &str = include_str!("wheels.sha256");
/// The wheels are those of one Python, whichever there is.
const PYTHON: [&str; 6] = ["--implementation", "cp", "--abi", "cp312", "--python-version", "3.12"];

/// Hash and name of each wheel.
fn listed() -> impl Iterator<Item = (&'static str, &'static str)> {
    LIST.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once("  "))
}

/// `name==version` of every package that belongs to a provider, its own first.
pub(super) fn packages(provider: Provider) -> Vec<String> {
    let own = |pinned: Pinned| format!("{}=={}", pinned.package.replace('-', "_"), pinned.version);
    let (wanted, other) = (own(provider.pinned()), own(Provider::Cpu.pinned()));
    let mut packages: Vec<String> = Vec::new();
    for (_, name) in listed() {
        let mut parts = name.split('-');
        let (Some(package), Some(version)) = (parts.next(), parts.next()) else { continue };
        let package = format!("{package}=={version}");
        let belongs = if provider == Provider::Cpu { package == wanted } else { package != other };
        if belongs && !packages.contains(&package) {
            packages.push(package);
        }
    }
    packages
}

/// Lets pip download a provider's wheels into a folder, and compares each with the list.
pub(super) fn download(provider: Provider, folder: &Path) -> Result<Vec<PathBuf>> {
    let packages = packages(provider);
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, &e))?;
    let mut arguments: Vec<&OsStr> = ["download", "--dest"].iter().map(OsStr::new).collect();
    arguments.push(folder.as_os_str());
    arguments.extend(packages.iter().map(OsStr::new));
    let pinned = provider.pinned();
    pip(&arguments, folder).map_err(|found| {
        Error::new(Code::RuntimeMissing, format!("{} {}", pinned.package, pinned.version))
            .found(found)
            .expected("pip to download the wheel")
            .help(format!("{}, or name a library with --runtime or ORT_DYLIB_PATH", by_hand(provider)))
    })?;
    let entries = fs::read_dir(folder).map_err(|e| Error::io(folder, &e))?;
    let mut wheels: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    wheels.retain(|path| path.extension().is_some_and(|end| end == "whl"));
    wheels.sort();
    if wheels.len() != packages.len() {
        let missing = Error::new(Code::RuntimeMissing, folder.display()).found(format!("{} wheels", wheels.len()));
        return Err(missing.expected(packages.join(", ")).help(INDEX));
    }
    wheels.iter().try_for_each(|wheel| check(wheel))?;
    Ok(wheels)
}

/// Lets pip unpack wheels that were checked into a folder.
pub(super) fn unpack(wheels: &[PathBuf], folder: &Path, work: &Path) -> Result<(), String> {
    let mut arguments: Vec<&OsStr> = ["install", "--no-index", "--no-compile", "--target"].map(OsStr::new).to_vec();
    arguments.push(folder.as_os_str());
    arguments.extend(wheels.iter().map(|wheel| wheel.as_os_str()));
    pip(&arguments, work)
}

const INDEX: &str = "check which index pip is configured for, or name a library of your own with --runtime";

fn by_hand(provider: Provider) -> &'static str {
    match provider {
        Provider::Cpu => "install onnxruntime yourself (`pip install onnxruntime`)",
        Provider::Cuda => "install onnxruntime-gpu[cuda,cudnn] into a Python on the path, or CUDA 13 itself",
    }
}

/// An error unless the wheel is one of the list.
fn check(wheel: &Path) -> Result<()> {
    let name = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let io = |e: io::Error| Error::io(wheel, &e);
    let mut sha256 = Sha256::new();
    io::copy(&mut File::open(wheel).map_err(io)?, &mut sha256).map_err(io)?;
    let found = hex(&sha256.finalize());
    if listed().any(|(hash, listed)| hash == found && listed == name) {
        return Ok(());
    }
    let known: Vec<&str> = listed().filter(|(_, listed)| *listed == name).map(|(hash, _)| hash).collect();
    let expected = match known.first() {
        Some(hash) => format!("sha256 {hash}"),
        None => "a wheel whose hash this version of hf2onnx knows".to_owned(),
    };
    let refused = Error::new(Code::RuntimeMissing, name).found(format!("sha256 {found}; it was not unpacked"));
    Err(refused.expected(expected).help(INDEX))
}

/// Runs pip in every way that there may be, until one succeeds; else what they said. What it needs meanwhile it puts
/// into `work`. Neither the working directory nor Python's variables have a say in what it imports.
fn pip(arguments: &[&OsStr], work: &Path) -> Result<(), String> {
    let mut said = Vec::new();
    for (name, program, start) in pips() {
        let mut command = outside::command(&program, work);
        command.args(start).args(arguments).args(["--no-deps", "--only-binary=:all:"]).args(PYTHON);
        // pip's own cache would hold every byte a second time, outside of ours.
        command.args(["--no-cache-dir", "--disable-pip-version-check", "--quiet"]);
        match outside::output(&mut command) {
            Ok(out) if out.status.success() => return Ok(()),
            Ok(out) => said.push(last_line(&name, &out.stderr)),
            Err(error) => tracing::debug!("{}: {error}", program.display()),
        }
        if interrupt::requested() {
            break;
        }
    }
    said.dedup();
    Err(if said.is_empty() { "no Python with pip on the path".to_owned() } else { said.join("; ") })
}

/// Every way in which pip may be called: its name, the program, and its first arguments.
fn pips() -> impl Iterator<Item = (String, PathBuf, Vec<OsString>)> {
    let isolated = ["-I", "-B", "-m", "pip"].map(OsString::from).to_vec();
    let modules = pythons().map(move |(name, program)| (format!("{name} -m pip"), program, isolated.clone()));
    let programs =
        ["pip3", "pip"].into_iter().filter_map(|name| Some((name.to_owned(), outside::program(name)?, vec![])));
    modules.chain(programs)
}

fn last_line(program: &str, stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or("failed without a word");
    format!("{program}: {line}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_platform_has_the_wheel_of_the_pinned_release() {
        let of = |start: &str| listed().filter(|(_, name)| name.starts_with(start)).count();
        assert!(listed().all(|(hash, _)| hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit())));
        let [cpu, cuda] = [Provider::Cpu, Provider::Cuda].map(Provider::pinned);
        for platform in ["manylinux_2_28_x86_64", "manylinux_2_28_aarch64", "macosx_14_0_arm64", "win_amd64"] {
            assert_eq!(of(&format!("{}-{}-cp312-cp312-{platform}.whl", cpu.package, cpu.version)), 1, "{platform}");
        }
        for platform in ["manylinux_2_28_x86_64", "win_amd64"] {
            assert_eq!(of(&format!("onnxruntime_gpu-{}-cp312-cp312-{platform}.whl", cuda.version)), 1, "{platform}");
        }
        // One version of each package, on every platform that has it.
        assert_eq!(packages(Provider::Cpu), ["onnxruntime==1.32.0"]);
        let cuda = packages(Provider::Cuda);
        assert_eq!((cuda.len(), cuda.first().map(String::as_str)), (8, Some("onnxruntime_gpu==1.31.1")), "{cuda:?}");
    }

    #[test]
    fn a_wheel_of_another_hash_or_name_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let (_, known) = listed().next().unwrap();
        for name in [known, "onnxruntime-1.32.0-py3-none-any.whl"] {
            let wheel = folder.path().join(name);
            fs::write(&wheel, "PK").unwrap();
            let error = check(&wheel).unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (Code::RuntimeMissing, name));
            assert!(error.found.contains("not unpacked") && error.help.contains("--runtime"), "{error}");
            assert_eq!(error.expected.starts_with("sha256 "), name == known, "{error}");
        }
    }
}
