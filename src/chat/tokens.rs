//! A tokenizer's special tokens, from all the files that name some, by transformers 5's rules.
//!
//! - `special_tokens_map.json` wins over `tokenizer_config.json`, null included, unless the latter has
//!   `added_tokens_decoder`: then the former is not read at all.
//! - What neither names has the default of the tokenizer's class; what one sets to null has none.
//! - Every further key that ends in `_token` names one too, as do the entries of `extra_special_tokens` and
//!   `model_specific_special_tokens` where they are objects.
//! - `added_tokens_decoder`, or else `added_tokens.json`, adds tokens to those of tokenizer.json.

use std::path::Path;

use serde_json::{Map, Value};

use super::classes::{Facets, defaults};
use super::vocabulary::{AddedToken, Vocabulary};
use super::{HELP, invalid, object};
use crate::error::{Code, Error, Result};

/// The names that every tokenizer knows.
const STANDARD: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// The special tokens of a directory.
#[derive(Debug, Default)]
pub struct SpecialTokens {
    /// Name to text.
    named: Map<String, Value>,
    vocabulary: Vocabulary,
    /// Tokens that tokenizer.json lacks, or has with other settings.
    lacking: Vec<AddedToken>,
    /// A token to which two files give two ids.
    contradiction: Option<Error>,
}

impl SpecialTokens {
    /// Reads the tokenizer's files of a directory. Those that are absent say nothing.
    ///
    /// # Errors
    /// Files that are broken.
    pub fn read(dir: &Path) -> Result<Self> {
        let config = object(dir, CONFIG)?.unwrap_or_default();
        let vocabulary = Vocabulary::read(dir)?;
        let has_vocabulary = vocabulary.is_some();
        let mut tokens = Self { vocabulary: vocabulary.unwrap_or_default(), ..Self::default() };
        // Where the settings of added tokens are, the older files are not read.
        let legacy = config.get("added_tokens_decoder").is_none();
        let map = if legacy { object(dir, MAP)?.unwrap_or_default() } else { Map::new() };
        let given = names(dir, &config, &map)?;
        let explicit: Vec<String> = given.values().filter_map(Value::as_str).map(str::to_owned).collect();
        tokens.named = tokens.with_defaults(dir, &config, given);
        if has_vocabulary {
            tokens.add(dir, &config, &map, &explicit)?;
        } else {
            // The ids are known, if not the vocabulary, which is in another format.
            let special: Vec<String> = tokens.named.values().filter_map(Value::as_str).map(str::to_owned).collect();
            tokens.vocabulary.added = declared(dir, &config, &special)?.1;
        }
        Ok(tokens)
    }

    /// The special tokens that a template sees: name to text.
    pub fn named(&self) -> &Map<String, Value> {
        &self.named
    }

    /// The id of a special token (`bos_token`, `eos_token`, `pad_token`), where the files say.
    pub fn id(&self, name: &str) -> Option<i64> {
        self.vocabulary.id(self.named.get(name)?.as_str()?)
    }

    /// Tokens that transformers adds to those of tokenizer.json, or whose settings it changes.
    pub(crate) fn lacking(&self) -> &[AddedToken] {
        &self.lacking
    }

    /// A token that a file gives another id than tokenizer.json does: no tokenizer can be right for both.
    pub(crate) fn contradiction(&self) -> Option<&Error> {
        self.contradiction.as_ref()
    }

    /// The names with the defaults of the tokenizer's class, without those that are null.
    fn with_defaults(&self, dir: &Path, config: &Map<String, Value>, given: Map<String, Value>) -> Map<String, Value> {
        let model = object(dir, "config.json").ok().flatten().unwrap_or_default();
        let facets = Facets {
            model_type: model.get("model_type").and_then(Value::as_str),
            of_tokenizer: config.get("tokenizer_class").and_then(Value::as_str),
            of_model: model.get("tokenizer_class").and_then(Value::as_str),
            own_code: config.get("auto_map").is_some_and(|map| map.is_array() || map.get("AutoTokenizer").is_some()),
            byte_level: self.vocabulary.byte_level,
        };
        let class = defaults(&facets);
        let knows_padding = class.is_some_and(|class| class.contains_key("pad_token"));
        let padding = self.vocabulary.padding.clone().filter(|_| !knows_padding);
        let mut named = Map::new();
        for key in STANDARD {
            let default = class.and_then(|class| class.get(key).cloned().flatten());
            let default = default.or_else(|| padding.clone().filter(|_| key == "pad_token"));
            let value = given.get(key).cloned().or_else(|| default.map(Value::from));
            named.extend(value.filter(|value| !value.is_null()).map(|value| (key.to_owned(), value)));
        }
        let further = given.into_iter().filter(|(key, value)| !STANDARD.contains(&key.as_str()) && !value.is_null());
        named.extend(further);
        named
    }

    /// Adds the tokens that the files declare to those of tokenizer.json, as transformers does: first those with ids, in
    /// their order, then special ones that are none yet.
    fn add(
        &mut self,
        dir: &Path,
        config: &Map<String, Value>,
        map: &Map<String, Value>,
        explicit: &[String],
    ) -> Result<()> {
        let special: Vec<String> = self.named.values().filter_map(Value::as_str).map(str::to_owned).collect();
        let (file, mut declared) = declared(dir, config, &special)?;
        declared.sort_by_key(|token| token.id);
        for token in declared {
            let known = self.vocabulary.added(&token.content);
            let id = self.vocabulary.id(&token.content).unwrap_or_else(|| self.vocabulary.next_id());
            if id != token.id {
                self.contradiction.get_or_insert_with(|| other_id(&dir.join(file), &token, id));
                continue;
            }
            // Settings that tokenizer.json has itself win over those that added_tokens.json lacks.
            if known == Some(&token) || known.is_some() && file == ADDED {
                continue;
            }
            let token = AddedToken { special: token.special || special.contains(&token.content), ..token };
            self.lacking.push(token.clone());
            self.vocabulary.add(token);
        }
        let lists = ["extra_special_tokens", "additional_special_tokens"]
            .into_iter()
            .flat_map(|key| [map.get(key), config.get(key)]);
        let extra = lists.flatten().filter_map(Value::as_array).flatten().filter_map(content);
        let extra: Vec<String> = extra.map(str::to_owned).collect();
        for content in special.iter().chain(&extra) {
            if self.vocabulary.added(content).is_some() {
                continue;
            }
            let known = self.vocabulary.ids.get(content).copied();
            // A class names tokens that a vocabulary may not have.
            if known.is_some() || explicit.contains(content) || extra.contains(content) {
                let id = known.unwrap_or_else(|| self.vocabulary.next_id());
                let token = AddedToken::plain(id, content, true);
                self.lacking.push(token.clone());
                self.vocabulary.add(token);
            }
        }
        Ok(())
    }
}

/// The text of a token: itself, or the content of an object.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// What the files name, null included. Further names come after the standard ones.
fn names(dir: &Path, config: &Map<String, Value>, map: &Map<String, Value>) -> Result<Map<String, Value>> {
    let mut given = Map::new();
    let mut name = |file: &str, key: &str, value: &Value, wins: bool| -> Result<()> {
        let text = match (value, content(value)) {
            (Value::Null, _) => Value::Null,
            (_, Some(text)) => text.into(),
            (other, None) => {
                return Err(invalid(&dir.join(file))
                    .found(format!("`{key}`: {other}"))
                    .expected("a text, an object with `content`, or null")
                    .help(HELP));
            }
        };
        if wins || !given.contains_key(key) {
            given.insert(key.to_owned(), text);
        }
        Ok(())
    };
    for (file, source, wins) in [(CONFIG, config, true), (MAP, map, true)] {
        for key in STANDARD {
            if let Some(value) = source.get(key) {
                name(file, key, value, wins)?;
            }
        }
    }
    // Of further names the configuration's win, and those in an object win over those beside it.
    let objects = ["extra_special_tokens", "model_specific_special_tokens"];
    for (file, source) in [(CONFIG, config), (MAP, map)] {
        let inside = objects.iter().filter_map(|key| source.get(*key)?.as_object()).flatten();
        for (key, value) in inside {
            name(file, key, value, false)?;
        }
        for (key, value) in source.iter().filter(|(key, _)| key.ends_with("_token")) {
            if !STANDARD.contains(&key.as_str()) && content(value).is_some() {
                name(file, key, value, false)?;
            }
        }
    }
    Ok(given)
}

/// The tokens that a file beside tokenizer.json declares with their ids, and the file.
fn declared(dir: &Path, config: &Map<String, Value>, special: &[String]) -> Result<(&'static str, Vec<AddedToken>)> {
    if let Some(decoder) = config.get("added_tokens_decoder") {
        let wrong = |found: &str| {
            invalid(&dir.join(CONFIG))
                .found(format!("`added_tokens_decoder`: {found}"))
                .expected("an object of tokens by their ids")
                .help(HELP)
        };
        let entries = decoder.as_object().ok_or_else(|| wrong("no object"))?;
        let read = entries.iter().map(|(id, token)| {
            let token = id.parse().ok().and_then(|id| AddedToken::read(id, token));
            token.ok_or_else(|| wrong(&format!("the entry of {id:?}")))
        });
        return Ok((CONFIG, read.collect::<Result<_>>()?));
    }
    let Some(added) = object(dir, ADDED)? else { return Ok((ADDED, Vec::new())) };
    let read = added.iter().map(|(text, id)| match id.as_i64() {
        Some(id) => Ok(AddedToken::plain(id, text, special.contains(text))),
        None => Err(invalid(&dir.join(ADDED)).found(format!("{text:?}: {id}")).expected("an id").help(HELP)),
    });
    Ok((ADDED, read.collect::<Result<_>>()?))
}

fn other_id(file: &Path, token: &AddedToken, id: i64) -> Error {
    Error::new(Code::TokenizerInvalid, format!("{}: the token {:?}", file.display(), token.content))
        .found(format!("the id {}", token.id))
        .expected(format!("{id}, which tokenizer.json gives it"))
        .help(
            "the two files are of different tokenizers: copy both again, or save the tokenizer with transformers anew",
        )
}
