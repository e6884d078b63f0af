//! Which of a repository's files are needed: configuration, tokenizer and safetensors. No other format, no code.

use std::collections::BTreeSet;

use crate::error::{Code, Error, Result};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Configuration, also of quantised models, and what a build is verified against.
const CONFIGURATION: &[&str] = &[
    CONFIG,
    "generation_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "quanto_qmap.json",
    "golden.safetensors",
    // Its presence is an error, and has to be seen.
    "adapter_config.json",
];
/// Files that a tokenizer is read from.
const TOKENIZER: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];
/// Folders of further chat templates.
const TEMPLATES: &[&str] = &["additional_chat_templates", "chat_templates"];

/// True for a file beside the weights that reading or writing looks for.
pub(crate) fn is_wanted(name: &str) -> bool {
    let template = || {
        name.split_once('/').is_some_and(|(folder, file)| {
            let jinja = file.strip_suffix(".jinja").is_some_and(|stem| !stem.contains('/') && is_plain(stem));
            jinja && TEMPLATES.contains(&folder)
        })
    };
    CONFIGURATION.contains(&name) || is_tokenizer(name) || template()
}

/// True for a file that a tokenizer is read from.
pub(crate) fn is_tokenizer(name: &str) -> bool {
    TOKENIZER.contains(&name)
}

/// True for relative paths of ordinary components, on every system alike.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.contains(['\\', '\0', ':']) && name.split('/').all(|part| !["", ".", ".."].contains(&part))
}

/// Where the weights are, in the order in which the reader looks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// `model.safetensors`, whatever else there is.
    Single,
    /// The index, and the shards that it names.
    Indexed,
    /// Files of other names.
    Loose(Vec<String>),
}

/// Finds the weights among a repository's files.
pub(crate) fn weights<'a>(subject: &str, names: impl Iterator<Item = &'a str> + Clone) -> Result<Weights> {
    let has = |name: &str| names.clone().any(|other| other == name);
    if has(SINGLE) {
        return Ok(Weights::Single);
    }
    if has(INDEX) {
        return Ok(Weights::Indexed);
    }
    let loose = loose(names.clone());
    if loose.is_empty() { Err(no_weights(subject, names)) } else { Ok(Weights::Loose(loose)) }
}

/// Safetensors of other names than the usual ones. Mistral's `consolidated` files hold the same weights once more.
pub(crate) fn loose<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let other = ["golden.safetensors", "adapter_model.safetensors"];
    let model = |name: &&str| name.ends_with(".safetensors") && !name.contains('/') && !other.contains(name);
    let (again, first): (Vec<_>, Vec<_>) = names
        .filter(model)
        .filter(|name| is_plain(name))
        .map(str::to_owned)
        .partition(|name| name.starts_with("consolidated"));
    if first.is_empty() { again } else { first }
}

fn no_weights<'a>(subject: &str, mut names: impl Iterator<Item = &'a str>) -> Error {
    let pickle = names.find(|name| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end)));
    let error = Error::new(Code::WeightsMissing, subject).expected(format!("{SINGLE}, or {INDEX} with its shards"));
    match pickle {
        Some(name) => error.found(format!("{}, a Python pickle", name.escape_debug())).help(
            "a pickle can run any code when it is read, so hf2onnx reads none; look for a revision with safetensors \
             (the hub's converter opens pull requests: `org/name@refs/pr/1`), or convert it where you trust it",
        ),
        None => error.found("no safetensors file").help("check the name; adapters, GGUF files and others are not read"),
    }
}

/// The shards that an index names, which have to be among the repository's files.
pub(crate) fn shards(subject: &str, index: &[u8]) -> Result<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let subject = format!("{subject}: {INDEX}");
    let index: Index = serde_json::from_slice(index).map_err(|error| {
        Error::new(Code::WeightsCorrupt, &subject).found(error).expected("`weight_map`: tensor names to file names")
    })?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards.iter().find(|name| !is_plain(name)) {
        Some(name) => Err(Error::new(Code::PathUnsafe, subject)
            .found(format!("the file name `{}`", name.escape_debug()))
            .expected("a path inside the repository")
            .help("the repository is broken or hostile: choose another one")),
        None => Ok(shards),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_read_is_wanted() {
        for name in ["config.json", "tokenizer.json", "merges.txt", "chat_templates/rag.jinja", "hf_quant_config.json"]
        {
            assert!(is_wanted(name), "{name}");
        }
        let unwanted =
            ["modeling.py", "README.md", "pytorch_model.bin", "onnx/config.json", "chat_templates/../x.jinja"];
        for name in unwanted.into_iter().chain(["chat_templates/a/b.jinja", "chat_templates/x\\y.jinja", "params.json"])
        {
            assert!(!is_wanted(name), "{name}");
        }
    }

    #[test]
    fn weights_are_chosen_once() {
        let find = |names: &[&str]| weights("m", names.iter().copied());
        let single = ["consolidated.safetensors", INDEX, SINGLE, "original/model.safetensors"];
        assert_eq!(find(&single).unwrap(), Weights::Single);
        assert_eq!(find(&["a.safetensors", INDEX]).unwrap(), Weights::Indexed);
        let loose = |name: &str| Weights::Loose(vec![name.to_owned()]);
        assert_eq!(
            find(&["consolidated.safetensors", "gptq.safetensors", "x/y.safetensors"]).unwrap(),
            loose("gptq.safetensors")
        );
        assert_eq!(find(&["consolidated.safetensors"]).unwrap(), loose("consolidated.safetensors"));
        let error = find(&["pytorch_model.bin", "adapter_model.safetensors"]).unwrap_err();
        assert_eq!(error.code, Code::WeightsMissing);
        assert!(error.found.contains("pytorch_model.bin"), "{error}");
    }

    #[test]
    fn an_index_may_not_lead_out() {
        assert_eq!(shards("m", br#"{"weight_map": {"a": "x", "b": "y", "c": "x"}}"#).unwrap().len(), 2);
        assert_eq!(shards("m", br#"{"weight_map": {"a": "../x"}}"#).unwrap_err().code, Code::PathUnsafe);
        assert_eq!(shards("m", b"[]").unwrap_err().code, Code::WeightsCorrupt);
    }
}
