//! A directory that `hf2onnx build` wrote, by its record.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Section, bytes, describe, write_lines, write_sections};
use crate::error::{Code, Error, Result};
use crate::read::json_file;

/// What `hf2onnx.json` records.
#[derive(Debug, Serialize)]
pub struct Built {
    /// The directory.
    pub dir: PathBuf,
    /// The specification in words.
    pub sections: Vec<Section>,
    /// The record itself.
    pub record: Map<String, Value>,
}

impl Built {
    /// True if a directory holds a record, and so is no repository.
    pub fn is_built(dir: &Path) -> bool {
        dir.join("hf2onnx.json").is_file()
    }

    /// Reads a directory's record.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("hf2onnx.json");
        let record = json_file(&path)?;
        let Some(spec) = record.get("spec").filter(|spec| spec.is_object()) else {
            return Err(Error::new(Code::ConfigInvalid, path.display()).found("no spec").help("build it again"));
        };
        Ok(Self { dir: dir.to_owned(), sections: describe(spec), record })
    }

    fn text(&self, key: &str) -> &str {
        self.record.get(key).and_then(Value::as_str).unwrap_or("?")
    }

    fn list(&self, key: &str) -> &[Value] {
        self.record.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// How far it was checked, and against what.
    fn checked(&self) -> String {
        let report = self.record.get("verification").filter(|report| report.is_object());
        let Some(report) = report else {
            return "no: run `hf2onnx verify`, or build with --verify".to_owned();
        };
        let verdict = report.get("verdict").and_then(Value::as_str).unwrap_or("?");
        let scenarios = report.get("scenarios").and_then(Value::as_array).map(Vec::len);
        let count = scenarios.map_or_else(String::new, |count| format!(", in {count} scenarios"));
        format!("{verdict}{count}")
    }
}

impl fmt::Display for Built {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spec = self.record.get("spec");
        let of_spec = |key: &str| spec.and_then(|spec| spec.get(key)).and_then(Value::as_str).unwrap_or("?");
        let (model_type, template) = (of_spec("model_type"), of_spec("template"));
        writeln!(f, "{model_type}, built by hf2onnx {} with the template {template}", self.text("hf2onnx"))?;
        let padding = match self.text("padding") {
            "any" => "exact for left, right and none",
            "right" => "exact for right and none",
            other => other,
        };
        let mut lines = vec![
            ("graph", self.text("onnx").to_owned()),
            ("target", self.text("target").to_owned()),
            ("dtype", self.text("dtype").to_owned()),
            ("padding", padding.to_owned()),
            ("logits", self.text("logits").to_owned()),
            ("checked", self.checked()),
        ];
        for (label, key) in [("from", "sources"), ("wrote", "outputs")] {
            for file in self.list(key) {
                lines.push((label, file_words(file)));
            }
        }
        write_lines(f, "build", &lines)?;
        write_sections(f, &self.sections)
    }
}

/// Name, size and the start of the hash.
fn file_words(file: &Value) -> String {
    let text = |keys: &[&str]| keys.iter().find_map(|key| file.get(*key)?.as_str());
    let name = text(&["name", "file", "path"]).unwrap_or("?");
    let size = ["size", "bytes"].iter().find_map(|key| file.get(*key)?.as_u64());
    let size = size.map_or_else(String::new, |size| format!(", {}", bytes(size)));
    let hash = text(&["sha256", "hash"]).and_then(|hash| hash.get(..12));
    let hash = hash.map_or_else(String::new, |hash| format!(", sha256 {hash}..."));
    format!("{name}{size}{hash}")
}
