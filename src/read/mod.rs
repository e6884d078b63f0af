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

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use crate::element::StoredType;
pub use checkpoint::{Checkpoint, ShardFile, TensorInfo};
pub use hash::{FileHash, hash_files};
pub(crate) use hash::{file_name, hash_bytes, hash_file, hex};
pub use header::safetensors_header;
pub use json::{json_file, json_object};
pub use locate::safetensors_index;
pub use path::contained;

use crate::error::{Code, Error, Result};

/// A Hugging Face model repository on disk.
#[derive(Debug)]
pub struct Repository {
    /// The directory, as it was given.
    pub dir: PathBuf,
    /// `config.json`, its keys in the order of the file.
    pub config: Map<String, Value>,
    /// `generation_config.json`, where there is one.
    pub generation_config: Option<Map<String, Value>>,
    /// The weights.
    pub checkpoint: Checkpoint,
}

impl Repository {
    /// Opens a repository: reads its configuration and the headers of its weights.
    pub fn open(dir: &Path) -> Result<Self> {
        check_directory(dir)?;
        let config = match dir.join("config.json").symlink_metadata() {
            Ok(_) => json_file(&contained(dir, "config.json")?)?,
            Err(_) => return Err(config_missing(dir)),
        };
        let generation_config = match dir.join("generation_config.json").symlink_metadata() {
            Ok(_) => Some(json_file(&contained(dir, "generation_config.json")?)?),
            Err(_) => None,
        };
        Ok(Self { dir: dir.to_owned(), config, generation_config, checkpoint: Checkpoint::open(dir)? })
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
