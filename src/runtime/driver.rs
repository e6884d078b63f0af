//! NVIDIA's driver, and the GPUs that it drives.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::outside;

/// The oldest driver that runs CUDA 13.
const OLDEST: u32 = 580;

/// What is known of the driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Driver {
    /// Its version, if it tells.
    pub version: Option<String>,
    /// True if its library, which everything that computes on a GPU goes through, can be loaded.
    pub library: bool,
    /// The GPUs.
    pub gpus: Vec<Gpu>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Its memory in MiB, if it tells.
    pub memory_mib: Option<u64>,
}

impl Driver {
    /// Asks `nvidia-smi`, or the kernel's module on Linux, and loads the driver's library.
    pub fn look() -> Self {
        let (version, gpus) = query("name,driver_version,memory.total").map_or((None, Vec::new()), |t| parse(&t));
        let version = version.or_else(|| {
            let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
            kernel_module(&text)
        });
        Self { version, library: loads(), gpus }
    }

    /// Why nothing can run on a GPU; nothing where something can.
    pub fn missing(&self) -> Option<String> {
        if !self.library {
            return Some(format!("no NVIDIA driver: {LIBRARY} can not be loaded"));
        }
        let old = self.version.as_deref().filter(|version| major(version).is_some_and(|major| major < OLDEST));
        old.map(|version| format!("the NVIDIA driver {version} is older than {OLDEST}, which CUDA 13 needs"))
    }
}

const LIBRARY: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

/// Loads the driver's library, wherever the loader or a container's usual folders have it.
fn loads() -> bool {
    let folders = ["/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"];
    let paths = folders.iter().map(|folder| Path::new(folder).join(LIBRARY)).filter(|path| path.is_file());
    std::iter::once(PathBuf::from(LIBRARY)).chain(paths).any(|path| ort::util::preload_dylib(path).is_ok())
}

/// What `nvidia-smi` says of some properties, a line for each GPU.
pub(crate) fn query(properties: &str) -> Option<String> {
    let (program, work) = (outside::program("nvidia-smi")?, tempfile::tempdir().ok()?);
    let mut command = outside::command(&program, work.path());
    command.arg(format!("--query-gpu={properties}")).arg("--format=csv,noheader,nounits");
    let out = outside::output(&mut command).ok().filter(|out| out.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Version and GPUs of lines `name, version, MiB`.
fn parse(text: &str) -> (Option<String>, Vec<Gpu>) {
    let mut version = None;
    let mut gpus = Vec::new();
    for line in text.lines() {
        // A name may have commas in it.
        let mut fields = line.rsplitn(3, ',').map(str::trim);
        let (memory, driver, name) = (fields.next(), fields.next(), fields.next());
        let (Some(memory), Some(driver), Some(name)) = (memory, driver, name) else { continue };
        version.get_or_insert_with(|| driver.to_owned());
        gpus.push(Gpu { name: name.to_owned(), memory_mib: memory.parse().ok() });
    }
    (version, gpus)
}

/// The version in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  ...`.
fn kernel_module(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    line.split_whitespace().find(|word| word.contains('.') && major(word).is_some()).map(str::to_owned)
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_says_is_understood() {
        let (version, gpus) = parse("NVIDIA H100 80GB HBM3, 580.95.05, 81559\nOdd, Name, 580.95.05, [N/A]\nbroken\n");
        assert_eq!(version.as_deref(), Some("580.95.05"));
        let first = Gpu { name: "NVIDIA H100 80GB HBM3".into(), memory_mib: Some(81559) };
        assert_eq!(gpus, [first, Gpu { name: "Odd, Name".into(), memory_mib: None }]);
        let module =
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\nGCC version: 12.2\n";
        assert_eq!(kernel_module(module).as_deref(), Some("570.133.20"));
        assert_eq!((parse(""), kernel_module("GCC version: 12.2")), ((None, Vec::new()), None));
    }

    #[test]
    fn an_absent_or_old_driver_is_said() {
        let driver = |version: &str, library| Driver { version: Some(version.into()), library, gpus: Vec::new() };
        assert!(driver("580.95", false).missing().unwrap().contains("no NVIDIA driver"));
        assert!(driver("570.133.20", true).missing().unwrap().contains("older than 580"));
        assert_eq!(driver("580.95.05", true).missing(), None);
        assert_eq!(Driver { version: None, library: true, gpus: Vec::new() }.missing(), None);
    }
}
