//! Configurations as people bring them, changed in one way each: what they mean, or the error that they get.

#![allow(clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{Case, TestResult};
use hf2onnx::describe::{Description, choose, describe};
use hf2onnx::read::json_file;
use serde::Deserialize;
use serde_json::{Map, Value};

/// A change of a case's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    case: String,
    set: Map<String, Value>,
    /// Means the same; the case as it is without it.
    #[serde(default, rename = "as")]
    same: Map<String, Value>,
    /// `--allow-unused-key`
    #[serde(default)]
    allowed: Vec<String>,
    /// The code of its error, if it is one.
    code: Option<String>,
    /// What the error says, and what it must not say.
    #[serde(default)]
    words: Vec<String>,
    #[serde(default)]
    not: Vec<String>,
}

fn described(case: &str, changes: &Map<String, Value>, allowed: &[String]) -> hf2onnx::error::Result<Description> {
    let mut config = json_file(&Case::named(case).expect("a case").dir.join("config.json"))?;
    config.extend(changes.clone());
    describe(&choose(&config, None)?, &config, allowed)
}

/// What is wrong with a row's outcome.
fn wrong(row: &Row) -> Option<String> {
    match (described(&row.case, &row.set, &row.allowed), &row.code) {
        (Ok(got), None) => {
            let want = described(&row.case, &row.same, &[]).expect("a case builds");
            let accounted = |key: &&String| {
                let a = &got.accounting;
                let part = |own: &String| own == *key || own.starts_with(&format!("{key}."));
                a.used.iter().any(part) || a.without_effect.keys().any(part) || a.allowed.iter().any(part)
            };
            let lost: Vec<&String> = row.set.keys().filter(|key| !accounted(key)).collect();
            (got.spec != want.spec || !lost.is_empty()).then(|| format!("another model, or {lost:?} are lost"))
        }
        (Ok(_), Some(code)) => Some(format!("it is described, and should be {code}")),
        (Err(error), None) => Some(format!("refused: {error}")),
        (Err(error), Some(code)) => {
            let text = error.to_string();
            let absent = row.words.iter().find(|word| !text.contains(word.as_str()));
            let present = row.not.iter().find(|word| text.contains(word.as_str()));
            let odd = absent.or(present).is_some() || error.code.as_str() != code;
            odd.then(|| format!("{} for {code}, {absent:?} missing, {present:?} there: {text}", error.code.as_str()))
        }
    }
}

#[test]
fn configurations_mean_what_transformers_takes_them_for_or_are_refused_by_name() -> TestResult {
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/configurations.json");
    let rows: Vec<Row> = serde_json::from_str(&fs::read_to_string(table)?)?;
    let found: Vec<String> = rows.iter().filter_map(|row| Some(format!("{}: {}", row.name, wrong(row)?))).collect();
    assert!(found.is_empty(), "{} of {}:\n{}", found.len(), rows.len(), found.join("\n"));
    Ok(())
}
