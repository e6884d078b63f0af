//! What two built directories have in common and where they part: graph, weights, the files beside them, the record.
//!
//! Nothing that a directory says of itself is trusted: its record names the graph, but weights are compared byte for
//! byte, and locations that lead out of the directory, or past the end of a file, are errors.

mod display;
mod files;
mod graph;
mod json;
mod model;
mod weights;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::Result;

pub use files::{Change, FileChange};
pub use graph::GraphChange;
pub use json::ValueChange;
pub use weights::{InitializerChanges, Retyped, WeightChange};

use model::Built;

/// Fields of the record that say how it was made rather than what it is: reports and hashes of files that are compared
/// themselves.
const UNCOMPARED: [&str; 2] = ["verification", "outputs"];

/// The comparison of two built directories.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// True if nothing departs.
    pub equal: bool,
    /// The first directory.
    pub a: Side,
    /// The second directory.
    pub b: Side,
    /// Nodes, inputs, outputs and versions.
    pub graph: GraphChange,
    /// Which initializers there are, of which type and shape, and whether their bytes are the same.
    pub initializers: InitializerChanges,
    /// The files beside graph and weights.
    pub files: Vec<FileChange>,
    /// `hf2onnx.json` by path, without `verified` and `outputs`.
    pub record: Vec<ValueChange>,
    /// What is no difference, or could not be compared.
    pub notes: Vec<String>,
}

/// One of the two directories.
#[derive(Debug, Serialize)]
pub struct Side {
    /// The directory.
    pub dir: PathBuf,
    /// `model_type`, target and dtype as its record has them.
    pub summary: String,
    /// Nodes of the graph.
    pub nodes: usize,
    /// Initializers of the graph.
    pub initializers: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Compares two directories that `hf2onnx build` wrote.
///
/// # Errors
/// A directory without a record, a graph that does not parse, an initializer whose bytes are not all there or lie
/// outside of the directory.
pub fn compare(a: &Path, b: &Path) -> Result<Difference> {
    let (a, b) = (Built::open(a)?, Built::open(b)?);
    let graph = graph::compare(&a, &b);
    let initializers = weights::compare(&a, &b)?;
    let files = files::compare(&a, &b)?;
    let mut record = Vec::new();
    let keys: BTreeSet<&String> = a.record.keys().chain(b.record.keys()).collect();
    for key in keys.into_iter().filter(|key| !UNCOMPARED.contains(&key.as_str())) {
        json::compare(key, a.record.get(key), b.record.get(key), &mut record);
    }
    let mut notes = Vec::new();
    let unread = a.bytes != b.bytes && (a.unread > 0 || b.unread > 0);
    if unread {
        notes.push(format!(
            "{} and {} bytes of the graph files lie in fields that hf2onnx does not read; they were not compared",
            a.unread, b.unread
        ));
    }
    if initializers.retyped.is_empty() && weights::lie_elsewhere(&a, &b) {
        notes.push("the weights lie in other places of the data files".into());
    }
    let equal = !unread && graph.is_empty() && initializers.is_empty() && files.is_empty() && record.is_empty();
    Ok(Difference { equal, a: Side::of(&a), b: Side::of(&b), graph, initializers, files, record, notes })
}

impl Side {
    fn of(built: &Built) -> Self {
        Self {
            dir: built.dir.clone(),
            summary: built.summary(),
            nodes: built.graph.node.len(),
            initializers: built.initializers.len(),
            bytes: built.initializers.values().fold(0, |sum, i| sum.saturating_add(i.length)),
        }
    }
}
