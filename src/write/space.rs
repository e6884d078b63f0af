//! Room on the disk, asked for before anything is written.

use std::path::Path;

use crate::error::{Code, Error, Result};

/// Kept free beside what is written: file systems slow down, and everything else fails, on a disk without any room.
const RESERVE: u64 = 16 << 20;

/// An error if the file system that `output` will lie on has no room for `bytes` more.
pub fn check_space(output: &Path, bytes: u64) -> Result<()> {
    let Some(free) = free_space(output) else { return Ok(()) };
    if bytes.saturating_add(RESERVE) <= free {
        return Ok(());
    }
    let words = |count: u64| indicatif::HumanBytes(count).to_string();
    Err(Error::new(Code::DiskFull, output.display())
        .found(format!("{} free", words(free)))
        .expected(format!("{} for the output, and {} to spare", words(bytes), words(RESERVE)))
        .help("free some space, choose an --output on another disk, a smaller --dtype, or --weights link"))
}

/// Free bytes where a path is, or would be. None where the system does not say.
pub fn free_space(path: &Path) -> Option<u64> {
    let absolute = std::path::absolute(path).ok()?;
    let there = absolute.ancestors().find(|path| path.exists())?;
    fs4::available_space(there).ok()
}

/// Memory of this machine in bytes, where the system is asked for it.
pub(super) fn memory() -> Option<u64> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        let info = rustix::system::sysinfo();
        u64::from(info.mem_unit).checked_mul(info.totalram)
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn more_than_any_disk_has() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("not/there/yet");
        assert!(free_space(&output).is_some());
        check_space(&output, 1).unwrap();
        let error = check_space(&output, u64::MAX / 2).unwrap_err();
        assert_eq!(error.code, Code::DiskFull);
        assert!(error.found.contains("free"), "{error}");
    }
}
