//! `hf2onnx diff`: what is equal is equal, each kind of difference is named, and hostile directories are errors.
#![allow(clippy::indexing_slicing, clippy::expect_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Case, TestResult, hf2onnx, scratch};
use hf2onnx::onnx::{ModelProto, TensorProto};
use prost::Message as _;
use serde_json::{Value, json};

/// A folder with a build `a` of the same case for every test, to which each test adds its `b`.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> TestResult<Self> {
        let place = Self(tempfile::tempdir_in(scratch())?);
        place.build("a", &[])?;
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn build(&self, name: &str, more: &[&str]) -> TestResult {
        let repo = Case::named("llama")?.repo()?;
        let output = self.path(name);
        let mut arguments = vec!["build".as_ref(), repo.as_os_str(), "--output".as_ref(), output.as_os_str()];
        arguments.extend(more.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
        let ran = hf2onnx(arguments)?;
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        Ok(())
    }

    /// A place whose `b` is a copy of `a`.
    fn with_copy() -> TestResult<Self> {
        let place = Self::new()?;
        copy(&place.path("a"), &place.path("b"))?;
        Ok(place)
    }

    /// Exit code, stdout and stderr of a comparison.
    fn run(&self, more: &[&str]) -> TestResult<(i32, String, String)> {
        let (a, b) = (self.path("a"), self.path("b"));
        let mut arguments = vec!["diff".as_ref(), a.as_os_str(), b.as_os_str()];
        arguments.extend(more.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
        let ran = hf2onnx(arguments)?;
        let code = ran.status.code().ok_or("no exit code")?;
        Ok((code, String::from_utf8(ran.stdout)?, String::from_utf8(ran.stderr)?))
    }

    /// The comparison as JSON; its exit code has to fit what it says.
    fn json(&self) -> TestResult<Value> {
        let (code, text, errors) = self.run(&["--json"])?;
        let value: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}{errors}"))?;
        assert_eq!(code == 0, value["equal"] == json!(true), "{code}: {value:#}");
        assert!(code < 2, "{errors}");
        Ok(value)
    }

    /// Changes the graph of `b`.
    fn edit(&self, change: impl FnOnce(&mut ModelProto)) -> TestResult {
        let path = self.path("b/onnx/model.onnx");
        let mut model = ModelProto::decode(fs::read(&path)?.as_slice())?;
        change(&mut model);
        Ok(fs::write(path, model.encode_to_vec())?)
    }

    /// Changes the first initializer of `b` whose data is external.
    fn edit_weight(&self, change: impl FnOnce(&mut TensorProto)) -> TestResult {
        self.edit(|model| {
            let graph = model.graph.as_mut().expect("a graph");
            change(graph.initializer.iter_mut().find(|tensor| tensor.data_location == 1).expect("external data"));
        })
    }
}

fn copy(from: &Path, to: &Path) -> TestResult {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let target = to.join(path.file_name().ok_or("no name")?);
        if path.is_dir() {
            copy(&path, &target)?;
        } else {
            fs::copy(&path, &target)?;
        }
    }
    Ok(())
}

fn paths(changes: &Value) -> Vec<&str> {
    changes.as_array().map_or(Vec::new(), |list| list.iter().filter_map(|change| change["path"].as_str()).collect())
}

fn set_entry(tensor: &mut TensorProto, key: &str, value: &str) {
    let entry = tensor.external_data.iter_mut().find(|entry| entry.key == key).expect("an entry");
    value.clone_into(&mut entry.value);
}

#[test]
fn equal_builds() -> TestResult {
    let place = Place::new()?;
    place.build("b", &[])?;
    let (code, text, _) = place.run(&[])?;
    assert_eq!(code, 0, "{text}");
    assert!(text.starts_with("equal: llama, ort-cpu, f32;") && text.lines().count() == 1, "{text}");
    place.json()?;
    // With itself, where nothing has to be read.
    let a = place.path("a");
    assert_eq!(hf2onnx(["diff".as_ref(), a.as_os_str(), a.as_os_str()])?.status.code(), Some(0));
    Ok(())
}

#[test]
fn another_dtype() -> TestResult {
    let place = Place::new()?;
    place.build("b", &["--dtype", "f16"])?;
    let value = place.json()?;
    let retyped = value["initializers"]["retyped"].as_array().ok_or("no list")?;
    assert!(retyped.iter().any(|r| r["a"].as_str().is_some_and(|ty| ty.starts_with("f32[")) && r["b"] != r["a"]));
    assert!(paths(&value["record"]).contains(&"dtype"), "{:#}", value["record"]);
    let (_, text, _) = place.run(&[])?;
    for words in ["-> f16[", "dtype: \"f32\" -> \"f16\"", "more; --all lists them", "genai_config.json:"] {
        assert!(text.contains(words), "{words} in\n{text}");
    }
    let (_, all, _) = place.run(&["--all"])?;
    assert!(all.len() > text.len() && !all.contains("--all"), "{all}");
    Ok(())
}

#[test]
fn another_target() -> TestResult {
    let place = Place::new()?;
    place.build("b", &["--target", "standard"])?;
    let value = place.json()?;
    let lines: Vec<&str> =
        value["graph"]["lines"].as_array().ok_or("no list")?.iter().filter_map(Value::as_str).collect();
    assert!(lines.iter().any(|line| line.starts_with("- ") && line.contains("com.microsoft.GroupQueryAttention{")));
    assert!(lines.contains(&"-   then_branch:"), "{lines:#?}");
    assert!(lines.iter().any(|line| line.starts_with("+ ") && line.contains(" = Attention{")), "{lines:#?}");
    assert!(lines.contains(&"- opset ai.onnx 21") && lines.contains(&"+ opset ai.onnx 23"), "{lines:#?}");
    assert_eq!(
        value["graph"]["only_a"].as_u64().zip(value["graph"]["only_b"].as_u64()).map(|(a, b)| a + b),
        Some(lines.len() as u64)
    );
    assert!(value["initializers"]["changed"].as_array().is_some_and(Vec::is_empty), "the weights are the same");
    assert!(paths(&value["record"]).contains(&"target"));
    Ok(())
}

/// The very last byte of the last initializer: no sampling, no rounding, no forgotten end.
#[test]
fn one_flipped_byte() -> TestResult {
    let place = Place::with_copy()?;
    let mut last = (0, 0, String::new());
    place.edit(|model| {
        let number = |tensor: &TensorProto, key: &str| {
            let entry = tensor.external_data.iter().find(|entry| entry.key == key);
            entry.and_then(|entry| entry.value.parse::<usize>().ok()).unwrap_or(0)
        };
        let tensors = &model.graph.as_ref().expect("a graph").initializer;
        last = tensors.iter().map(|t| (number(t, "offset"), number(t, "length"), t.name.clone())).max().expect("some");
    })?;
    let data = place.path("b/onnx/model.onnx_data");
    let mut bytes = fs::read(&data)?;
    let (offset, length, name) = last;
    bytes[offset + length - 1] ^= 1;
    fs::write(&data, bytes)?;
    let value = place.json()?;
    let changed = &value["initializers"]["changed"];
    assert_eq!(changed.as_array().map(Vec::len), Some(1), "{changed:#}");
    assert_eq!((&changed[0]["name"], &changed[0]["bytes"]), (&json!(name), &json!(1)));
    assert_eq!((&changed[0]["first"], &changed[0]["of"]), (&json!(length - 1), &json!(length)));
    assert!(changed[0]["largest"].as_f64().is_some_and(|largest| largest > 0.0), "{changed:#}");
    for key in ["files", "record", "notes"] {
        assert_eq!(value[key], json!([]), "{key}");
    }
    assert_eq!(value["graph"]["lines"], json!([]));
    Ok(())
}

#[test]
fn files_beside_the_model() -> TestResult {
    let place = Place::with_copy()?;
    let path = place.path("b/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["rms_norm_eps"] = json!(0.5);
    fs::write(&path, config.to_string())?;
    fs::remove_file(place.path("b/generation_config.json"))?;
    fs::write(place.path("b/onnx/more.txt"), "x")?;
    let genai = fs::read_to_string(place.path("b/genai_config.json"))?;
    fs::write(place.path("b/genai_config.json"), genai + "\n")?;
    let value = place.json()?;
    let files = value["files"].as_array().ok_or("no list")?;
    let names: Vec<&str> = files.iter().filter_map(|file| file["name"].as_str()).collect();
    assert_eq!(names, ["config.json", "genai_config.json", "generation_config.json", "onnx/more.txt"]);
    assert_eq!(paths(&files[0]["change"]["json"]), ["rms_norm_eps"]);
    assert_eq!(files[1]["change"], json!({"json": []}));
    assert_eq!((&files[2]["change"], &files[3]["change"]), (&json!("only-a"), &json!("only-b")));
    let (_, text, _) = place.run(&[])?;
    assert!(text.contains("-> 0.5") && text.contains("onnx/more.txt: only in B"), "{text}");
    Ok(())
}

#[test]
fn a_renamed_initializer() -> TestResult {
    let place = Place::with_copy()?;
    let mut old = String::new();
    place.edit(|model| {
        let graph = model.graph.as_mut().expect("a graph");
        let tensor = graph.initializer.iter_mut().find(|tensor| tensor.data_location == 1).expect("external data");
        old = std::mem::replace(&mut tensor.name, "another.name".into());
        for input in graph.node.iter_mut().flat_map(|node| &mut node.input).filter(|input| **input == old) {
            "another.name".clone_into(input);
        }
    })?;
    let value = place.json()?;
    assert_eq!(value["initializers"]["renamed"], json!([[old, "another.name"]]), "{value:#}");
    assert!(value["graph"]["only_a"].as_u64() > Some(0), "the nodes that use it");
    let (_, text, _) = place.run(&[])?;
    assert!(text.contains(&format!("{old} -> another.name")) && !text.contains("only in A:"), "{text}");
    Ok(())
}

/// The same weights elsewhere are told, but no difference.
#[test]
fn weights_in_another_place() -> TestResult {
    let place = Place::with_copy()?;
    let data = place.path("b/onnx/model.onnx_data");
    let bytes = fs::read(&data)?;
    fs::write(&data, [&[7; 64], bytes.as_slice()].concat())?;
    place.edit(|model| {
        for tensor in &mut model.graph.as_mut().expect("a graph").initializer {
            for entry in tensor.external_data.iter_mut().filter(|entry| entry.key == "offset") {
                entry.value = (entry.value.parse::<u64>().expect("a number") + 64).to_string();
            }
        }
    })?;
    let value = place.json()?;
    assert_eq!(value["equal"], json!(true), "{value:#}");
    assert!(value["notes"][0].as_str().is_some_and(|note| note.contains("other places")), "{value:#}");
    Ok(())
}

/// Field 200 of the model, which ONNX does not have: nothing of it may pass as equal.
#[test]
fn fields_that_are_not_read() -> TestResult {
    let place = Place::with_copy()?;
    let path = place.path("b/onnx/model.onnx");
    let mut bytes = fs::read(&path)?;
    bytes.extend([0xc2, 0x0c, 0x01, 0x2a]);
    fs::write(&path, bytes)?;
    let value = place.json()?;
    assert_eq!(value["equal"], json!(false), "{value:#}");
    assert!(value["notes"][0].as_str().is_some_and(|note| note.contains("does not read")), "{value:#}");
    Ok(())
}

/// A way to spoil `b`, the code that it has to give, and words of the message.
type Spoiled = (&'static str, fn(&Place) -> TestResult, &'static str, &'static str);

const SPOILED: &[Spoiled] = &[
    ("upwards", |p| p.edit_weight(|t| set_entry(t, "location", "../config.json")), "path-unsafe", "../config.json"),
    ("absolute", |p| p.edit_weight(|t| set_entry(t, "location", "/etc/hosts")), "path-unsafe", "/etc/hosts"),
    ("no such file", |p| p.edit_weight(|t| set_entry(t, "location", "gone")), "io", "gone"),
    ("a folder", |p| p.edit_weight(|t| set_entry(t, "location", "sub")), "model-invalid", "not a regular file"),
    ("no location", |p| p.edit_weight(|t| t.external_data.clear()), "model-invalid", "without a location"),
    ("past the end", |p| p.edit_weight(|t| set_entry(t, "offset", "999999999")), "model-invalid", "999999999"),
    ("overflow", |p| p.edit_weight(|t| set_entry(t, "offset", &u64::MAX.to_string())), "model-invalid", "range within"),
    ("negative", |p| p.edit_weight(|t| set_entry(t, "offset", "-1")), "model-invalid", "offset `-1`"),
    ("wrong length", |p| p.edit_weight(|t| set_entry(t, "length", "3")), "model-invalid", "length 3"),
    ("unknown type", |p| p.edit_weight(|t| t.data_type = 99), "model-invalid", "element type 99"),
    ("huge", |p| p.edit_weight(|t| t.dims = vec![i64::MAX, i64::MAX]), "model-invalid", "shape"),
    ("negative size", |p| p.edit_weight(|t| t.dims = vec![-4]), "model-invalid", "[-4]"),
    ("no data", |p| p.edit_weight(|t| t.data_location = 0), "model-invalid", "raw_data"),
    ("no graph", |p| p.edit(|model| model.graph = None), "model-invalid", "no graph"),
    ("no protobuf", |p| Ok(fs::write(p.path("b/onnx/model.onnx"), [0xff; 99])?), "model-invalid", "model.onnx"),
    ("no record", |p| Ok(fs::remove_file(p.path("b/hf2onnx.json"))?), "io", "no hf2onnx.json"),
    ("a record of nothing", |p| Ok(fs::write(p.path("b/hf2onnx.json"), "{}")?), "config-invalid", "key `onnx`"),
    (
        "a graph elsewhere",
        |p| Ok(fs::write(p.path("b/hf2onnx.json"), r#"{"onnx": "../a/onnx/model.onnx"}"#)?),
        "path-unsafe",
        "../a/onnx",
    ),
];

#[test]
fn hostile_directories() -> TestResult {
    let clean = Place::with_copy()?;
    fs::create_dir(clean.path("b/onnx/sub"))?;
    for (name, spoil, code, words) in SPOILED {
        let place = Place(tempfile::tempdir_in(scratch())?);
        copy(&clean.path("a"), &place.path("a"))?;
        copy(&clean.path("b"), &place.path("b"))?;
        spoil(&place)?;
        let (exit, text, errors) = place.run(&[])?;
        assert_eq!((exit, text.as_str()), (2, ""), "{name}: {errors}");
        assert!(errors.contains(&format!("error[{code}]")) && errors.contains(words), "{name}: {errors}");
    }
    Ok(())
}
