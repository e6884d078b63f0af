//! Reading: a model repository's configuration and weights, checked, and nothing of it executed.
//!
//! Every file is untrusted. Sizes are compared with the file before anything is allocated, names and
//! links that lead out of the repository are refused, and weights stay on disk until they are asked for.

mod checkpoint;
mod file;
mod generation;
mod hash;
mod header;
mod json;
mod locate;
mod path;
mod quantized;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use crate::element::StoredType;
pub use checkpoint::{Checkpoint, ShardFile, TensorInfo};
pub(crate) use generation::{GENERATION_KEYS, check_token_ids, from_model_config, token_numbers, whole};
pub use hash::{FileHash, hash_files};
pub(crate) use hash::{file_name, hash_bytes, hash_file, hex};
pub use header::safetensors_header;
pub(crate) use json::text_file;
pub use json::{json_file, json_object};
pub use locate::safetensors_index;
pub use path::contained;

use crate::encoding::Shapes;
use crate::error::{Code, Error, Result};

/// A Hugging Face model repository on disk.
#[derive(Debug)]
pub struct Repository {
    /// The directory, as it was given.
    pub dir: PathBuf,
    /// `config.json`, its keys in the order of the file, without those that say how weights are stored.
    pub config: Map<String, Value>,
    /// `generation_config.json`, where there is one.
    pub generation_config: Option<Map<String, Value>>,
    /// The weights.
    pub checkpoint: Checkpoint,
    /// How the weights are stored, as far as the files beside them say it.
    settings: quantized::Settings,
}

impl Repository {
    /// Opens a repository: reads its configuration and the headers of its weights.
    ///
    /// # Errors
    /// A file that is missing or broken, or an adapter beside the model.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_with(dir, Adapter::Refuse)
    }

    /// As [`Repository::open`]; an adapter beside the model may be ignored.
    pub fn open_with(dir: &Path, adapter: Adapter) -> Result<Self> {
        check_directory(dir)?;
        if adapter == Adapter::Refuse {
            refuse_adapter(dir)?;
        }
        let (config, settings) = configuration(dir)?;
        let generation_config = match dir.join("generation_config.json").symlink_metadata() {
            Ok(_) => Some(json_file(&contained(dir, "generation_config.json")?)?),
            Err(_) => None,
        };
        Ok(Self { dir: dir.to_owned(), config, generation_config, checkpoint: Checkpoint::open(dir)?, settings })
    }

    /// [`Self::config`] of a repository whose weights may be missing or unreadable.
    pub fn config_of(dir: &Path) -> Result<Map<String, Value>> {
        configuration(dir).map(|(config, _)| config)
    }

    /// Has the checkpoint present quantised weights as the floats that they stand for. Nothing happens to one that is
    /// not quantised. `shapes` says which shape the architecture gives a weight; few formats need it.
    ///
    /// # Errors
    /// A format that is not read, and weights that are not what their configuration says.
    pub fn decode(&mut self, shapes: &Shapes<'_>) -> Result<()> {
        self.settings.decode(&mut self.checkpoint, shapes)
    }

    /// The adapter beside the model that was not applied.
    pub(crate) fn ignored_adapter(&self) -> Result<Option<FileHash>> {
        if !has_adapter(&self.dir) {
            return Ok(None);
        }
        let hash = hash_files(&[contained(&self.dir, ADAPTER)?])?;
        Ok(hash.into_iter().next())
    }

    /// The files that say what the model is and how its weights are stored.
    pub fn configurations(&self) -> Vec<PathBuf> {
        let names = std::iter::once("config.json").chain(self.settings.files());
        names.map(|name| self.dir.join(name)).collect()
    }

    /// Keys that say how weights are stored, and are not in [`Self::config`], with what stands there.
    pub fn storage_keys(&self) -> impl Iterator<Item = (String, &Value)> {
        self.settings.taken()
    }
}

/// What the model is, and how its weights are stored.
fn configuration(dir: &Path) -> Result<(Map<String, Value>, quantized::Settings)> {
    check_directory(dir)?;
    let mut config = match dir.join("config.json").symlink_metadata() {
        Ok(_) => json_file(&contained(dir, "config.json")?)?,
        Err(_) => return Err(config_missing(dir)),
    };
    let settings = quantized::Settings::take(dir, &mut config)?;
    Ok((config, settings))
}

/// What an adapter beside the model means: transformers applies it where peft is installed, and does not where it is
/// not; whether it is in the weights already only the user knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Adapter {
    /// It is an error.
    #[default]
    Refuse,
    /// The weights are taken as they are.
    Ignore,
}

/// The file by which transformers knows an adapter. Weights without it change nothing.
const ADAPTER: &str = "adapter_config.json";

/// True if an adapter lies beside the model.
pub(crate) fn has_adapter(dir: &Path) -> bool {
    dir.join(ADAPTER).symlink_metadata().is_ok()
}

fn refuse_adapter(dir: &Path) -> Result<()> {
    // Without a model of its own it is the missing weights that are told of.
    if !has_adapter(dir) || !locate::has_model(dir)? {
        return Ok(());
    }
    Err(Error::new(Code::WeightsAmbiguous, dir.join(ADAPTER).display())
        .found("an adapter beside the model")
        .expected("one set of weights: transformers changes the model by the adapter where peft is installed")
        .help(
            "merge it first (`merge_and_unload` in peft, then save the model elsewhere), or pass --ignore-adapter to take \
             the model's own weights as they are",
        ))
}

fn check_directory(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let error = Error::new(Code::Io, dir.display()).expected("a directory that holds a model repository");
    if dir.exists() {
        return Err(error.found("a file").help("give the directory that the file lies in"));
    }
    Err(error
        .found("no such directory")
        .help("check the path; a model of the Hugging Face hub is named org/name or org/name@revision"))
}

fn config_missing(dir: &Path) -> Error {
    Error::new(Code::ConfigMissing, dir.join("config.json").display())
        .found("no such file")
        .expected("the model's configuration, as transformers writes it")
        .help("give the directory of a model repository; for a download, check that it is complete")
}
