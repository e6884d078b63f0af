//! The checkpoint's files beside the graph that uses their bytes as they are.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Error, Result};
use crate::read::{Checkpoint, ShardFile};

/// What became of the files that a graph refers to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkReport {
    /// Hard links: they take no room.
    pub linked: Vec<String>,
    /// Files of which a hard link could not be made, with their sizes, and why.
    pub copied: Vec<(String, u64, String)>,
}

/// Puts the checkpoint's files of these indices into `folder`, under their own names: as hard links, because
/// onnxruntime follows no symbolic link that leaves the model's directory; else as copies, which share their blocks
/// with the original where the file system can (reflink).
pub fn link(checkpoint: &Checkpoint, files: &[usize], folder: &Path) -> Result<LinkReport> {
    let mut report = LinkReport::default();
    for file in files.iter().filter_map(|index| checkpoint.files().get(*index)) {
        match place(file, folder)? {
            None => report.linked.push(file.name.clone()),
            Some(reason) => report.copied.push((file.name.clone(), file.size, reason)),
        }
    }
    Ok(report)
}

/// Links a file, or copies it and says why.
fn place(file: &ShardFile, folder: &Path) -> Result<Option<String>> {
    let path = folder.join(&file.name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
    }
    let Err(refused) = fs::hard_link(&file.path, &path) else { return Ok(None) };
    if refused.kind() == ErrorKind::NotFound {
        return Err(Error::io(&file.path, &refused));
    }
    // The standard library's copy clones blocks, or leaves the copying to the system, where that is possible.
    fs::copy(&file.path, &path).map_err(|error| Error::io(&path, &error))?;
    let reason = match refused.kind() {
        ErrorKind::CrossesDevices => "it lies on another file system".to_owned(),
        ErrorKind::PermissionDenied => "its owner does not allow links".to_owned(),
        _ => refused.to_string(),
    };
    Ok(Some(reason))
}
