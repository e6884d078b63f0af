//! The whole compiler in one function: [`compile`].

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::bind::{self, Plan};
use crate::build::{self, Logits};
use crate::describe::{self, Accounting, Description};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::lower::{self, Lowered, Note, Padding};
use crate::opset::Target;
use crate::read::{FileHash, Repository, hash_files};
use crate::scaffold;
use crate::spec::ModelSpec;
use crate::write::{self, ConsumerFiles, ExternalWriter, Force, Signature, Staging};

/// What is to be built.
#[derive(Debug, Clone)]
pub struct Options {
    /// The repository's directory.
    pub repository: PathBuf,
    /// A template of the user's own.
    pub template: Option<PathBuf>,
    /// The operators that exist.
    pub target: &'static Target,
    /// Float type of weights; and of caches and computation, unless the target has one of its own for those.
    pub element: ElementType,
    /// Padding that must be exact.
    pub padding: Padding,
    /// Which positions' logits are computed.
    pub logits: Logits,
    /// Longest sequence that consumers are told of; the model's own without it.
    pub max_length: Option<usize>,
    /// Keys of config.json that may stay unread.
    pub allowed_keys: Vec<String>,
    /// Tensors that may stay unread.
    pub allowed_tensors: Vec<String>,
}

/// A model on its way from a repository to a directory: everything that is known before a weight is read.
#[derive(Debug)]
pub struct Compiled {
    /// The repository.
    pub repository: Repository,
    /// What the model is.
    pub description: Description,
    /// The model as composite operations.
    pub model: crate::graph::Graph<build::Model>,
    /// The model as operators of the target.
    pub lowered: Lowered,
    /// Where its weights come from.
    pub plan: Plan,
}

/// Reads, describes, builds, lowers and binds a model.
pub fn compile(options: &Options) -> Result<Compiled> {
    let repository = Repository::open(&options.repository)?;
    let template = describe::choose(&repository.config, options.template.as_deref())
        .map_err(|error| scaffold::with_nearest(error, &repository.config, &repository.checkpoint))?;
    let description = describe::describe(&template, &repository.config, &options.allowed_keys)?;
    compile_description(repository, description, options)
}

/// Builds, lowers and binds a model that is described already.
pub fn compile_description(repository: Repository, description: Description, options: &Options) -> Result<Compiled> {
    let model = build::decoder(&description.spec, options.logits)?;
    let lowered = lower::lower(&model, &options.lowering())?;
    let (rules, tensors) = (&description.rules, &repository.checkpoint);
    let plan = bind::plan(&model, &lowered.graph, rules, tensors, &options.allowed_tensors)?;
    Ok(Compiled { repository, description, model, lowered, plan })
}

/// A directory that is written but not yet in its place.
#[derive(Debug)]
pub struct Written {
    staging: Staging,
    manifest: Manifest,
    /// The files beside the model.
    pub files: ConsumerFiles,
}

/// Writes a compiled model into a directory beside `output`; [`Written::commit`] puts it in its place.
/// `progress` is told of every chunk of weights.
pub fn write(
    compiled: &Compiled,
    options: &Options,
    output: &Path,
    force: Force,
    progress: impl FnMut(u64) + Send,
) -> Result<Written> {
    let staging = Staging::new(output, force)?;
    let io = |path: &Path| {
        let path = path.to_owned();
        move |e: std::io::Error| Error::io(&path, &e)
    };
    let folder = staging.path().join("onnx");
    fs::create_dir_all(&folder).map_err(io(&folder))?;
    let name = options.file_name();
    let data_name = format!("{name}_data");
    let mut writer = ExternalWriter::create(&folder.join(&data_name), progress)?;
    let extents = write::stream(&compiled.plan, &compiled.repository.checkpoint, &mut writer)?;
    let data = writer.finish()?;
    let proto = write::encode(&compiled.lowered.graph, options.target, &compiled.plan, &extents, &data_name);
    let graph = folder.join(&name);
    fs::write(&graph, proto).map_err(io(&graph))?;
    let files = write::write_consumer_files(&compiled.repository, &compiled.signature(options), staging.path())?;
    let manifest = Manifest::new(compiled, options, data, &graph)?;
    let written = Written { staging, manifest, files };
    written.write_manifest()?;
    Ok(written)
}

impl Written {
    /// Where the files are until they are committed.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Records how far the model was verified.
    pub fn verified(&mut self, report: Value) -> Result<()> {
        self.manifest.verified = Some(report);
        self.write_manifest()
    }

    /// Puts the directory in its place.
    pub fn commit(self) -> Result<()> {
        self.staging.commit()
    }

    fn write_manifest(&self) -> Result<()> {
        let path = self.staging.path().join("hf2onnx.json");
        let text =
            serde_json::to_string_pretty(&self.manifest).map_err(|e| Error::new(Code::Io, path.display()).found(e))?;
        fs::write(&path, text + "\n").map_err(|e| Error::io(&path, &e))
    }
}

/// `hf2onnx.json`: what was built, from what, and how far it was verified.
#[derive(Debug, Serialize)]
struct Manifest {
    hf2onnx: &'static str,
    target: String,
    dtype: String,
    padding: &'static str,
    logits: &'static str,
    onnx: String,
    verified: Option<Value>,
    sources: Vec<FileHash>,
    outputs: Vec<FileHash>,
    spec: ModelSpec,
    config_keys: Accounting,
    parameters: Vec<ParameterEntry>,
    dropped_tensors: std::collections::BTreeMap<String, String>,
    lowering: Vec<Note>,
}

/// What a parameter was made from.
#[derive(Debug, Serialize)]
struct ParameterEntry {
    name: String,
    shape: Vec<usize>,
    from: String,
}

impl Manifest {
    fn new(compiled: &Compiled, options: &Options, data: FileHash, graph: &Path) -> Result<Self> {
        let repository = &compiled.repository;
        let mut sources = vec![repository.dir.join("config.json")];
        sources.extend(repository.checkpoint.files().iter().map(|file| file.path.clone()));
        let mut outputs = hash_files(&[graph])?;
        outputs.push(data);
        let parameters = compiled.plan.parameters.iter().map(|parameter| ParameterEntry {
            name: parameter.name.clone(),
            shape: parameter.shape.clone(),
            from: parameter.weight.to_string(),
        });
        Ok(Self {
            hf2onnx: env!("CARGO_PKG_VERSION"),
            target: options.target.name.clone(),
            dtype: options.element.to_string(),
            padding: match options.padding {
                Padding::Any => "any",
                Padding::Right => "right",
            },
            logits: match options.logits {
                Logits::All => "all",
                Logits::Last => "last",
            },
            onnx: format!("onnx/{}", options.file_name()),
            verified: None,
            sources: hash_files(&sources)?,
            outputs,
            spec: compiled.description.spec.clone(),
            config_keys: compiled.description.accounting.clone(),
            parameters: parameters.collect(),
            dropped_tensors: compiled.plan.dropped.clone(),
            lowering: compiled.lowered.notes.clone(),
        })
    }
}

impl Options {
    /// What lowering takes of it.
    pub fn lowering(&self) -> lower::Options {
        lower::Options { target: self.target, element: self.element, padding: self.padding }
    }

    /// Name of the graph file; the suffixes are those by which transformers.js asks for a type.
    fn file_name(&self) -> String {
        let suffix = if self.element == ElementType::F16 { "_fp16" } else { "" };
        format!("model{suffix}.onnx")
    }
}

impl Compiled {
    /// What consumers are told of the model. Where layers differ, the first one speaks for them: consumers
    /// take the cache's shapes from the graph.
    fn signature(&self, options: &Options) -> Signature {
        let spec = &self.description.spec;
        let attention = spec.layers.first().map(|layer| &layer.attention);
        let fused = self.lowered.graph.nodes.iter().filter(|node| node.op.op_type == "GroupQueryAttention").count();
        Signature {
            onnx_file: format!("onnx/{}", options.file_name()),
            dtype: options.element,
            cache: options.target.compute.unwrap_or(options.element),
            data_files: 1,
            vocab_size: spec.vocab_size,
            context_length: options.max_length.unwrap_or(spec.context_length).min(spec.context_length),
            hidden_size: spec.hidden_size,
            layers: spec.layers.iter().filter(|layer| layer.attention.shares.is_none()).count(),
            attention_heads: attention.map_or(0, |a| a.heads),
            kv_heads: attention.map_or(0, |a| a.kv_heads),
            head_size: attention.map_or(0, |a| a.key_size),
            share_buffer: fused == spec.layers.len(),
            position_ids: true,
        }
    }
}
