//! Initializers: which there are, of which type and shape, and whether their bytes are the same.
//!
//! Bytes are read where they lie, in chunks and on all cores. What is the same range of the same file is not read.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::model::{Built, Initializer, Place};
use crate::error::Result;
use crate::read::hex;

/// Bytes that are read at once; a whole number of elements of every type.
const CHUNK: u64 = 1 << 20;

/// How the initializers of two graphs differ.
#[derive(Debug, Default, Serialize)]
pub struct InitializerChanges {
    /// Names that both graphs have.
    pub in_both: usize,
    /// Names of the first graph alone.
    pub only_a: Vec<String>,
    /// Names of the second graph alone.
    pub only_b: Vec<String>,
    /// Pairs among those of equal type, shape and bytes: the name in the first graph, and in the second.
    pub renamed: Vec<(String, String)>,
    /// Same name, another type or shape.
    pub retyped: Vec<Retyped>,
    /// Same name, type and shape, other values.
    pub changed: Vec<WeightChange>,
}

/// An initializer of another type or shape.
#[derive(Debug, Serialize)]
pub struct Retyped {
    /// Its name.
    pub name: String,
    /// The first one's type and shape, as `f32[2, 3]`.
    pub a: String,
    /// The second one's.
    pub b: String,
}

/// An initializer whose bytes differ.
#[derive(Debug, Serialize)]
pub struct WeightChange {
    /// Its name.
    pub name: String,
    /// Type and shape, as `f32[2, 3]`.
    pub r#type: String,
    /// How many bytes differ.
    pub bytes: u64,
    /// Of how many.
    pub of: u64,
    /// The first of them, from the initializer's start.
    pub first: u64,
    /// The largest difference of two values, for float32, float16 and bfloat16; infinite (null in JSON) if one of
    /// them is not finite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest: Option<f64>,
}

impl InitializerChanges {
    /// True if the initializers are the same.
    pub fn is_empty(&self) -> bool {
        self.only_a.is_empty() && self.only_b.is_empty() && self.retyped.is_empty() && self.changed.is_empty()
    }
}

pub(super) fn compare(a: &Built, b: &Built) -> Result<InitializerChanges> {
    let (a, b) = (&a.initializers, &b.initializers);
    let alone = |a: &BTreeMap<String, Initializer>, b: &BTreeMap<String, Initializer>| -> Vec<String> {
        a.keys().filter(|name| !b.contains_key(*name)).cloned().collect()
    };
    let mut changes = InitializerChanges { only_a: alone(a, b), only_b: alone(b, a), ..Default::default() };
    let mut pairs = Vec::new();
    for (name, of_a) in a {
        let Some(of_b) = b.get(name) else { continue };
        changes.in_both += 1;
        if (of_a.data_type, &of_a.dims) != (of_b.data_type, &of_b.dims) {
            changes.retyped.push(Retyped { name: name.clone(), a: of_a.ty(), b: of_b.ty() });
        } else if !of_a.is_same_place(of_b) {
            pairs.push((name, of_a, of_b));
        }
    }
    changes.changed = changed(&pairs)?;
    changes.renamed = renamed(&changes, a, b)?;
    Ok(changes)
}

/// Compares all pairs chunk by chunk, so that one huge initializer keeps every core busy too.
fn changed(pairs: &[(&String, &Initializer, &Initializer)]) -> Result<Vec<WeightChange>> {
    let chunks = pairs.par_iter().enumerate().flat_map_iter(|(index, (_, a, b))| {
        (0..a.length.div_ceil(CHUNK)).map(move |chunk| (index, *a, *b, chunk.saturating_mul(CHUNK)))
    });
    let found: Vec<(usize, WeightChange)> = chunks
        .map_init(
            || (Vec::new(), Vec::new()),
            |(x, y), (index, a, b, start)| Ok(chunk(a, b, start, x, y)?.map(|change| (index, change))),
        )
        .filter_map(Result::transpose)
        .collect::<Result<_>>()?;
    let mut merged: BTreeMap<usize, WeightChange> = BTreeMap::new();
    for (index, part) in found {
        match merged.get_mut(&index) {
            None => drop(merged.insert(index, part)),
            Some(whole) => {
                whole.bytes += part.bytes;
                whole.first = whole.first.min(part.first);
                whole.largest = whole.largest.zip(part.largest).map(|(a, b)| a.max(b));
            }
        }
    }
    for (index, change) in &mut merged {
        if let Some((name, ..)) = pairs.get(*index) {
            change.name.clone_from(name);
        }
    }
    Ok(merged.into_values().collect())
}

/// The differences within one chunk; its name is filled in when all are known.
fn chunk(
    a: &Initializer,
    b: &Initializer,
    start: u64,
    x: &mut Vec<u8>,
    y: &mut Vec<u8>,
) -> Result<Option<WeightChange>> {
    let count = usize::try_from(a.length.saturating_sub(start).min(CHUNK)).unwrap_or(0);
    x.resize(count, 0);
    y.resize(count, 0);
    a.read(start, x)?;
    b.read(start, y)?;
    if x == y {
        return Ok(None);
    }
    let differ = || x.iter().zip(y.iter()).enumerate().filter(|(_, (x, y))| x != y);
    let first = differ().next().map_or(0, |(index, _)| index as u64);
    Ok(Some(WeightChange {
        name: String::new(),
        r#type: a.ty(),
        bytes: differ().count() as u64,
        of: a.length,
        first: start.saturating_add(first),
        largest: largest(a.data_type, x, y),
    }))
}

/// The largest difference of two float values.
fn largest(data_type: i32, x: &[u8], y: &[u8]) -> Option<f64> {
    let values: fn(&[u8]) -> Vec<f64> = match data_type {
        1 => |bytes| bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
        10 => |bytes| bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f64()).collect(),
        16 => |bytes| bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f64()).collect(),
        _ => return None,
    };
    let (x, y) = (values(x), values(y));
    let differences = x.iter().zip(&y).filter(|(x, y)| x.to_bits() != y.to_bits()).map(|(x, y)| (x - y).abs());
    Some(differences.fold(0.0, |largest: f64, d| if d.is_finite() { largest.max(d) } else { f64::INFINITY }))
}

/// Initializers that have another name only.
fn renamed(
    changes: &InitializerChanges,
    a: &BTreeMap<String, Initializer>,
    b: &BTreeMap<String, Initializer>,
) -> Result<Vec<(String, String)>> {
    let hashed = |names: &[String], all: &BTreeMap<String, Initializer>| -> Result<Vec<(String, String)>> {
        let pairs = names.par_iter().filter_map(|name| Some((name, all.get(name)?)));
        pairs.map(|(name, initializer)| Ok((hash(initializer)?, name.clone()))).collect()
    };
    if changes.only_a.is_empty() || changes.only_b.is_empty() {
        return Ok(Vec::new());
    }
    let mut of_b: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (hash, name) in hashed(&changes.only_b, b)?.into_iter().rev() {
        of_b.entry(hash).or_default().push(name);
    }
    let of_a = hashed(&changes.only_a, a)?;
    Ok(of_a.into_iter().filter_map(|(hash, name)| Some((name, of_b.get_mut(&hash)?.pop()?))).collect())
}

/// Type, shape and content.
fn hash(initializer: &Initializer) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = Vec::new();
    for chunk in 0..initializer.length.div_ceil(CHUNK) {
        let start = chunk.saturating_mul(CHUNK);
        buffer.resize(usize::try_from(initializer.length.saturating_sub(start).min(CHUNK)).unwrap_or(0), 0);
        initializer.read(start, &mut buffer)?;
        hash.update(&buffer);
    }
    Ok(format!("{} {}", initializer.ty(), hex(&hash.finalize())))
}

/// True if an initializer of the same name lies at another place of its data file, or in one of another name.
pub(super) fn lie_elsewhere(a: &Built, b: &Built) -> bool {
    let place = |built: &Built, initializer: &Initializer| match &initializer.place {
        Place::Inline(_) => None,
        Place::File(file, offset) => {
            let dir = built.dir.canonicalize().unwrap_or_default();
            Some((file.path.strip_prefix(dir).unwrap_or(&file.path).to_owned(), *offset))
        }
    };
    let pairs = a.initializers.iter().filter_map(|(name, of_a)| Some((of_a, b.initializers.get(name)?)));
    pairs.filter(|(x, y)| x.ty() == y.ty()).any(|(x, y)| place(a, x) != place(b, y))
}
