//! The files beside graph and weights: configurations by path, others by their bytes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::json::{self, ValueChange};
use super::model::Built;
use crate::error::{Code, Error, Result};
use crate::read::{contained, hash_files, json_file};

/// A file that differs.
#[derive(Debug, Serialize)]
pub struct FileChange {
    /// Its path in the directory, with `/`.
    pub name: String,
    /// How it differs.
    pub change: Change,
}

/// How a file differs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Only the first directory has it.
    OnlyA,
    /// Only the second directory has it.
    OnlyB,
    /// Its JSON differs, by path; empty where only spaces or the order of keys do.
    Json(Vec<ValueChange>),
    /// Its bytes differ: the two sizes.
    Bytes(u64, u64),
}

pub(super) fn compare(a: &Built, b: &Built) -> Result<Vec<FileChange>> {
    let (a, b) = (list(a)?, list(b)?);
    let mut changes = Vec::new();
    for (name, path) in &a {
        let Some(other) = b.get(name) else {
            changes.push(FileChange { name: name.clone(), change: Change::OnlyA });
            continue;
        };
        if let Some(change) = pair(path, other)? {
            changes.push(FileChange { name: name.clone(), change });
        }
    }
    let only_b = b.keys().filter(|name| !a.contains_key(*name));
    changes.extend(only_b.map(|name| FileChange { name: name.clone(), change: Change::OnlyB }));
    changes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(changes)
}

fn pair(a: &Path, b: &Path) -> Result<Option<Change>> {
    let hashes = hash_files(&[a, b])?;
    let [of_a, of_b] = hashes.as_slice() else { return Ok(None) };
    if of_a.sha256 == of_b.sha256 {
        return Ok(None);
    }
    let is_json = a.extension().is_some_and(|end| end == "json");
    if let (true, Ok(a), Ok(b)) = (is_json, json_file(a), json_file(b)) {
        let mut changes = Vec::new();
        json::compare("", Some(&Value::Object(a)), Some(&Value::Object(b)), &mut changes);
        return Ok(Some(Change::Json(changes)));
    }
    Ok(Some(Change::Bytes(of_a.size, of_b.size)))
}

/// The directory's files by name, without those that are compared otherwise.
fn list(built: &Built) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let mut open = vec![(built.dir.clone(), String::new())];
    while let Some((folder, prefix)) = open.pop() {
        let io = |error: std::io::Error| Error::io(&folder, &error);
        for entry in fs::read_dir(&folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            // Of a link itself, so that none leads out or round in circles.
            if entry.file_type().map_err(io)?.is_dir() {
                open.push((entry.path(), format!("{name}/")));
                continue;
            }
            let path = contained(&built.dir, &name)?;
            if !path.is_file() {
                return Err(Error::new(Code::Io, entry.path().display())
                    .found("not a regular file")
                    .expected("files and directories"));
            }
            if !built.own.contains(&path) {
                files.insert(name, path);
            }
        }
    }
    Ok(files)
}
