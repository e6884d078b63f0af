//! Where each initializer's bytes are to lie: known before any of them is read.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::bind::{Linked, Plan};
use crate::error::{Code, Error, Result};
use crate::read::Checkpoint;

/// Tensors of at least a page start on a page, so that they can be mapped one by one.
const PAGE: u64 = 4096;
/// Smaller ones start on a cache line.
const LINE: u64 = 64;

/// Bytes of one initializer in a file beside the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Which file.
    pub file: DataFile,
    /// Bytes before it.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

/// A file that holds initializers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DataFile {
    /// One that is written: `model.onnx_data`, `model.onnx_data_1`, ...
    Written(usize),
    /// A file of the checkpoint, linked.
    Linked(usize),
}

/// The place of every initializer of a plan, and the files that result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// For each initializer of the plan, in its order.
    pub extents: Vec<Extent>,
    /// Initializers that are written, in the order of their bytes: that of the checkpoint's files, so that each is
    /// read from front to back.
    pub order: Vec<usize>,
    /// Sizes of the files that are written.
    pub written: Vec<u64>,
    /// Indices of the checkpoint's files that are linked, sorted.
    pub linked: Vec<usize>,
}

impl Layout {
    /// Lays out a plan. No file that is written grows over `shard_size` bytes.
    pub fn new(plan: &Plan, checkpoint: &Checkpoint, shard_size: Option<u64>) -> Result<Self> {
        let mut order: Vec<usize> = (0..plan.initializers.len()).collect();
        order.retain(|i| plan.initializers.get(*i).is_some_and(|initializer| initializer.linked.is_none()));
        let twins = remove_twins(plan, &mut order);
        let place = |i: &usize| {
            let sources = plan.initializers.get(*i).map(|i| i.weight.sources()).unwrap_or_default();
            sources.iter().filter_map(|name| checkpoint.get(name)).map(|tensor| (tensor.file, tensor.offset)).min()
        };
        order.sort_by_cached_key(|i| (place(i), *i));
        let nowhere = Extent { file: DataFile::Written(0), offset: 0, length: 0 };
        let linked = |linked: Linked| Extent {
            file: DataFile::Linked(linked.file),
            offset: linked.offset,
            length: linked.length,
        };
        let mut extents: Vec<Extent> = plan.initializers.iter().map(|i| i.linked.map_or(nowhere, linked)).collect();
        let mut written = Vec::new();
        for i in &order {
            let Some((initializer, extent)) = plan.initializers.get(*i).zip(extents.get_mut(*i)) else { continue };
            let length = initializer.bytes();
            if let Some(limit) = shard_size.filter(|limit| length > *limit) {
                return Err(Error::new(Code::UsageInvalid, "--shard-size")
                    .found(format!("{limit} bytes, and {} takes {length}", initializer.name))
                    .expected("files that hold the largest tensor: ONNX can not split one")
                    .help("choose a larger --shard-size, or a smaller --dtype"));
            }
            let alignment = if length >= PAGE { PAGE } else { LINE };
            let end = written.last().copied().unwrap_or(0_u64);
            let mut offset = end.next_multiple_of(alignment);
            let full = shard_size.is_some_and(|limit| offset.saturating_add(length) > limit);
            if written.is_empty() || full {
                written.push(0);
                offset = 0;
            }
            *extent = Extent { file: DataFile::Written(written.len() - 1), offset, length };
            if let Some(end) = written.last_mut() {
                *end = offset.saturating_add(length);
            }
        }
        for (twin, first) in twins {
            if let (Some(extent), Some(slot)) = (extents.get(first).copied(), extents.get_mut(twin)) {
                *slot = extent;
            }
        }
        let mut linked: Vec<usize> = extents
            .iter()
            .filter_map(|extent| match extent.file {
                DataFile::Linked(file) => Some(file),
                DataFile::Written(_) => None,
            })
            .collect();
        linked.sort_unstable();
        linked.dedup();
        Ok(Self { extents, order, written, linked })
    }

    /// Bytes that are written.
    pub fn written_bytes(&self) -> u64 {
        self.written.iter().sum()
    }

    /// Bytes of initializers that stay in the checkpoint's files.
    pub fn linked_bytes(&self) -> u64 {
        let linked = self.extents.iter().filter(|extent| matches!(extent.file, DataFile::Linked(_)));
        linked.map(|extent| extent.length).sum()
    }
}

/// Takes out initializers whose bytes are those of an earlier one: a quantised table that is also the head is one
/// matrix, which two operators want to see in different shapes. Pairs of the later and the earlier one.
fn remove_twins(plan: &Plan, order: &mut Vec<usize>) -> Vec<(usize, usize)> {
    let mut seen = BTreeMap::new();
    let mut twins = Vec::new();
    order.retain(|i| {
        let Some(initializer) = plan.initializers.get(*i) else { return false };
        let Some((scheme, part)) = initializer.quantized else { return true };
        match seen.entry(format!("{part:?} {scheme:?} {:?}", initializer.weight)) {
            Entry::Vacant(entry) => {
                entry.insert(*i);
                true
            }
            Entry::Occupied(entry) => {
                twins.push((*i, *entry.get()));
                false
            }
        }
    });
    twins
}

/// Name of a file that is written beside the graph `model`; transformers.js asks for exactly these.
pub fn data_name(model: &str, index: usize) -> String {
    if index == 0 { format!("{model}_data") } else { format!("{model}_data_{index}") }
}
