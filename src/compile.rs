//! The whole compiler in one function: [`compile`].

mod manifest;

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::bind::{self, Head, Initializer, Plan, Rest};
use crate::build::{self, Logits};
use crate::describe::{self, Description};
use crate::element::{CacheType, ElementType};
use crate::error::{Code, Error, Result};
use crate::graph::{Graph, Node};
use crate::lower::{self, Cache, CacheScales, Lowered, Padding, Precision, Stored};
use crate::opset::{Positions, Target};
use crate::read::{Adapter, Repository, check_token_ids, hash_bytes};
use crate::recipe::{self, Calibrated, Quantization, Recipe};
use crate::scaffold;
use crate::stage::stage;
use crate::synth;
use crate::write::{self, ConsumerFiles, DataFile, Force, Layout, LinkReport, Signature, Staging, data_name};
use manifest::Manifest;

/// What is to be built.
#[derive(Debug, Clone)]
pub struct Options {
    /// The repository's directory.
    pub repository: PathBuf,
    /// Whether an adapter beside the model may be there.
    pub adapter: Adapter,
    /// A template of the user's own.
    pub template: Option<PathBuf>,
    /// The operators that exist.
    pub target: &'static Target,
    /// Float type of weights; and of caches and computation, unless the target has one of its own for those.
    pub element: ElementType,
    /// Padding that must be exact.
    pub padding: Padding,
    /// Where the graph takes positions from.
    pub positions: Positions,
    /// Which positions' logits are computed.
    pub logits: Logits,
    /// Longest sequence that consumers are told of; the model's own without it.
    pub max_length: Option<usize>,
    /// Keys of config.json that may stay unread.
    pub allowed_keys: Vec<String>,
    /// Tensors that may stay unread: names, or patterns with `*`.
    pub allowed_tensors: Vec<String>,
    /// Where the graph finds its weights.
    pub weights: Weights,
    /// How matrices are quantised; without it they stay what they are, and so do those that a checkpoint has quantised.
    pub recipe: Option<Recipe>,
    /// What caches of keys and values are held in.
    pub cache: KvCache,
}

/// What caches of keys and values are held in.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum KvCache {
    /// In what is computed in.
    #[default]
    Float,
    /// In 8 bits, with a scale for each element of each head. Without scales a model compiles, but is not written.
    Quantized(CacheType, Option<Measured>),
}

impl KvCache {
    /// What they hold, if they are not float.
    pub fn kind(&self) -> Option<CacheType> {
        match self {
            Self::Float => None,
            Self::Quantized(kind, _) => Some(*kind),
        }
    }
}

/// Scales of caches, and the text on which they were measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The scales.
    pub scales: CacheScales,
    /// The text.
    pub record: Calibrated,
}

/// Where a graph finds its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// In files of its own, in the build's element type.
    Pack {
        /// No file grows over so many bytes.
        shard_size: Option<u64>,
    },
    /// In the checkpoint's files, as far as no arithmetic is needed; those are linked into the output.
    Link {
        /// Whether the linked files are read once for their hashes.
        hash: bool,
    },
}

/// A model on its way from a repository to a directory: everything that is known before a weight is read.
#[derive(Debug)]
pub struct Compiled {
    /// The repository.
    pub repository: Repository,
    /// What the model is.
    pub description: Description,
    /// The model as composite operations.
    pub model: Graph<build::Model>,
    /// The model as operators of the target.
    pub lowered: Lowered,
    /// Where its weights come from.
    pub plan: Plan,
    /// Where they lie in the output.
    pub layout: Layout,
    /// What was quantised, or left quantised.
    pub quantization: Option<Quantization>,
    /// Where the repository's files contradict each other, which was believed, and what was not looked at.
    pub notes: Vec<String>,
}

/// Reads, describes, builds, lowers and binds a model.
pub fn compile(options: &Options) -> Result<Compiled> {
    let mut repository = stage!("read", Repository::open_with(&options.repository, options.adapter))?;
    check_token_ids(&repository.config, &options.repository.join("config.json"))?;
    let description = stage!("describe", {
        describe::choose(&repository.config, options.template.as_deref())
            .map_err(|error| scaffold::with_nearest(error, &mut repository))
            .and_then(|template| describe::describe(&template, &repository.config, &options.allowed_keys))
    })?;
    compile_description(repository, description, options)
}

/// Builds, lowers and binds a model that is described already.
pub fn compile_description(
    mut repository: Repository,
    mut description: Description,
    options: &Options,
) -> Result<Compiled> {
    if !options.target.dtypes.contains(&options.element) {
        let names: Vec<String> = options.target.dtypes.iter().map(ToString::to_string).collect();
        return Err(Error::new(Code::UsageInvalid, format!("--dtype on target {}", options.target.name))
            .found(options.element)
            .expected(names.join(", ")));
    }
    let model = stage!("build", build::decoder(&description.spec, options.logits))?;
    stage!("read", recognise(&mut repository, &mut description, &model))?;
    let (model, head) =
        stage!("compare", Head::settle(model, &mut description, &repository.checkpoint, options.logits))?;
    let (rules, checkpoint) = (&description.rules, &repository.checkpoint);
    let parameters = stage!("bind", bind::parameters(&model, rules, checkpoint))?;
    let (stored, shard_size) = match options.weights {
        Weights::Link { .. } => (Some(bind::stored(&parameters, checkpoint)), None),
        Weights::Pack { shard_size } => (None, shard_size),
    };
    let (recipe, kept) = (options.recipe.clone().unwrap_or_default(), recipe::Stored::new(&parameters, checkpoint));
    let precision = recipe.precision(&model, kept.as_ref());
    let lowering = options.lowering(stored.as_ref(), Some(&precision));
    let lowered = stage!("lower", lower::lower(&model, &lowering))?;
    let rest = Rest { rules, spec: &description.spec, head: &head, allowed: &options.allowed_tensors };
    let plan = stage!("plan", bind::plan(parameters, &lowered.graph, rest, checkpoint))?;
    if let Some(recipe) = &options.recipe {
        recipe.check(&plan, &lowered.notes, &options.target.name)?;
    }
    let layout = stage!("plan", Layout::new(&plan, checkpoint, shard_size))?;
    let asked = kept.is_some() || options.recipe.is_some();
    let quantization = asked.then(|| recipe.record(&plan, kept.as_ref(), &lowered.refused));
    if options.recipe.as_ref().is_some_and(Recipe::is_stored) && kept.is_none() {
        return Err(Error::new(Code::UsageInvalid, "--quant stored")
            .found("a checkpoint that is not quantised")
            .expected("a quantised one, whose integers can be kept")
            .help("name a scheme to quantise with; --accuracy-level alone means --quant stored"));
    }
    let notes = checkpoint.notes().iter().chain(head.note()).cloned();
    let notes = notes.chain(options.unread(&plan)).chain(description.notes()).collect();
    Ok(Compiled { repository, description, model, lowered, plan, layout, quantization, notes })
}

/// Quantised weights become the floats that the architecture has, and the keys that say so are accounted for.
fn recognise(repository: &mut Repository, description: &mut Description, model: &Graph<build::Model>) -> Result<()> {
    let shapes = OnceCell::new();
    repository
        .decode(&|name| shapes.get_or_init(|| synth::tensor_shapes(model, &description.rules)).get(name).cloned())?;
    let keys = repository.checkpoint.catalogue().map(|catalogue| &catalogue.keys);
    description.accounting.with_storage(repository.storage_keys(), keys);
    Ok(())
}

/// What it takes to build and to load a model, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// The graph file.
    pub graph: u64,
    /// Weights that are written.
    pub written: u64,
    /// Weights that stay in the checkpoint's files.
    pub linked: u64,
    /// Memory that every session spends on matrices which are stored narrower than they are used.
    pub widened: u64,
}

/// A directory that is written but not yet in its place.
#[derive(Debug)]
pub struct Written {
    staging: Staging,
    manifest: Manifest,
    /// The files beside the model.
    pub files: ConsumerFiles,
    /// What became of the checkpoint's files that the graph refers to.
    pub links: LinkReport,
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
    write_calibrated(compiled, options, output, force, None, progress)
}

/// As [`write`], with matrices quantised for the inputs that they meet, as far as those are known.
pub fn write_calibrated(
    compiled: &Compiled,
    options: &Options,
    output: &Path,
    force: Force,
    calibration: Option<(&mut dyn write::Calibration, Calibrated)>,
    progress: impl FnMut(u64) + Send,
) -> Result<Written> {
    if let KvCache::Quantized(kind, None) = &options.cache {
        return Err(Error::new(Code::UsageInvalid, format!("--kv-cache {kind}"))
            .found("no scales for what is cached")
            .expected("those that were measured while the model read a text")
            .help("give one: --calibrate FILE"));
    }
    let (calibration, record) = calibration.unzip();
    let proto = stage!("encode", compiled.encode(options));
    // Before room is asked for: where nothing can be made, there is none.
    let staging = Staging::new(output, force)?;
    write::check_space(output, compiled.layout.written_bytes().saturating_add(proto.len() as u64))?;
    let folder = staging.path().join("onnx");
    fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, &error))?;
    let name = compiled.file_name(options);
    let (plan, layout, checkpoint) = (&compiled.plan, &compiled.layout, &compiled.repository.checkpoint);
    let links = stage!("link", write::link(checkpoint, &layout.linked, &folder))?;
    let hash = matches!(options.weights, Weights::Pack { .. } | Weights::Link { hash: true });
    let place = (folder.as_path(), name.as_str());
    let streamed = stage!("weights", write::stream(plan, layout, checkpoint, place, hash, calibration, progress))?;
    let graph = folder.join(&name);
    fs::write(&graph, &proto).map_err(|error| Error::io(&graph, &error))?;
    let (repository, signature) = (&compiled.repository, compiled.signature(options));
    let files = stage!("other files", write::write_consumer_files(repository, &signature, staging.path()))?;
    let mut manifest = Manifest::new(compiled, options, streamed, hash_bytes(&name, &proto))?;
    manifest.calibrated(record);
    let written = Written { staging, manifest, files, links };
    stage!("other files", written.write_manifest())?;
    Ok(written)
}

impl Written {
    /// Where the files are until they are committed.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// What its user should know of it.
    pub fn notes(&self) -> impl Iterator<Item = &String> {
        self.manifest.notes.iter().chain(&self.files.notes)
    }

    /// Records how far the model was verified.
    pub fn record_verification(&mut self, report: Value) -> Result<()> {
        self.manifest.verification = Some(report);
        self.write_manifest()
    }

    /// Puts the directory in its place.
    pub fn commit(self) -> Result<()> {
        stage!("commit", self.staging.commit())
    }

    fn write_manifest(&self) -> Result<()> {
        let path = self.staging.path().join("hf2onnx.json");
        let text =
            serde_json::to_string_pretty(&self.manifest).map_err(|e| Error::new(Code::Io, path.display()).found(e))?;
        fs::write(&path, text + "\n").map_err(|e| Error::io(&path, &e))
    }
}

impl Options {
    /// What lowering takes of it.
    pub fn lowering<'s>(&'s self, stored: Option<&'s Stored>, precision: Option<&'s Precision>) -> lower::Options<'s> {
        let cache = match &self.cache {
            KvCache::Float => Cache::Float,
            KvCache::Quantized(kind, measured) => Cache::Quantized(*kind, measured.as_ref().map(|m| &m.scales)),
        };
        let Self { target, element, padding, positions, .. } = *self;
        lower::Options { target, element, padding, positions, stored, precision, cache }
    }

    /// A word on linked weights that a session casts to a type which may not hold them: they are not read here.
    fn unread(&self, plan: &Plan) -> Option<String> {
        let wider = |i: &&Initializer| i.linked.is_some() && matches!(i.element, ElementType::F32 | ElementType::BF16);
        let first = plan.initializers.iter().filter(|_| self.computed() == ElementType::F16).find(wider)?;
        Some(format!(
            "sessions cast linked {} weights to float16 ({} and others): whether it holds their values was not looked at; --weights pack does",
            first.element, first.name
        ))
    }

    /// What the graph computes in.
    pub fn computed(&self) -> ElementType {
        self.target.compute.unwrap_or(self.element)
    }
}

impl Compiled {
    /// Name of the graph file; the suffixes are those by which transformers.js asks for a type.
    fn file_name(&self, options: &Options) -> String {
        let suffix = match (self.suffix(), options.element) {
            (Some(suffix), _) => suffix,
            (None, ElementType::F16) => "_fp16",
            (None, ElementType::BF16) => "_bf16",
            (None, _) => "",
        };
        format!("model{suffix}.onnx")
    }

    /// Whether any matrix is held as integers.
    pub fn has_integers(&self) -> bool {
        self.plan.initializers.iter().any(|initializer| initializer.quantized.is_some())
    }

    /// What consumers call its integers, if it has any.
    fn suffix(&self) -> Option<&'static str> {
        self.quantization.as_ref().map(|quantization| quantization.suffix).filter(|suffix| !suffix.is_empty())
    }

    /// The graph file.
    pub fn encode(&self, options: &Options) -> Vec<u8> {
        let name = self.file_name(options);
        let location = |file: DataFile| match file {
            DataFile::Written(index) => data_name(&name, index),
            // Names inside a repository are written with `/` on every system.
            DataFile::Linked(index) => {
                self.repository.checkpoint.files().get(index).map_or(String::new(), |file| file.name.clone())
            }
        };
        write::encode(&self.lowered.graph, options.target, &self.plan, &self.layout.extents, location)
    }

    /// What it takes to build and to load this model.
    pub fn cost(&self, options: &Options) -> Cost {
        let narrow = |i: &&Initializer| {
            i.quantized.is_none() && i.shape.len() > 1 && i.element.size() < options.computed().size()
        };
        let widened = self.plan.initializers.iter().filter(narrow);
        Cost {
            graph: self.encode(options).len() as u64,
            written: self.layout.written_bytes(),
            linked: self.layout.linked_bytes(),
            widened: widened.map(|i| i.bytes() / i.element.size() as u64 * options.computed().size() as u64).sum(),
        }
    }

    /// What consumers are told of the model. Where layers differ, the first one speaks for them: consumers
    /// take the cache's shapes from the graph.
    fn signature(&self, options: &Options) -> Signature {
        let spec = &self.description.spec;
        let attention = spec.layers.first().map(|layer| &layer.attention);
        let fused = |node: &Node<lower::Operator>| node.whole().any(|node| node.op.op_type == "GroupQueryAttention");
        let fused = self.lowered.graph.nodes.iter().filter(|node| fused(node)).count();
        Signature {
            onnx_file: format!("onnx/{}", self.file_name(options)),
            dtype: options.element,
            quantized: self.suffix().map(|suffix| suffix.trim_start_matches('_')),
            cache: options.cache.kind().map_or(options.computed(), CacheType::element),
            data_files: self.layout.written.len(),
            vocab_size: spec.vocab_size,
            context_length: options.max_length.unwrap_or(spec.context_length).min(spec.context_length),
            hidden_size: spec.hidden_size,
            layers: spec.layers.iter().filter(|layer| layer.attention.shares.is_none()).count(),
            attention_heads: attention.map_or(0, |a| a.heads),
            kv_heads: attention.map_or(0, |a| a.kv_heads),
            head_size: attention.map_or(0, |a| a.key_size),
            share_buffer: fused == spec.layers.len(),
            provider: options.target.provider.clone(),
            position_ids: options.positions == Positions::Ids,
        }
    }
}
