//! onnxruntime's execution providers: where a model runs.

use serde::Serialize;

/// An execution provider of onnxruntime.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provider {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// The release of onnxruntime that [`super::install`] fetches for a provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    /// Its name in package indices.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
}

impl Pinned {
    /// Name of its folder in hf2onnx's cache.
    pub fn folder(self) -> String {
        format!("{}-{}", self.package, self.version)
    }
}

impl Provider {
    /// The name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// The name that onnxruntime gives it.
    pub fn onnxruntime_name(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::Cuda => "CUDAExecutionProvider",
        }
    }

    /// The release that is installed for it.
    pub fn pinned(self) -> Pinned {
        match self {
            Self::Cpu => Pinned { package: "onnxruntime", version: super::PINNED_VERSION },
            // The newest one that has a GPU wheel; built for CUDA 13.
            Self::Cuda => Pinned { package: "onnxruntime-gpu", version: "1.31.1" },
        }
    }

    /// The library that onnxruntime loads for it, from the folder of its own; none for the processor, which is built in.
    pub fn library(self) -> Option<&'static str> {
        match self {
            Self::Cpu => None,
            Self::Cuda if cfg!(windows) => Some("onnxruntime_providers_cuda.dll"),
            Self::Cuda => Some("libonnxruntime_providers_cuda.so"),
        }
    }
}
