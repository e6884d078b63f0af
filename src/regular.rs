//! Files that others wrote, asked what they are before they are opened: opening a FIFO waits for its writer, a device
//! may never end, and what is larger than anything of its kind is not read.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read as _};
use std::path::Path;

/// Bytes of a configuration, chat template or template. The longest of 2026 list some 100,000 names: 5 MB.
pub(crate) const CONFIGURATION: u64 = 16_000_000;
/// Bytes of an index of shards: a line for each tensor.
pub(crate) const INDEX: u64 = 100_000_000;
/// Bytes of a tokenizer's file. The largest of 2026 have 35 MB.
pub(crate) const TOKENIZER: u64 = 256_000_000;
/// Bytes of a text that is read to calibrate or to score.
pub(crate) const TEXT: u64 = 1_000_000_000;
/// Bytes of a graph: protobuf's own limit.
pub(crate) const GRAPH: u64 = 2 << 30;
/// Bytes of a golden.
pub(crate) const GOLDEN: u64 = 16_000_000_000;

/// Opens a file for reading, if it is one.
pub(crate) fn open(path: &Path) -> io::Result<(File, Metadata)> {
    check(&fs::metadata(path)?)?;
    let file = File::open(path)?;
    // Once more, for what took its place meanwhile.
    let metadata = file.metadata()?;
    check(&metadata)?;
    Ok((file, metadata))
}

/// The content of a file of at most so many bytes.
pub(crate) fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let (file, metadata) = open(path)?;
    let large =
        |size: &str| io::Error::new(ErrorKind::InvalidData, format!("{size} bytes, where at most {most} are read"));
    if metadata.len() > most {
        return Err(large(&metadata.len().to_string()));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or_default());
    // The system's own files say that they are empty.
    file.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most { Err(large("more")) } else { Ok(bytes) }
}

/// The text of a file of at most so many bytes.
pub(crate) fn read_text(path: &Path, most: u64) -> io::Result<String> {
    let text = String::from_utf8(read(path, most)?);
    text.map_err(|error| io::Error::new(ErrorKind::InvalidData, format!("no UTF-8: {}", error.utf8_error())))
}

/// An error for everything but a file.
pub(crate) fn check(metadata: &Metadata) -> io::Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(io::Error::new(ErrorKind::NotSeekable, format!("{}, not a regular file", kind(metadata))))
}

fn kind(metadata: &Metadata) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt as _;
        let kind = metadata.file_type();
        if kind.is_fifo() {
            return "a named pipe";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    if metadata.is_dir() { "a directory" } else { "something else" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        fs::write(&path, "four").unwrap();
        assert_eq!(read_text(&path, 4).unwrap(), "four");
        let error = read(&path, 3).unwrap_err();
        assert!(error.to_string().contains("4 bytes, where at most 3"), "{error}");
        // Larger than any memory, and only its size is looked at.
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(read(&path, CONFIGURATION).unwrap_err().to_string().contains("1099511627776"));
        assert_eq!(read(&dir.path().join("none"), 1).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(read(dir.path(), 1).unwrap_err().to_string().contains("a directory"));
        fs::write(&path, [0xff]).unwrap();
        assert!(read_text(&path, 4).unwrap_err().to_string().contains("no UTF-8"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_no_file_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let (zero, random) = (Path::new("/dev/zero"), Path::new("/dev/random"));
        for (path, words) in
            [(fifo.as_path(), "a named pipe"), (&socket, "a socket"), (zero, "device"), (random, "device")]
        {
            assert!(read(path, 10).unwrap_err().to_string().contains(words), "{}", path.display());
        }
        // A file of the system that says it is empty, and is not.
        assert!(read(Path::new("/proc/self/maps"), 10).unwrap_err().to_string().contains("more bytes"));
    }
}
