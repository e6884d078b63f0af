//! Which files of a repository hold its weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::header::quoted;
use super::json::text_file;
use super::path::contained;
use crate::error::{Code, Error, Result};
use crate::regular;

const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The files to read, sorted by name, and what the index says of them.
pub(crate) struct Weights {
    pub(crate) names: Vec<String>,
    pub(crate) index: Option<Index>,
}

/// Which shard holds which tensor, as the index has it. The shards' headers have the last word.
pub(crate) struct Index {
    pub(crate) map: BTreeMap<String, String>,
    /// Shards of the same numbering that it does not name, and that are not read.
    pub(crate) unnamed: Vec<String>,
}

pub(crate) fn locate(dir: &Path) -> Result<Weights> {
    if exists(&dir.join(SINGLE)) {
        return Ok(Weights { names: vec![SINGLE.to_owned()], index: None });
    }
    if exists(&dir.join(INDEX)) {
        return read_index(dir);
    }
    let all = file_names(dir)?;
    let names: Vec<String> = all.iter().filter(|name| is_model_file(name)).cloned().collect();
    if names.is_empty() {
        return Err(missing(dir, &all));
    }
    check_numbering(dir, &names)?;
    Ok(Weights { names, index: None })
}

/// True if there are weights of a model, whether they can be read or not.
pub(crate) fn has_model(dir: &Path) -> Result<bool> {
    Ok(exists(&dir.join(SINGLE)) || exists(&dir.join(INDEX)) || file_names(dir)?.iter().any(|name| is_model_file(name)))
}

/// True for a broken link too: it has to be an error, not another way to find weights.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Names of the directory's entries, sorted, so that no answer depends on the file system.
fn file_names(dir: &Path) -> Result<BTreeSet<String>> {
    let io = |error: std::io::Error| Error::io(dir, &error);
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        // A name that is not Unicode is no name of a model's file.
        if let Ok(name) = entry.map_err(io)?.file_name().into_string() {
            names.insert(name);
        }
    }
    Ok(names)
}

fn is_model_file(name: &str) -> bool {
    name.ends_with(".safetensors") && !["golden.safetensors", "adapter_model.safetensors"].contains(&name)
}

fn read_index(dir: &Path) -> Result<Weights> {
    let path = dir.join(INDEX);
    let map = safetensors_index(&text_file(&contained(dir, INDEX)?, regular::INDEX)?, &path)?;
    let mut shards: BTreeMap<&str, &str> = BTreeMap::new();
    for (tensor, shard) in &map {
        shards.entry(shard).or_insert(tensor);
    }
    for (shard, tensor) in &shards {
        check_shard(dir, &path, shard, tensor)?;
    }
    let names: Vec<String> = shards.into_keys().map(str::to_owned).collect();
    let of = |name: &str| numbering(name).map(|(prefix, _, total)| (prefix.to_owned(), total.to_owned()));
    let series: BTreeSet<_> = names.iter().filter_map(|name| of(name)).collect();
    let others = file_names(dir)?.into_iter().filter(|name| !names.contains(name));
    let unnamed = others.filter(|name| of(name).is_some_and(|of| series.contains(&of))).collect();
    Ok(Weights { names, index: Some(Index { map, unnamed }) })
}

/// Which shard holds which tensor, by the text of an index; `path` names it in errors.
pub fn safetensors_index(text: &str, path: &Path) -> Result<BTreeMap<String, String>> {
    let corrupt = || Error::new(Code::WeightsCorrupt, path.display()).help("download the index again");
    let RawIndex { weight_map: WeightMap(map) } = serde_json::from_str(text)
        .map_err(|error| corrupt().found(error).expected("`weight_map`: an object from tensor names to file names"))?;
    if map.is_empty() {
        return Err(corrupt().found("an empty `weight_map`"));
    }
    Ok(map)
}

fn check_shard(dir: &Path, index: &Path, shard: &str, tensor: &str) -> Result<()> {
    match contained(dir, shard) {
        Err(error) if error.code == Code::Io && !dir.join(shard).exists() => {
            Err(Error::new(Code::ShardMissing, dir.join(shard).display())
                .found("no such file")
                .expected(format!("the shard that holds {}, says {}", quoted(tensor), index.display()))
                .help("the download is not complete: run it again (`hf download`, or `git lfs pull`)"))
        }
        Err(error) if error.code == Code::PathUnsafe => {
            Err(Error { subject: format!("{}: tensor {}", index.display(), quoted(tensor)), ..error })
        }
        other => other.map(|_| ()),
    }
}

/// Without an index, `-00001-of-00003` in a name still says how many there have to be.
fn check_numbering(dir: &Path, names: &[String]) -> Result<()> {
    for name in names {
        let Some((prefix, number, total)) = numbering(name) else {
            continue;
        };
        let count: u64 = total.parse().unwrap_or(0);
        let here: BTreeSet<u64> = names
            .iter()
            .filter_map(|name| numbering(name))
            .filter(|(other, _, others)| *other == prefix && *others == total)
            .filter_map(|(_, number, _)| number.parse().ok())
            .collect();
        if let Some(absent) = (1..=count).find(|number| !here.contains(number)) {
            let width = number.len();
            let file = format!("{prefix}-{absent:0width$}-of-{total}.safetensors");
            return Err(Error::new(Code::ShardMissing, dir.join(file).display())
                .found("no such file")
                .expected(format!("{count} shards, as the name {name} says"))
                .help("the download is not complete: run it again"));
        }
    }
    Ok(())
}

/// `model-00001-of-00003.safetensors` in its parts.
fn numbering(name: &str) -> Option<(&str, &str, &str)> {
    let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| (1..=6).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    (digits(number) && digits(total)).then_some((prefix, number, total))
}

/// Says what lies there instead of safetensors, and how to get them.
fn missing(dir: &Path, all: &BTreeSet<String>) -> Error {
    let error = Error::new(Code::WeightsMissing, dir.display());
    let expected = format!("{SINGLE}, or {INDEX} with its shards");
    let find = |endings: &[&str]| all.iter().find(|name| endings.iter().any(|ending| name.ends_with(ending)));
    let adapter = ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"];
    let adapter = adapter.into_iter().find(|name| all.contains(*name));
    let pickle = find(&[".bin", ".pt", ".pth", ".ckpt"]).filter(|name| *name != "adapter_model.bin");
    if let (Some(name), None) = (adapter, pickle) {
        return error
            .found(format!("{name}, an adapter without its model"))
            .expected(expected)
            .help("merge the adapter into its base model first (`merge_and_unload` in peft)");
    }
    if let Some(name) = pickle {
        return error.found(format!("{name}, a Python pickle")).expected(expected).help(
            "a pickle can run any code when it is read, so hf2onnx reads none; convert it where you \
                 trust it: `model.save_pretrained(DIR, safe_serialization=True)` in transformers",
        );
    }
    if let Some(name) = find(&[".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".tflite"]) {
        return error
            .found(format!("{name}, a format that is not read"))
            .expected(expected)
            .help("use the model's original repository, or export safetensors from the library that reads this file");
    }
    error.found("no weights").expected(expected).help("check the path; for a download, that it is complete")
}

#[derive(serde::Deserialize)]
struct RawIndex {
    weight_map: WeightMap,
}

/// `weight_map`, refusing a tensor that stands in it twice.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Shards;
        impl<'de> Visitor<'de> for Shards {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<WeightMap, A::Error> {
                let mut shards = BTreeMap::new();
                while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                    let again = format!("tensor {} stands twice in `weight_map`", quoted(&tensor));
                    if shards.insert(tensor, shard).is_some() {
                        return Err(A::Error::custom(again));
                    }
                }
                Ok(WeightMap(shards))
            }
        }
        deserializer.deserialize_map(Shards)
    }
}
