//! `hf2onnx runtime`.

use clap::{Args, Subcommand};
use serde_json::json;

use super::provider::ProviderName;
use super::{Output, RuntimeOption};
use crate::error::{Code, Error, Result};
use crate::runtime::{
    Cuda, CudaLibrary, Findings, Place, Provider, State, check_cuda, check_installed, environment, install,
};

/// Show which onnxruntime is used and where it was looked for.
///
/// The order is: --runtime, `ORT_DYLIB_PATH`, hf2onnx's cache, Python's site-packages, the system's library folders. With
/// `--provider cuda` also the driver, the libraries of CUDA and cuDNN with their versions, and what is missing.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hf2onnx runtime\n  hf2onnx runtime install\n  hf2onnx runtime --provider cuda\n  \
    hf2onnx runtime install --provider cuda"
)]
pub(super) struct Runtime {
    /// The provider that it is for
    #[arg(long, value_enum, default_value_t, global = true)]
    provider: ProviderName,
    #[command(flatten)]
    library: RuntimeOption,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Let pip download the pinned onnxruntime and put its library into hf2onnx's cache
    ///
    /// For `--provider cuda` that is onnxruntime-gpu with the libraries of CUDA and cuDNN that it names: some 1.6 GB to
    /// download, 2.4 GB on the disk.
    #[command(after_help = "Example:\n  hf2onnx runtime install --provider cuda")]
    Install,
}

impl Runtime {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let provider = Provider::from(self.provider);
        let search = self.library.search(provider);
        let pinned = provider.pinned();
        if let Some(Action::Install) = self.action {
            let library = install(provider, &search.cache, &mut |line| output.say(line))?;
            environment(&library.path)?;
            if output.is_json() {
                return output.value(&library);
            }
            output.line(&format!("{} {}: {}", pinned.package, pinned.version, library.path.display()));
            return Ok(());
        }
        let found = search.run();
        // A library that was installed is compared with what was recorded; one that is used is loaded.
        let damage = check_installed(provider, &search.cache).err();
        let loads = found.library().map(|library| environment(&library.path).map(|_| library));
        let used = loads.as_ref().and_then(|l| l.as_ref().ok());
        let cuda = Cuda::look(used.map(|library| library.path.as_path()), &search.cache);
        if output.is_json() {
            output.value(&json!({
                "provider": provider, "used": used, "places": found.places, "pinned": pinned.version, "cuda": cuda,
            }))?;
        } else {
            print(&found, output);
            print_cuda(&cuda, provider, output);
        }
        if let Some(error) = damage {
            return Err(error);
        }
        match loads {
            Some(loads) => loads.map(drop)?,
            None => return Err(none(provider)),
        }
        if provider == Provider::Cuda { check_cuda(&cuda) } else { Ok(()) }
    }
}

fn none(provider: Provider) -> Error {
    let error = Error::new(Code::RuntimeMissing, "onnxruntime");
    match provider {
        Provider::Cpu => error
            .found("no usable library")
            .help("run `hf2onnx runtime install`; commands that need it install it by themselves"),
        Provider::Cuda => error
            .found("no usable library with the CUDA provider")
            .help("run `hf2onnx runtime install --provider cuda`"),
    }
}

/// A line for the driver, and for a GPU one for each library.
fn print_cuda(cuda: &Cuda, provider: Provider, output: &mut Output) {
    let driver = &cuda.driver;
    let version = driver.version.as_deref().unwrap_or("of unknown version");
    let gpus = driver.gpus.iter().map(|gpu| match gpu.memory_mib {
        Some(memory) => format!("{}, {memory} MiB", gpu.name),
        None => gpu.name.clone(),
    });
    let gpus = gpus.collect::<Vec<_>>().join("; ");
    let found = match (driver.library, gpus.as_str()) {
        (false, _) => "none".to_owned(),
        (true, "") => format!("{version}, no GPU listed"),
        (true, gpus) => format!("{version}: {gpus}"),
    };
    output.line(&format!("{:<24} {found}", "NVIDIA driver"));
    if provider != Provider::Cuda {
        return;
    }
    for CudaLibrary { name, required, path, version } in &cuda.libraries {
        let state = match path {
            Some(path) => format!("{} ({})", path.display(), version.as_deref().unwrap_or("of unknown version")),
            None if *required => "missing".to_owned(),
            None => "nothing; needed by few operators".to_owned(),
        };
        output.line(&format!("{name:<24} {state}"));
    }
}

fn print(found: &Findings, output: &mut Output) {
    let used = found.library();
    for place in &found.places {
        let state = match &place.state {
            State::Usable { version } => {
                let version = version.as_deref().unwrap_or("of unknown version");
                let mark = if place.library() == used { ", used" } else { "" };
                format!("{} ({version}{mark})", place.shown())
            }
            State::Skipped { reason } => format!("{}: {reason}", place.shown()),
            State::Absent => absent(place),
        };
        output.line(&format!("{:<24} {state}", place.origin.as_str()));
    }
}

fn absent(place: &Place) -> String {
    place.path.as_ref().map_or_else(|| "nothing".to_owned(), |p| format!("nothing in {}", p.display()))
}
