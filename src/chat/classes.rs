//! Which tokenizer class transformers takes, for the special tokens that it has by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use serde::Deserialize;

/// Facts of transformers 5.23, written by `golden/tokenizer_classes.py`.
static FACTS: LazyLock<Option<Facts>> =
    LazyLock::new(|| serde_json::from_str(include_str!("tokenizer_classes.json")).ok());

#[derive(Deserialize)]
struct Facts {
    /// Class by `model_type`.
    models: BTreeMap<String, String>,
    /// Model types whose repositories name the wrong class.
    distrusted: BTreeSet<String>,
    /// The special tokens that a class knows by name, with their defaults.
    classes: BTreeMap<String, Defaults>,
}

/// Special tokens of a class; `None` for those that it knows, and that have no default.
pub(super) type Defaults = BTreeMap<String, Option<String>>;

/// What the choice of a class depends on.
#[derive(Debug, Default)]
pub(super) struct Facets<'r> {
    pub(super) model_type: Option<&'r str>,
    /// `tokenizer_class` of `tokenizer_config.json`.
    pub(super) of_tokenizer: Option<&'r str>,
    /// `tokenizer_class` of config.json.
    pub(super) of_model: Option<&'r str>,
    /// The repository has a tokenizer of its own, in Python.
    pub(super) own_code: bool,
    /// tokenizer.json works on bytes.
    pub(super) byte_level: bool,
}

/// The special tokens of the class that transformers chooses: none where it takes tokenizer.json as it is.
pub(super) fn defaults(facets: &Facets<'_>) -> Option<&'static Defaults> {
    let facts = FACTS.as_ref()?;
    facts.classes.get(plain_name(chosen(facts, facets)?))
}

fn plain_name(name: &str) -> &str {
    name.strip_suffix("Fast").unwrap_or(name)
}

/// `AutoTokenizer.from_pretrained`'s choice, for a directory with a tokenizer.json.
fn chosen<'r>(facts: &'r Facts, facets: &Facets<'r>) -> Option<&'r str> {
    let named = facets.of_tokenizer.or(facets.of_model);
    let registered = facets.model_type.and_then(|model| facts.models.get(model)).map(String::as_str);
    let distrusted = facets.model_type.is_some_and(|model| facts.distrusted.contains(model));
    if let (Some(named), false) = (named, facets.own_code) {
        if plain_name(named) == "LlamaTokenizer" && facets.byte_level && !distrusted {
            return None;
        }
        if let Some(registered) = registered.filter(|registered| plain_name(registered) != plain_name(named)) {
            let class = if distrusted { registered } else { named };
            // A class that takes any tokenizer.json is registered: it wins over what the repository names.
            let is_special = facts.classes.contains_key(plain_name(registered));
            return (is_special && facts.classes.contains_key(plain_name(class))).then_some(class);
        }
    }
    named.or(registered)
}
