//! Installing the pinned onnxruntime: pip downloads the wheel, the library is taken out of it and checked.

use std::ffi::OsStr;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zip::ZipArchive;

use super::search::{PYTHONS, cached, is_library_name};
use super::{Library, Origin, PINNED_VERSION, Provider};
use crate::error::{Code, Error, Result};

/// The file beside an installed library that says what it is.
const RECORD_FILE: &str = "library.json";

/// What is known of an installed library.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Installed {
    file: String,
    version: String,
    sha256: String,
    size: u64,
    wheel: String,
}

/// Installs the pinned release below `cache` (the folder of hf2onnx), or returns it when it is there.
pub(super) fn install(cache: &Path, say: &mut dyn FnMut(&str)) -> Result<Library> {
    let target = cached(cache, Provider::Cpu);
    if let Ok(library) = check_installed(cache) {
        return Ok(library);
    }
    fs::create_dir_all(cache).map_err(|e| Error::io(cache, &e))?;
    let work = tempfile::Builder::new().prefix(".install-").tempdir_in(cache).map_err(|e| Error::io(cache, &e))?;
    say(&format!("installing onnxruntime {PINNED_VERSION} with pip, into {}", target.display()));
    let wheel = download(work.path())?;
    let unpacked = work.path().join("unpacked");
    unpack(&wheel, &unpacked)?;
    // Another process may have installed it meanwhile: then what it put there is used, if it is whole.
    if fs::rename(&unpacked, &target).is_err() {
        if let Ok(library) = check_installed(cache) {
            return Ok(library);
        }
        fs::remove_dir_all(&target).map_err(|e| Error::io(&target, &e))?;
        fs::rename(&unpacked, &target).map_err(|e| Error::io(&target, &e))?;
    }
    let library = check_installed(cache)?;
    say(&format!("installed {}", library.path.display()));
    Ok(library)
}

/// The installed library, after its hash was compared with what was recorded when it was installed.
pub(super) fn check_installed(cache: &Path) -> Result<Library> {
    let folder = cached(cache, Provider::Cpu);
    let record = folder.join(RECORD_FILE);
    let text = fs::read(&record).map_err(|e| Error::io(&record, &e))?;
    let corrupt = |found: &dyn std::fmt::Display| {
        Error::new(Code::RuntimeMissing, folder.display())
            .found(found)
            .expected("the library as it was installed")
            .help("delete the folder and run `hf2onnx runtime install`")
    };
    let installed: Installed = serde_json::from_slice(&text).map_err(|e| corrupt(&e))?;
    let path = folder.join(&installed.file);
    let bytes = fs::read(&path).map_err(|e| Error::io(&path, &e))?;
    if hex(&Sha256::digest(&bytes)) != installed.sha256 {
        return Err(corrupt(&format!("{} does not have the recorded hash", path.display())));
    }
    Ok(Library { path, version: Some(installed.version), origin: Origin::Cache })
}

/// Lets pip download the wheel into a folder.
fn download(folder: &Path) -> Result<PathBuf> {
    let arguments = ["download", "--no-deps", "--only-binary=:all:", "--dest"];
    let wheel = format!("onnxruntime=={PINNED_VERSION}");
    let rest = [folder.as_os_str(), wheel.as_ref()];
    pip(&[&arguments.map(OsStr::new)[..], &rest].concat(), folder).map_err(|found| {
        Error::new(Code::RuntimeMissing, format!("onnxruntime {PINNED_VERSION}"))
            .found(found)
            .expected("pip to download the wheel")
            .help(
                "install onnxruntime yourself (`pip install onnxruntime`), or name a library with --runtime or \
                 ORT_DYLIB_PATH",
            )
    })?;
    wheel_in(folder)
}

/// Runs pip in every way that there may be, until one succeeds; else what they said. What it needs meanwhile it puts
/// into `work`.
pub(super) fn pip(arguments: &[&OsStr], work: &Path) -> Result<(), String> {
    let mut said = Vec::new();
    // The second form asks for a wheel that some Python would take, where this machine's own has none.
    for extra in [&[][..], &["--python-version", "3.12"][..]] {
        for (program, start) in pips() {
            let run = Command::new(program)
                .args(start)
                .args(arguments)
                .args(["--disable-pip-version-check", "--quiet"])
                .args(extra)
                .envs(["TMPDIR", "TEMP", "TMP"].map(|name| (name, work)))
                .stdin(Stdio::null())
                .output();
            match run {
                Ok(out) if out.status.success() => return Ok(()),
                Ok(out) => said.push(last_line(&format!("{program} {}", start.join(" ")), &out.stderr)),
                Err(error) => tracing::debug!("{program}: {error}"),
            }
        }
    }
    said.dedup();
    Err(if said.is_empty() { "no Python with pip on the path".to_owned() } else { said.join("; ") })
}

/// Every way in which pip may be called.
fn pips() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    let modules = PYTHONS.iter().map(|p| (*p, &["-m", "pip"][..]));
    modules.chain([("pip3", &[][..]), ("pip", &[][..])])
}

fn last_line(program: &str, stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or("failed without a word");
    format!("{}: {line}", program.trim())
}

fn wheel_in(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io(folder, &e))?;
    let mut wheels = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "whl"));
    wheels.next().ok_or_else(|| bad_wheel(folder, "no wheel"))
}

fn bad_wheel(subject: &Path, found: impl std::fmt::Display) -> Error {
    Error::new(Code::RuntimeMissing, subject.display())
        .found(found)
        .expected(format!("the wheel of onnxruntime {PINNED_VERSION}, with its library"))
        .help("check which index pip is configured for, or name a library with --runtime")
}

/// Takes the library out of the wheel, checks it against the wheel's own list, and writes both it and its record.
fn unpack(wheel: &Path, folder: &Path) -> Result<()> {
    let file = fs::File::open(wheel).map_err(|e| Error::io(wheel, &e))?;
    let mut archive = ZipArchive::new(file).map_err(|e| bad_wheel(wheel, e))?;
    let name = library_name(&archive).ok_or_else(|| bad_wheel(wheel, "no onnxruntime library in it"))?;
    let list = format!("onnxruntime-{PINNED_VERSION}.dist-info/RECORD");
    let list = String::from_utf8_lossy(&member(&mut archive, wheel, &list)?).into_owned();
    let bytes = member(&mut archive, wheel, &name)?;
    check_against_list(&list, &name, &bytes).map_err(|found| bad_wheel(wheel, found))?;

    let short = name.rsplit('/').next().unwrap_or(&name).to_owned();
    let installed = Installed {
        version: PINNED_VERSION.to_owned(),
        sha256: hex(&Sha256::digest(&bytes)),
        size: bytes.len() as u64,
        wheel: wheel.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        file: short.clone(),
    };
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, &e))?;
    let text = serde_json::to_vec_pretty(&installed).map_err(|e| bad_wheel(wheel, e))?;
    for (name, bytes) in [(short.as_str(), &bytes), (RECORD_FILE, &text)] {
        let path = folder.join(name);
        fs::write(&path, bytes).map_err(|e| Error::io(&path, &e))?;
    }
    Ok(())
}

/// The library's name within the wheel.
fn library_name<R: std::io::Read + std::io::Seek>(archive: &ZipArchive<R>) -> Option<String> {
    let in_capi = |n: &&str| n.strip_prefix("onnxruntime/capi/").is_some_and(is_library_name);
    archive.file_names().find(in_capi).map(str::to_owned)
}

fn member(archive: &mut ZipArchive<fs::File>, wheel: &Path, name: &str) -> Result<Vec<u8>> {
    let mut file = archive.by_name(name).map_err(|e| bad_wheel(wheel, format!("{name}: {e}")))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| bad_wheel(wheel, format!("{name}: {e}")))?;
    Ok(bytes)
}

/// Compares a member of a wheel with its line in RECORD: `path,sha256=<base64url without padding>,size`.
fn check_against_list(list: &str, name: &str, bytes: &[u8]) -> Result<(), String> {
    let line = list.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(','));
    let line = line.ok_or_else(|| format!("RECORD does not list {name}"))?;
    let (hash, size) = line.split_once(',').unwrap_or((line, ""));
    if size.trim().parse() != Ok(bytes.len()) {
        return Err(format!("{name} has {} bytes, RECORD says {}", bytes.len(), size.trim()));
    }
    let computed = recorded_hash(&Sha256::digest(bytes));
    if hash == computed { Ok(()) } else { Err(format!("{name} has {computed}, RECORD says {hash}")) }
}

/// A hash as RECORD has it.
pub(super) fn recorded_hash(sha256: &[u8]) -> String {
    format!("sha256={}", base64url(sha256))
}

/// Base64 with the URL alphabet and no padding, as RECORD has it.
fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let letter = |bits: u32| ALPHABET.get(bits as usize & 63).map_or('=', |b| char::from(*b));
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |all, b| (all << 8) | u32::from(*b)) << (8 * (3 - chunk.len()));
        text.extend((0..=chunk.len()).map(|k| letter(bits >> (18 - 6 * k))));
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn base64url_is_that_of_the_standard() {
        for (plain, coded) in [("", ""), ("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64url(plain.as_bytes()), coded);
        }
        assert_eq!(base64url(&[0xfb, 0xff]), "-_8");
    }

    #[test]
    fn a_library_is_checked_against_record() {
        // sha256("hello") as RECORD writes it.
        let list = "onnxruntime/__init__.py,sha256=xyz,3\na.so,sha256=LPJNul-wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ,5\n";
        check_against_list(list, "a.so", b"hello").unwrap();
        assert!(check_against_list(list, "a.so", b"hellO").unwrap_err().contains("sha256="));
        assert!(check_against_list(list, "a.so", b"hell").unwrap_err().contains("4 bytes"));
        assert!(check_against_list(list, "b.so", b"hello").unwrap_err().contains("does not list"));
    }

    /// A wheel with a library whose RECORD line is right or not.
    fn wheel(folder: &Path, content: &[u8], listed: &[u8]) -> PathBuf {
        let path = folder.join("onnxruntime-test.whl");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        let plain = zip::write::SimpleFileOptions::default();
        let name = format!("onnxruntime/capi/libonnxruntime.so.{PINNED_VERSION}");
        zip.start_file(&name, plain).unwrap();
        zip.write_all(content).unwrap();
        zip.start_file(format!("onnxruntime-{PINNED_VERSION}.dist-info/RECORD"), plain).unwrap();
        let line = format!("{name},sha256={},{}\n", base64url(&Sha256::digest(listed)), listed.len());
        zip.write_all(line.as_bytes()).unwrap();
        zip.finish().unwrap();
        path
    }

    #[test]
    fn a_wheel_is_unpacked_only_when_its_library_has_the_listed_hash() {
        let cache = tempfile::tempdir().unwrap();
        let good = wheel(cache.path(), b"library", b"library");
        unpack(&good, &cached(cache.path(), Provider::Cpu)).unwrap();
        let library = check_installed(cache.path()).unwrap();
        assert_eq!(fs::read(&library.path).unwrap(), b"library");

        fs::write(&library.path, b"changed").unwrap();
        assert_eq!(check_installed(cache.path()).unwrap_err().code, Code::RuntimeMissing);

        let bad = wheel(cache.path(), b"libRary", b"library");
        let error = unpack(&bad, &cache.path().join("other")).unwrap_err();
        assert!(error.found.contains("RECORD says"), "{error}");
        assert!(!cache.path().join("other").exists());
    }
}
