//! The checkpoint's files beside the graph that uses their bytes as they are.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::space::check_space;
use crate::error::{Error, Result};
use crate::interrupt;
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
    let mut refused = Vec::new();
    for file in files.iter().filter_map(|index| checkpoint.files().get(*index)) {
        match place(file, folder)? {
            None => report.linked.push(file.name.clone()),
            Some(reason) => refused.push((file, reason)),
        }
    }
    // Only now it is known what is copied: room is asked for all of it before the first byte.
    let bytes = refused.iter().map(|(file, _)| file.size).fold(0, u64::saturating_add);
    if bytes > 0 {
        check_space(folder, bytes)?;
    }
    for (file, reason) in refused {
        interrupt::check()?;
        let path = folder.join(&file.name);
        // The standard library's copy clones blocks, or leaves the copying to the system, where that is possible.
        fs::copy(&file.path, &path).map_err(|error| Error::io(&path, &error))?;
        report.copied.push((file.name.clone(), file.size, reason));
    }
    Ok(report)
}

/// Links a file, or says why it can not be.
fn place(file: &ShardFile, folder: &Path) -> Result<Option<String>> {
    let path = folder.join(&file.name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
    }
    let Err(refused) = fs::hard_link(&file.path, &path) else { return Ok(None) };
    if refused.kind() == ErrorKind::NotFound {
        return Err(Error::io(&file.path, &refused));
    }
    let reason = match refused.kind() {
        ErrorKind::CrossesDevices => "it lies on another file system".to_owned(),
        ErrorKind::PermissionDenied => "its owner does not allow links".to_owned(),
        _ => refused.to_string(),
    };
    Ok(Some(reason))
}
