//! Opening: the file of a directory, and the session of a file.

use std::fs;
use std::path::{Path, PathBuf};

use ort::environment::Environment;
use ort::ep::{ArbitrarilyConfigurableExecutionProvider as _, ExecutionProviderDispatch};
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use prost::Message as _;

use super::placement::Profile;
use super::{Dim, HIDDEN, Options, StateSlot};
use crate::error::{Code, Error, Result};
use crate::onnx::{GraphProto, ModelProto, ValueInfoProto};
use crate::regular;
use crate::runtime::Provider;

/// The one way to make a session: what [`Options`] say, and nothing that depends on the model.
pub(super) fn builder(
    environment: &Environment,
    options: &Options,
    profile: Option<&Profile>,
) -> ort::Result<SessionBuilder> {
    let mut builder = Session::builder(environment)?;
    if options.threads > 0 {
        builder = builder.with_intra_threads(options.threads)?;
    }
    if let Some(profile) = profile {
        builder = builder.with_profiling(profile.prefix())?;
    }
    match options.provider {
        Provider::Cpu => Ok(builder),
        Provider::Cuda => Ok(builder.with_execution_providers([cuda(options)])?),
    }
}

/// The CUDA provider, which is there or an error.
fn cuda(options: &Options) -> ExecutionProviderDispatch {
    // Products of float32 in TensorFloat-32, onnxruntime's default, are not those of float32.
    let mut provider = ort::ep::CUDA::default().with_tf32(false);
    for (key, value) in &options.provider_options {
        provider = provider.with_arbitrary_config(key, value);
    }
    provider.build().error_on_failure()
}

/// A session of a model's file.
pub(super) fn open_session(
    environment: &Environment,
    file: &Path,
    options: &Options,
    profile: Option<&Profile>,
) -> ort::Result<Session> {
    let mut builder = builder(environment, options, profile)?;
    if !options.hidden_states {
        return builder.commit_from_file(file);
    }
    let bytes = regular::read(file, regular::GRAPH).map_err(|e| ort::Error::new(e.to_string()))?;
    let bytes = with_hidden_states(bytes).map_err(|e| ort::Error::new(e.to_string()))?;
    from_bytes(builder, file, &bytes)
}

/// A session of a model made from a file, whose weights lie beside that file.
pub(super) fn from_bytes(builder: SessionBuilder, file: &Path, bytes: &[u8]) -> ort::Result<Session> {
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = std::path::absolute(folder).map_err(|e| ort::Error::new(e.to_string()))?;
    builder
        .with_config_entry("session.model_external_initializers_file_folder_path", folder.to_string_lossy())?
        .commit_from_memory(bytes)
}

/// Makes the values named `hidden_states.{i}` outputs of a model.
///
/// A protobuf message continues where its bytes end: appending a model whose graph has only outputs adds those
/// outputs and leaves every other byte, known to [`crate::onnx`] or not, as it was.
fn with_hidden_states(mut model: Vec<u8>) -> Result<Vec<u8>, prost::DecodeError> {
    let graph = ModelProto::decode(model.as_slice())?.graph.unwrap_or_default();
    let known: Vec<&str> = graph.output.iter().map(|o| o.name.as_str()).collect();
    let values = graph.node.iter().flat_map(|n| &n.output);
    let output: Vec<ValueInfoProto> = values
        .filter(|name| name.strip_prefix(HIDDEN).is_some_and(|i| i.parse::<usize>().is_ok()))
        .filter(|name| !known.contains(&name.as_str()))
        .map(|name| ValueInfoProto { name: name.clone(), r#type: None })
        .collect();
    let more = ModelProto { graph: Some(GraphProto { output, ..Default::default() }), ..Default::default() };
    model.extend(more.encode_to_vec());
    Ok(model)
}

/// The ONNX file of a directory.
pub(super) fn locate(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    let genai = path.join("genai_config.json");
    let text = match regular::read(&genai, regular::CONFIGURATION) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::io(&genai, &error)),
    };
    if let Some(text) = text {
        let config: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|e| Error::new(Code::ConfigInvalid, genai.display()).found(e).expected("JSON"))?;
        if let Some(name) = config.pointer("/model/decoder/filename").and_then(|v| v.as_str()) {
            return existing(path.join(name));
        }
    }
    let mut found: Vec<PathBuf> = [path.join("onnx"), path.to_path_buf()]
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "onnx"))
        .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("model")))
        .collect();
    // `model.onnx` before `model_fp16.onnx`, and the `onnx` folder before the directory itself.
    found.sort_by_key(|p| (p.components().count() == path.components().count() + 1, p.as_os_str().len(), p.clone()));
    existing(found.into_iter().next().unwrap_or_else(|| path.join("onnx/model.onnx")))
}

/// What `genai_config.json` says of the caches.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Caches {
    /// True if past and present may be one buffer.
    pub(super) shared: bool,
    /// Size of a head.
    pub(super) head_size: Option<usize>,
}

impl Caches {
    /// That of a directory; nothing where there is none.
    pub(super) fn of(directory: &Path) -> Self {
        let config = regular::read(&directory.join("genai_config.json"), regular::CONFIGURATION).ok();
        let Some(config) = config.and_then(|text| serde_json::from_slice(&text).ok()) else { return Self::default() };
        let config: serde_json::Value = config;
        let shared = config.pointer("/search/past_present_share_buffer").and_then(serde_json::Value::as_bool);
        let head_size = config.pointer("/model/decoder/head_size").and_then(serde_json::Value::as_u64);
        Self { shared: shared.unwrap_or(false), head_size: head_size.and_then(|size| size.try_into().ok()) }
    }

    /// Other exporters give the size of a head a name as well.
    pub(super) fn complete(self, slot: &mut StateSlot) {
        if let ([.., Dim::Length, last @ Dim::Length], Some(size)) = (slot.shape.as_mut_slice(), self.head_size) {
            *last = Dim::Fixed(size);
        }
    }
}

fn existing(file: PathBuf) -> Result<PathBuf> {
    if file.is_file() {
        return only_files_beside(&file).map(|()| file);
    }
    Err(Error::new(Code::Io, file.display())
        .found("no such file")
        .expected("a directory that `hf2onnx build` wrote, or an ONNX file")
        .help("check the path"))
}

/// onnxruntime opens the files that a graph names and waits for whoever writes into a pipe.
fn only_files_beside(file: &Path) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, &e))?.flatten() {
        let path = entry.path();
        // A link to nothing is an error where it is opened.
        let Ok(metadata) = path.metadata() else { continue };
        if !metadata.is_dir() {
            regular::check(&metadata).map_err(|e| Error::io(&path, &e))?;
        }
    }
    Ok(())
}

/// The environment that was loaded.
pub(super) fn environment() -> Result<&'static Environment> {
    crate::runtime::loaded().ok_or_else(|| {
        Error::new(Code::RuntimeMissing, "onnxruntime").found("no library was loaded").help("run `hf2onnx runtime`")
    })
}

const ELSEWHERE: &str = "a build for a GPU may run only there: --provider cuda";

/// onnxruntime's refusal to open a file.
pub(super) fn not_opened(file: &Path, options: &Options, error: impl std::fmt::Display) -> Error {
    let mut refused = super::refused(file, error);
    if options.provider == Provider::Cpu {
        let lacks =
            ["Could not find an implementation", "Failed to find kernel"].map(|words| refused.found.contains(words));
        return match lacks {
            [false, false] => refused,
            _ => refused.expected("operators that the processor has kernels for").help(ELSEWHERE),
        };
    }
    // The names of half a dozen functions stand before what CUDA said.
    if let Some(words) = refused.found.rfind("CUDA failure").and_then(|at| refused.found.get(at..)) {
        refused.found = words.split(" ; ").next().unwrap_or(words).trim().into();
    }
    refused
        .expected("a session with the CUDA provider")
        .help("`hf2onnx runtime --provider cuda` says what there is for it and what is missing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_states_are_added_as_outputs_and_other_bytes_stay() {
        let node = crate::onnx::NodeProto { output: vec!["hidden_states.0".into(), "x".into()], ..Default::default() };
        let graph = GraphProto { node: vec![node], name: "main".into(), ..Default::default() };
        let mut bytes = ModelProto { ir_version: 8, graph: Some(graph), ..Default::default() }.encode_to_vec();
        // Field 200, which this crate's messages do not know.
        bytes.extend([0xc2, 0x0c, 0x01, 0x2a]);
        let more = with_hidden_states(bytes.clone()).unwrap();
        assert!(more.starts_with(&bytes));
        let graph = ModelProto::decode(more.as_slice()).unwrap().graph.unwrap();
        assert_eq!((graph.name.as_str(), graph.node.len()), ("main", 1));
        assert_eq!(graph.output.iter().map(|o| o.name.as_str()).collect::<Vec<_>>(), ["hidden_states.0"]);
        assert_eq!(with_hidden_states(more.clone()).unwrap().len() - more.len(), 2);
    }

    #[test]
    fn what_cuda_said_is_kept_and_where_is_not() {
        let words = "/a/cuda_call.cc:154 void CudaCall() [with X = cudaError] CUDA failure 100: no CUDA-capable device is \
                     detected ; GPU=-1 ; hostname=vm ; expr=cudaSetDevice(); \n";
        let on = |provider| {
            let options = Options { provider, ..Options::default() };
            not_opened(Path::new("model.onnx"), &options, words)
        };
        let error = on(Provider::Cuda);
        assert_eq!(error.found, "CUDA failure 100: no CUDA-capable device is detected");
        assert!(error.help.contains("runtime --provider cuda"), "{error}");
        assert!(on(Provider::Cpu).help.is_empty());
        let words = "Failed to find kernel for com.microsoft.GroupQueryAttention(1) (ep:'CPUExecutionProvider')";
        assert!(not_opened(Path::new("model.onnx"), &Options::default(), words).help.contains("--provider cuda"));
    }
}
