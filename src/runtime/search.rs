//! The places where onnxruntime's library may be, in the order in which they count.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Library, OLDEST_MINOR, Origin, Provider, outside};

/// What [`Search::run`] looks at. The default asks the machine; tests fill the fields in.
#[derive(Debug, Clone)]
pub struct Search {
    /// The provider that the library has to have.
    pub provider: Provider,
    /// A library, or a folder that holds one, named by the user. When set, nothing else is looked at.
    pub explicit: Option<PathBuf>,
    /// The value of `ORT_DYLIB_PATH`.
    pub variable: Option<OsString>,
    /// The folder that holds `onnxruntime-<version>` and `onnxruntime-gpu-<version>`.
    pub cache: PathBuf,
    /// `capi` folders of Python's onnxruntime packages; `None` asks the Pythons on the path.
    pub python: Option<Vec<PathBuf>>,
    /// Folders with shared libraries.
    pub system: Vec<PathBuf>,
}

impl Default for Search {
    fn default() -> Self {
        Self {
            provider: Provider::Cpu,
            explicit: None,
            variable: std::env::var_os("ORT_DYLIB_PATH").filter(|v| !v.is_empty()),
            cache: cache_folder(),
            python: None,
            system: system_folders(),
        }
    }
}

/// How a place stood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum State {
    /// A library that can be used.
    Usable {
        /// Its version, where it is known without loading it.
        version: Option<String>,
    },
    /// A library that was passed over.
    Skipped {
        /// Why.
        reason: String,
    },
    /// Nothing is there.
    Absent,
}

/// One place that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Which kind of place.
    pub origin: Origin,
    /// The library, or the folder or file that was looked for; none where there was nothing to look at.
    pub path: Option<PathBuf>,
    /// How it stood.
    #[serde(flatten)]
    pub state: State,
}

impl Place {
    /// The library, if the place has a usable one.
    pub fn library(&self) -> Option<Library> {
        match (&self.state, &self.path) {
            (State::Usable { version }, Some(path)) => {
                Some(Library { path: path.clone(), version: version.clone(), origin: self.origin })
            }
            _ => None,
        }
    }

    /// The path, or the kind of place when there is none.
    pub fn shown(&self) -> String {
        self.path.as_ref().map_or_else(|| self.origin.as_str().to_owned(), |p| p.display().to_string())
    }
}

/// All places, in the order of the search.
#[derive(Debug, Clone, Serialize)]
pub struct Findings {
    /// Each place and how it stood.
    pub places: Vec<Place>,
}

impl Findings {
    /// The first usable library.
    pub fn library(&self) -> Option<Library> {
        self.places.iter().find_map(Place::library)
    }
}

impl Search {
    /// Looks at every place, without loading anything.
    pub fn run(&self) -> Findings {
        if let Some(path) = &self.explicit {
            return Findings { places: vec![self.examine(Origin::Flag, path)] };
        }
        let mut places = Vec::new();
        match &self.variable {
            Some(value) => places.push(self.examine(Origin::Variable, Path::new(value))),
            None => places.push(Place { origin: Origin::Variable, path: None, state: State::Absent }),
        }
        places.push(self.examine(Origin::Cache, &cached(&self.cache, self.provider)));
        places.extend(self.examine_all(Origin::Python));
        places.extend(self.examine_all(Origin::System));
        Findings { places }
    }

    /// A place, whose library is passed over when the provider's is not beside it.
    fn examine(&self, origin: Origin, path: &Path) -> Place {
        let mut place = examine(origin, path);
        let folder = place.library().and_then(|library| Some(library.path.parent()?.to_path_buf()));
        if let (Some(name), Some(folder)) = (self.provider.library(), folder)
            && !folder.join(name).is_file()
        {
            let reason = format!("no {} provider: {name} is not beside it", self.provider.as_str().to_uppercase());
            place.state = State::Skipped { reason };
        }
        place
    }

    /// The folders of Python or of the system; one absent place stands for all of them when none has a library.
    fn examine_all(&self, origin: Origin) -> Vec<Place> {
        let folders = match (origin, &self.python) {
            (Origin::Python, Some(given)) => given.clone(),
            (Origin::Python, None) => python_folders(),
            _ => self.system.clone(),
        };
        let mut found: Vec<Place> = Vec::new();
        for folder in &folders {
            let mut place = self.examine(origin, folder);
            if place.library().is_some() && outside::is_inside(folder) {
                place.state = State::Skipped { reason: format!("{}; --runtime takes it", outside::REASON) };
            }
            if place.state != State::Absent && !found.contains(&place) {
                found.push(place);
            }
        }
        if found.is_empty() {
            found.push(Place { origin, path: None, state: State::Absent });
        }
        found
    }
}

/// hf2onnx's own folder among the user's caches.
pub(super) fn cache_folder() -> PathBuf {
    dirs::cache_dir().unwrap_or_else(std::env::temp_dir).join("hf2onnx")
}

/// Where a provider's pinned release lies below a cache folder.
pub(super) fn cached(cache: &Path, provider: Provider) -> PathBuf {
    let folder = cache.join(provider.pinned().folder());
    match provider {
        Provider::Cpu => folder,
        // As pip lays the packages out.
        Provider::Cuda => folder.join("onnxruntime").join("capi"),
    }
}

/// True for the names that onnxruntime's library has on some system: `libonnxruntime.so[.X]`, `libonnxruntime[.X].dylib`,
/// `onnxruntime.dll`.
pub(super) fn is_library_name(name: &str) -> bool {
    let numbered = |s: &str| s.is_empty() || version_of(s.trim_matches('.')).is_some();
    match name.strip_prefix("libonnxruntime") {
        Some(rest) => {
            rest.strip_prefix(".so").is_some_and(numbered) || rest.strip_suffix(".dylib").is_some_and(numbered)
        }
        None => name.eq_ignore_ascii_case("onnxruntime.dll"),
    }
}

/// Looks at a library, or for one in a folder.
fn examine(origin: Origin, path: &Path) -> Place {
    let library = if path.is_dir() { newest_in(path) } else { path.is_file().then(|| path.to_path_buf()) };
    let Some(library) = library else {
        let named = matches!(origin, Origin::Flag | Origin::Variable);
        let state = if named { State::Skipped { reason: "no such library".into() } } else { State::Absent };
        return Place { origin, path: Some(path.to_path_buf()), state };
    };
    let version = find_version(&library);
    let state = match version.as_deref().map(minor) {
        Some(Some(minor)) if minor < OLDEST_MINOR => {
            State::Skipped { reason: format!("release {} is older than 1.{OLDEST_MINOR}", version.unwrap_or_default()) }
        }
        _ => State::Usable { version },
    };
    Place { origin, path: Some(library), state }
}

/// The library of the highest version in a folder.
fn newest_in(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    let names = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.is_file() && p.file_name().and_then(|n| n.to_str()).is_some_and(is_library_name));
    names.max_by_key(|p| (find_version_by_name(p).map(|v| parts(&v)), p.clone()))
}

/// The version by the file's name, by the Python package around it, or by the symbol version inside it.
fn find_version(library: &Path) -> Option<String> {
    find_version_by_name(library).or_else(|| find_version_by_package(library)).or_else(|| {
        let bytes = fs::read(library).ok()?;
        let mark = b"VERS_1.";
        let at = bytes.windows(mark.len()).position(|w| w == mark)? + "VERS_".len();
        let tail: String = bytes.iter().skip(at).take(16).map(|b| char::from(*b)).collect();
        version_of(tail.split(|c: char| !c.is_ascii_digit() && c != '.').next()?)
    })
}

fn find_version_by_name(library: &Path) -> Option<String> {
    let real = fs::canonicalize(library).ok()?;
    let name = real.file_name()?.to_str()?;
    let rest = name.strip_prefix("libonnxruntime")?;
    version_of(rest.trim_start_matches(".so").trim_end_matches(".dylib").trim_matches('.'))
        .or_else(|| version_of(real.parent()?.file_name()?.to_str()?.strip_prefix("onnxruntime-")?))
}

/// The packages that install onnxruntime's library; others of a similar name lie beside them.
const PACKAGES: &[&str] =
    &["onnxruntime", "onnxruntime_gpu", "onnxruntime_directml", "onnxruntime_openvino", "onnxruntime_qnn"];

/// `site-packages/onnxruntime/capi/<library>` has `onnxruntime-<version>.dist-info` beside the package.
fn find_version_by_package(library: &Path) -> Option<String> {
    let packages = library.parent()?.parent()?.parent()?;
    fs::read_dir(packages).ok()?.flatten().find_map(|entry| {
        let name = entry.file_name();
        let (package, version) = name.to_str()?.strip_suffix(".dist-info")?.split_once('-')?;
        PACKAGES.contains(&package).then(|| version_of(version)).flatten()
    })
}

/// The text, if it is a version such as `1` or `1.32.0`.
fn version_of(text: &str) -> Option<String> {
    let numeric = !text.is_empty() && text.split('.').all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()));
    numeric.then(|| text.to_owned())
}

fn parts(version: &str) -> Vec<u32> {
    version.split('.').filter_map(|p| p.parse().ok()).collect()
}

/// The 32 of 1.32.0; `None` when the version says less than that.
fn minor(version: &str) -> Option<u32> {
    match parts(version).as_slice() {
        [1, minor, ..] => Some(*minor),
        [0, ..] => Some(0),
        _ => None,
    }
}

/// The `capi` folder of every Python on the path that has onnxruntime.
fn python_folders() -> Vec<PathBuf> {
    ask_pythons("onnxruntime").iter().map(|folder| folder.join("capi")).collect()
}

/// The folders of a package in every Python on the path. The package is located, not imported, and Python is isolated:
/// neither the working directory nor Python's variables say where. That hides what the user has installed for itself
/// only, which is no secret.
pub(super) fn ask_pythons(package: &str) -> Vec<PathBuf> {
    let script = format!(
        "import importlib.util as u, site, sys\n\
         if sys.prefix == sys.base_prefix: sys.path.append(site.getusersitepackages())\n\
         s = u.find_spec('{package}')\n\
         print(*(s.submodule_search_locations if s else ()), sep='\\n')"
    );
    let Ok(work) = tempfile::tempdir() else { return Vec::new() };
    let ask = |(_, python): (&str, PathBuf)| {
        let mut command = outside::command(&python, work.path());
        let out = outside::output(command.args(["-I", "-B", "-c", &script]));
        out.ok().filter(|o| o.status.success()).map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
    };
    let mut folders: Vec<PathBuf> = Vec::new();
    for text in outside::pythons().filter_map(ask) {
        for folder in text.lines().map(str::trim).filter(|l| !l.is_empty()).map(PathBuf::from) {
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
    }
    folders
}

/// The folders in which the system's loader looks, as far as they can be known.
pub(super) fn system_folders() -> Vec<PathBuf> {
    let (variable, fixed): (&str, &[&str]) = if cfg!(windows) {
        ("PATH", &[])
    } else if cfg!(target_os = "macos") {
        ("DYLD_LIBRARY_PATH", &["/usr/local/lib", "/opt/homebrew/lib", "/opt/local/lib"])
    } else {
        ("LD_LIBRARY_PATH", &["/usr/local/lib", "/usr/local/lib64", "/usr/lib", "/usr/lib64"])
    };
    let mut folders: Vec<PathBuf> = std::env::var_os(variable).iter().flat_map(std::env::split_paths).collect();
    folders.extend(fixed.iter().map(PathBuf::from));
    if cfg!(target_os = "linux") {
        folders.push(format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH).into());
    }
    folders.retain(|f| !f.as_os_str().is_empty());
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "no library").unwrap();
    }

    /// A search over a temporary folder with nothing in it.
    fn empty(root: &Path) -> Search {
        Search {
            provider: Provider::Cpu,
            explicit: None,
            variable: None,
            cache: root.join("cache"),
            python: Some(vec![root.join("site-packages/onnxruntime/capi")]),
            system: vec![root.join("lib")],
        }
    }

    #[test]
    fn the_first_place_with_a_library_counts() {
        let root = tempfile::tempdir().unwrap();
        let mut search = empty(root.path());
        assert!(search.run().library().is_none());
        let origin = |s: &Search| s.run().library().unwrap().origin;

        touch(&root.path().join("lib/libonnxruntime.so.1.30.0"));
        assert_eq!(origin(&search), Origin::System);
        touch(&root.path().join("site-packages/onnxruntime/capi/libonnxruntime.so.1.31.0"));
        assert_eq!(origin(&search), Origin::Python);
        touch(&cached(&search.cache, Provider::Cpu).join("libonnxruntime.so.1.32.0"));
        assert_eq!(origin(&search), Origin::Cache);
        let own = root.path().join("own/libonnxruntime.so");
        touch(&own);
        search.variable = Some(own.clone().into());
        assert_eq!(origin(&search), Origin::Variable);
        search.explicit = Some(own.parent().unwrap().to_path_buf());
        let library = search.run().library().unwrap();
        assert_eq!((library.origin, library.path), (Origin::Flag, own));
    }

    #[test]
    fn what_lies_below_the_working_directory_is_passed_over_unless_it_is_named() {
        let (root, inside) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in(".").unwrap());
        let folder = std::env::current_dir().unwrap().join(inside.path());
        touch(&folder.join("libonnxruntime.so.1.32.0"));
        for (python, system) in [(folder.clone(), root.path().into()), (root.path().into(), folder.clone())] {
            let mut search = Search { python: Some(vec![python]), system: vec![system], ..empty(root.path()) };
            assert!(search.run().library().is_none());
            let reason = search.run().places.into_iter().find_map(|place| match place.state {
                State::Skipped { reason } => Some(reason),
                _ => None,
            });
            assert!(reason.is_some_and(|text| text.contains("working directory") && text.contains("--runtime")));
            search.explicit = Some(folder.clone());
            assert_eq!(search.run().library().unwrap().origin, Origin::Flag);
        }
        let relative = Search { system: vec![inside.path().to_path_buf()], ..empty(root.path()) };
        assert!(relative.run().library().is_none());
    }

    #[test]
    fn for_a_gpu_the_provider_has_to_be_beside_the_library() {
        let root = tempfile::tempdir().unwrap();
        let mut search = Search { provider: Provider::Cuda, ..empty(root.path()) };
        search.explicit = Some(root.path().join("lib/libonnxruntime.so.1.31.1"));
        touch(search.explicit.as_ref().unwrap());
        let place = search.run().places.remove(0);
        let State::Skipped { reason } = place.state else { panic!("{place:?}") };
        assert!(reason.starts_with("no CUDA provider") && reason.contains("not beside it"), "{reason}");
        touch(&root.path().join("lib").join(Provider::Cuda.library().unwrap()));
        assert!(search.run().library().is_some());
        search.explicit = None;
        let capi = cached(&search.cache, Provider::Cuda);
        touch(&capi.join("libonnxruntime.so.1.31.1"));
        touch(&capi.join(Provider::Cuda.library().unwrap()));
        assert_eq!(search.run().library().unwrap().origin, Origin::Cache);
    }

    #[test]
    fn an_old_library_is_passed_over_with_a_reason() {
        let root = tempfile::tempdir().unwrap();
        let capi = root.path().join("site-packages/onnxruntime/capi");
        touch(&capi.join("onnxruntime.dll"));
        touch(&root.path().join("site-packages/onnxruntime-1.17.3.dist-info/METADATA"));
        touch(&root.path().join("site-packages/onnxruntime_genai-1.30.0.dist-info/METADATA"));
        touch(&root.path().join("lib/libonnxruntime.1.24.4.dylib"));
        let found = empty(root.path()).run();
        let library = found.library().unwrap();
        assert_eq!((library.origin, library.version.as_deref()), (Origin::System, Some("1.24.4")));
        let python = found.places.iter().find(|p| p.origin == Origin::Python).unwrap();
        assert_eq!(python.state, State::Skipped { reason: "release 1.17.3 is older than 1.24".into() });
    }

    #[test]
    fn names_of_every_system_are_known_and_providers_are_not_taken_for_the_library() {
        for good in ["libonnxruntime.so", "libonnxruntime.so.1.32.0", "libonnxruntime.1.32.0.dylib", "onnxruntime.dll"]
        {
            assert!(is_library_name(good), "{good}");
        }
        for bad in ["libonnxruntime_providers_shared.so", "onnxruntime_providers_shared.dll", "libonnxruntime.so.debug"]
        {
            assert!(!is_library_name(bad), "{bad}");
        }
    }

    #[test]
    fn the_symbol_version_inside_a_library_tells_its_release() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("libonnxruntime.so");
        fs::write(&path, b"\x7fELF\0OrtGetApiBase\0VERS_1.20.1\0more").unwrap();
        let place = examine(Origin::System, &path);
        assert_eq!(place.state, State::Skipped { reason: "release 1.20.1 is older than 1.24".into() });
    }
}
