//! What onnxruntime's CUDA provider needs beside its own library: NVIDIA's driver, and the libraries of CUDA and cuDNN.
//!
//! The provider names its libraries without a folder. They are searched here, wherever pip or an installer puts them,
//! and loaded by their paths in the order in which they depend on each other: the system's loader then takes a library
//! that is there already for any later one of that name.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::driver::Driver;
use super::search::{ask_pythons, system_folders};
use super::{Library, Provider, outside};
use crate::error::{Code, Error, Result};

/// A library that the provider goes through.
struct Need {
    name: &'static str,
    /// The provider does not load without it; the others serve few operators.
    required: bool,
    /// What the Python package that brings it is called, without hyphens.
    package: &'static str,
}

const fn need(name: &'static str, required: bool, package: &'static str) -> Need {
    Need { name, required, package }
}

/// For the release that is pinned; each stands behind those that it needs.
#[cfg(not(windows))]
const NEEDS: [Need; 7] = [
    need("libcudart.so.13", true, "nvidia_cuda_runtime"),
    need("libcublasLt.so.13", true, "nvidia_cublas"),
    need("libcublas.so.13", true, "nvidia_cublas"),
    need("libcurand.so.10", true, "nvidia_curand"),
    need("libnvrtc.so.13", false, "nvidia_cuda_nvrtc"),
    need("libcufft.so.12", false, "nvidia_cufft"),
    need("libcudnn.so.9", false, "nvidia_cudnn_cu13"),
];

/// For the release that is pinned; each stands behind those that it needs.
#[cfg(windows)]
const NEEDS: [Need; 7] = [
    need("cudart64_13.dll", true, "nvidia_cuda_runtime"),
    need("cublasLt64_13.dll", true, "nvidia_cublas"),
    need("cublas64_13.dll", true, "nvidia_cublas"),
    need("curand64_10.dll", true, "nvidia_curand"),
    need("nvrtc64_130_0.dll", false, "nvidia_cuda_nvrtc"),
    need("cufft64_12.dll", false, "nvidia_cufft"),
    need("cudnn64_9.dll", false, "nvidia_cudnn_cu13"),
];

/// Where the libraries are looked for, in this order. The default asks the machine; tests fill the fields in.
#[derive(Debug, Clone, Default)]
pub struct CudaSearch {
    /// Folders named `nvidia`, as pip lays them out: the libraries are in `*/lib` or `*/bin` below them.
    pub packages: Vec<PathBuf>,
    /// Folders with the libraries themselves.
    pub folders: Vec<PathBuf>,
}

/// A library of CUDA or cuDNN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CudaLibrary {
    /// Its file's name, which has the major version.
    pub name: &'static str,
    /// Whether the provider loads without it.
    pub required: bool,
    /// Where it is; nothing if it is nowhere.
    pub path: Option<PathBuf>,
    /// Its version, where the package or the file's name tells.
    pub version: Option<String>,
}

/// What there is for the CUDA provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cuda {
    /// The driver.
    pub driver: Driver,
    /// The libraries, each behind those that it needs.
    pub libraries: Vec<CudaLibrary>,
    /// What keeps the provider from running, in words.
    pub missing: Vec<String>,
}

impl CudaSearch {
    /// The places of this machine, for an onnxruntime library if there is one, and hf2onnx's cache.
    pub fn of(library: Option<&Path>, cache: &Path) -> Self {
        let beside = library.and_then(|path| path.ancestors().nth(3)).map(|packages| packages.join("nvidia"));
        let own = cache.join(Provider::Cuda.pinned().folder()).join("nvidia");
        let packages = beside
            .into_iter()
            .chain([own])
            .chain(ask_pythons("nvidia").into_iter().filter(|folder| !outside::is_inside(folder)))
            .collect();
        let beside = library.and_then(Path::parent).map(Path::to_path_buf);
        let roots = ["CUDA_PATH", "CUDA_HOME"].iter().filter_map(env::var_os).map(PathBuf::from);
        let roots = roots.chain(["/usr/local/cuda-13", "/usr/local/cuda"].map(PathBuf::from));
        let roots = roots.filter(|root| !outside::is_inside(root));
        let below = roots.flat_map(|root| ["lib64", "lib", "bin", "bin/x64"].map(|folder| root.join(folder)));
        let system = system_folders().into_iter().filter(|folder| !outside::is_inside(folder));
        Self { packages, folders: beside.into_iter().chain(below).chain(system).collect() }
    }

    /// Looks for every library, without loading anything.
    pub fn run(&self) -> Vec<CudaLibrary> {
        let folders: Vec<PathBuf> = self.packages.iter().flat_map(|p| package_folders(p)).collect();
        let find = |need: &Need| {
            let mut places = folders.iter().chain(&self.folders).map(|folder| folder.join(need.name));
            let path = places.find(|path| path.is_file());
            let version = path.as_deref().and_then(|path| version_of(path, need));
            CudaLibrary { name: need.name, required: need.required, path, version }
        };
        NEEDS.iter().map(find).collect()
    }
}

impl Cuda {
    /// Looks at this machine.
    pub fn look(library: Option<&Path>, cache: &Path) -> Self {
        Self::of(Driver::look(), CudaSearch::of(library, cache).run())
    }

    fn of(driver: Driver, libraries: Vec<CudaLibrary>) -> Self {
        let absent = libraries.iter().filter(|library| library.required && library.path.is_none());
        let missing =
            driver.missing().into_iter().chain(absent.map(|library| format!("{} is nowhere", library.name))).collect();
        Self { driver, libraries, missing }
    }
}

/// Loads what the CUDA provider of a library needs.
///
/// # Errors
/// No driver, or a library that is nowhere or does not load.
pub(super) fn prepare(library: &Library, cache: &Path) -> Result<()> {
    let cuda = Cuda::look(Some(&library.path), cache);
    check(&cuda)?;
    for library in &cuda.libraries {
        let Some(path) = &library.path else { continue };
        match ort::util::preload_dylib(path) {
            Err(error) if library.required => {
                return Err(unusable(format!("{} does not load: {error}", path.display())).help(INSTALL));
            }
            Err(error) => tracing::debug!("{}: {error}", path.display()),
            Ok(()) => {}
        }
    }
    Ok(())
}

const INSTALL: &str = "`hf2onnx runtime install --provider cuda` brings them, `hf2onnx runtime --provider cuda` says \
                       where they were looked for";

/// An error that names everything that is missing.
///
/// # Errors
/// [`Code::RuntimeMissing`].
pub fn check(cuda: &Cuda) -> Result<()> {
    if cuda.missing.is_empty() {
        return Ok(());
    }
    let help = match cuda.driver.missing() {
        Some(_) => {
            "install NVIDIA's driver on a machine with an NVIDIA GPU (in a container: start it with its GPUs), or \
                    run with --provider cpu"
        }
        None => INSTALL,
    };
    Err(unusable(cuda.missing.join("; ")).help(help))
}

fn unusable(found: String) -> Error {
    Error::new(Code::RuntimeMissing, "the CUDA provider")
        .found(found)
        .expected("an NVIDIA GPU with its driver, and the libraries of CUDA 13")
}

/// The folders with libraries below a folder named `nvidia`.
fn package_folders(nvidia: &Path) -> Vec<PathBuf> {
    let mut packages: Vec<PathBuf> = fs::read_dir(nvidia).into_iter().flatten().flatten().map(|e| e.path()).collect();
    // `cu13` brings CUDA 13, and so it does not matter that `cublas` or `cudnn` may be of an older one.
    packages.sort();
    packages.into_iter().flat_map(|package| ["lib", "bin", "bin/x86_64"].map(|folder| package.join(folder))).collect()
}

/// The version by the Python package around a library, or by the name of the file that it really is.
fn version_of(path: &Path, need: &Need) -> Option<String> {
    let nvidia = path.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "nvidia"));
    let entries = nvidia.and_then(Path::parent).and_then(|packages| fs::read_dir(packages).ok());
    let by_package = entries.into_iter().flatten().flatten().find_map(|entry| {
        let name = entry.file_name();
        let (package, version) = name.to_str()?.strip_suffix(".dist-info")?.split_once('-')?;
        (package == need.package).then(|| version.to_owned())
    });
    by_package.or_else(|| {
        let real = fs::canonicalize(path).ok()?;
        let (_, version) = real.file_name()?.to_str()?.split_once(".so.")?;
        Some(version.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "no library").unwrap();
    }

    fn driver(library: bool) -> Driver {
        Driver { version: None, library, gpus: Vec::new() }
    }

    #[test]
    fn libraries_are_found_in_packages_first_with_their_versions() {
        let root = tempfile::tempdir().unwrap();
        let nvidia = root.path().join("site-packages/nvidia");
        for need in NEEDS.iter().take(3) {
            touch(&nvidia.join("cu13/lib").join(need.name));
        }
        fs::create_dir_all(root.path().join("site-packages/nvidia_cublas-13.1.0.3.dist-info")).unwrap();
        let system = root.path().join("lib64");
        for need in NEEDS.iter().skip(2).take(2) {
            touch(&system.join(need.name));
        }
        let search = CudaSearch { packages: vec![root.path().join("absent"), nvidia.clone()], folders: vec![system] };
        let found = search.run();
        assert!(found[..3].iter().all(|library| library.path.as_ref().unwrap().starts_with(&nvidia)), "{found:?}");
        assert!(found[3].path.as_ref().unwrap().ends_with(Path::new("lib64").join(NEEDS[3].name)));
        assert!(found[4..].iter().all(|library| library.path.is_none()));
        assert_eq!(found[1].version.as_deref(), Some("13.1.0.3"));
        assert!(Cuda::of(driver(true), found.clone()).missing.is_empty(), "what is not required may be absent");
        let error = check(&Cuda::of(driver(false), found)).unwrap_err();
        assert!(error.found.contains("no NVIDIA driver") && error.help.contains("--provider cpu"), "{error}");
    }

    #[test]
    fn everything_that_is_missing_is_named_with_the_next_step() {
        let cuda = Cuda::of(driver(true), CudaSearch::default().run());
        assert_eq!(cuda.missing.len(), 4);
        let error = check(&cuda).unwrap_err();
        assert_eq!(error.code, Code::RuntimeMissing);
        for need in NEEDS.iter().filter(|need| need.required) {
            assert!(error.found.contains(need.name), "{error}");
        }
        assert!(error.help.contains("runtime install --provider cuda"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn the_file_behind_a_link_tells_the_version() {
        let root = tempfile::tempdir().unwrap();
        let name = NEEDS[0].name;
        let real = root.path().join(format!("{name}.0.96"));
        touch(&real);
        std::os::unix::fs::symlink(&real, root.path().join(name)).unwrap();
        let found = CudaSearch { packages: Vec::new(), folders: vec![root.path().into()] }.run();
        assert_eq!(found[0].version.as_deref(), Some("13.0.96"));
    }
}
