//! Installing the pinned onnxruntime: pip downloads the wheel, whose hash is known, and the library is taken out of it.

use std::fs;
use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zip::ZipArchive;

use super::search::{cached, is_library_name};
use super::{Library, Origin, PINNED_VERSION, Provider, wheels};
use crate::error::{Code, Error, Result};
use crate::interrupt;
use crate::read::hex;

/// The file beside an installed library that says what it is.
const RECORD_FILE: &str = "library.json";
/// Bounds of what is unpacked, some ten times what the wheels of 2026 have: members, bytes of the library, of RECORD.
const MOST_MEMBERS: usize = 10_000;
const LARGEST_LIBRARY: u64 = 400_000_000;
const LARGEST_LIST: u64 = 1_000_000;

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
    let work = Work::new(cache)?;
    say(&format!("installing onnxruntime {PINNED_VERSION} with pip, into {}", target.display()));
    let unpacked = work.path().join("unpacked");
    for wheel in wheels::download(Provider::Cpu, &work.path().join("wheels"))? {
        unpack(&wheel, &unpacked)?;
    }
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

fn bad_wheel(subject: &Path, found: impl std::fmt::Display) -> Error {
    Error::new(Code::RuntimeMissing, subject.display())
        .found(found)
        .expected(format!("the wheel of onnxruntime {PINNED_VERSION}, with its library"))
        .help("check which index pip is configured for, or name a library with --runtime")
}

/// A folder beside what is installed, which goes when the work ends, also where it is cut short.
pub(super) struct Work {
    folder: tempfile::TempDir,
    _ending: interrupt::Ending,
}

impl Work {
    pub(super) fn new(cache: &Path) -> Result<Self> {
        let folder =
            tempfile::Builder::new().prefix(".install-").tempdir_in(cache).map_err(|e| Error::io(cache, &e))?;
        Ok(Self { _ending: interrupt::remove_at_end(folder.path()), folder })
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Takes the library out of the wheel, checks it against the wheel's own list, and writes both it and its record.
fn unpack(wheel: &Path, folder: &Path) -> Result<()> {
    let file = fs::File::open(wheel).map_err(|e| Error::io(wheel, &e))?;
    let mut archive = ZipArchive::new(file).map_err(|e| bad_wheel(wheel, e))?;
    if archive.len() > MOST_MEMBERS {
        return Err(bad_wheel(wheel, format!("{} members, more than {MOST_MEMBERS}", archive.len())));
    }
    let name = library_name(&archive).ok_or_else(|| bad_wheel(wheel, "no onnxruntime library in it"))?;
    let list = format!("onnxruntime-{PINNED_VERSION}.dist-info/RECORD");
    let list = String::from_utf8_lossy(&member(&mut archive, wheel, &list, LARGEST_LIST)?).into_owned();
    let bytes = member(&mut archive, wheel, &name, LARGEST_LIBRARY)?;
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

/// A member of the wheel, of which no more than `most` bytes are unpacked, whatever it says of its size.
fn member(archive: &mut ZipArchive<fs::File>, wheel: &Path, name: &str, most: u64) -> Result<Vec<u8>> {
    let file = archive.by_name(name).map_err(|e| bad_wheel(wheel, format!("{name}: {e}")))?;
    let large = || bad_wheel(wheel, format!("{name} with more than {most} bytes"));
    if file.size() > most {
        return Err(large());
    }
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(|e| bad_wheel(wheel, format!("{name}: {e}")))?;
    if bytes.len() as u64 > most { Err(large()) } else { Ok(bytes) }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::path::PathBuf;

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

    /// Zeros, of which a thousand take a byte.
    #[test]
    fn what_a_wheel_unpacks_to_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bomb.whl");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        let deflated = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        zip.start_file("onnxruntime/capi/libonnxruntime.so", deflated).unwrap();
        zip.write_all(&vec![0; 1 << 20]).unwrap();
        zip.finish().unwrap();
        let mut archive = ZipArchive::new(fs::File::open(&path).unwrap()).unwrap();
        let mut read = |most| member(&mut archive, &path, "onnxruntime/capi/libonnxruntime.so", most);
        assert_eq!(read(1 << 20).unwrap().len(), 1 << 20);
        assert!(read((1 << 20) - 1).unwrap_err().found.contains("more than 1048575 bytes"));

        // Its directory lies about the size: 1 byte.
        let mut bytes = fs::read(&path).unwrap();
        let size = (1_u32 << 20).to_le_bytes();
        let places: Vec<usize> = (0..bytes.len() - 4).filter(|at| bytes[*at..*at + 4] == size).collect();
        assert!(!places.is_empty());
        for at in places {
            bytes[at..at + 4].copy_from_slice(&1_u32.to_le_bytes());
        }
        fs::write(&path, bytes).unwrap();
        let mut archive = ZipArchive::new(fs::File::open(&path).unwrap()).unwrap();
        let error = member(&mut archive, &path, "onnxruntime/capi/libonnxruntime.so", 1000).unwrap_err();
        assert!(error.found.contains("more than 1000 bytes"), "{error}");
    }

    #[test]
    fn a_wheel_of_too_many_members_is_not_looked_through() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("many.whl");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        for index in 0..=MOST_MEMBERS {
            zip.start_file(index.to_string(), zip::write::SimpleFileOptions::default()).unwrap();
        }
        zip.finish().unwrap();
        let error = unpack(&path, &folder.path().join("unpacked")).unwrap_err();
        assert!(error.found.contains("10001 members"), "{error}");
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
