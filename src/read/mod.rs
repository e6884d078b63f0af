//! Reading: a model repository's configuration and weights, checked, and nothing of it executed.
//!
//! Every file is untrusted. Sizes are compared with the file before anything is allocated, names and
//! links that lead out of the repository are refused, and weights stay on disk until they are asked for.

mod checkpoint;
mod file;
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
    pub fn open(dir: &Path) -> Result<Self> {
        check_directory(dir)?;
        let mut config = match dir.join("config.json").symlink_metadata() {
            Ok(_) => json_file(&contained(dir, "config.json")?)?,
            Err(_) => return Err(config_missing(dir)),
        };
        let generation_config = match dir.join("generation_config.json").symlink_metadata() {
            Ok(_) => Some(json_file(&contained(dir, "generation_config.json")?)?),
            Err(_) => None,
        };
        let settings = quantized::Settings::take(dir, &mut config)?;
        Ok(Self { dir: dir.to_owned(), config, generation_config, checkpoint: Checkpoint::open(dir)?, settings })
    }

    /// Has the checkpoint present quantised weights as the floats that they stand for. Nothing happens to one that is
    /// not quantised. `shapes` says which shape the architecture gives a weight; few formats need it.
    ///
    /// # Errors
    /// A format that is not read, and weights that are not what their configuration says.
    pub fn decode(&mut self, shapes: &Shapes<'_>) -> Result<()> {
        self.settings.decode(&mut self.checkpoint, shapes)
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
