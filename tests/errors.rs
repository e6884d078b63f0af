//! Every failure that a user can meet in a build: its code, what it says, and that it leaves nothing behind.
//!
//! A row breaks a copy of a case and names the words that the message owes its reader.
#![allow(clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Case, TestResult, scratch};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// A way to fail.
struct Row {
    name: &'static str,
    /// The case that is broken.
    case: &'static str,
    /// Breaks the copy.
    spoil: fn(&Place) -> TestResult,
    /// Arguments besides repository and output.
    arguments: &'static [&'static str],
    code: &'static str,
    /// What the message has to contain.
    words: &'static [&'static str],
}

/// A folder with a copy of a case; builds run in it and write `out`.
struct Place {
    dir: tempfile::TempDir,
}

const ROWS: &[Row] = &[
    Row {
        name: "no such repository",
        case: "llama",
        spoil: |place| Ok(fs::remove_dir_all(place.path("repo"))?),
        arguments: &[],
        code: "io",
        words: &["repo", "no such directory"],
    },
    Row {
        name: "no config.json",
        case: "llama",
        spoil: |place| place.remove("config.json"),
        arguments: &[],
        code: "config-missing",
        words: &["config.json"],
    },
    Row {
        name: "config.json that does not parse",
        case: "llama",
        spoil: |place| place.write("config.json", "{\"model_type\": \"llama\","),
        arguments: &[],
        code: "config-invalid",
        words: &["config.json", "line 1"],
    },
    Row {
        name: "config.json without a model_type",
        case: "llama",
        spoil: |place| place.config(|config| drop(config.remove("model_type"))),
        arguments: &[],
        code: "config-invalid",
        words: &["model_type"],
    },
    Row {
        name: "only pickled weights",
        case: "llama",
        spoil: |place| {
            place.remove("model.safetensors")?;
            place.write("pytorch_model.bin", "PK")
        },
        arguments: &[],
        code: "weights-missing",
        words: &["pytorch_model.bin", "safetensors", "convert"],
    },
    Row {
        name: "no weights at all",
        case: "llama",
        spoil: |place| place.remove("model.safetensors"),
        arguments: &[],
        code: "weights-missing",
        words: &["safetensors"],
    },
    Row {
        name: "a missing shard",
        case: "llama-sharded",
        spoil: |place| place.remove("model-00002-of-00005.safetensors"),
        arguments: &[],
        code: "shard-missing",
        words: &["model-00002-of-00005.safetensors"],
    },
    Row {
        name: "a truncated file",
        case: "llama",
        spoil: |place| place.weights(|bytes| bytes.truncate(bytes.len() - 100)),
        arguments: &[],
        code: "weights-corrupt",
        words: &["model.safetensors", "cut short"],
    },
    Row {
        name: "a header that lies",
        case: "llama",
        spoil: |place| place.weights(|bytes| replace(bytes, b"\"shape\":[64,64]", b"\"shape\":[64,65]")),
        arguments: &[],
        code: "weights-corrupt",
        words: &["model.safetensors", "[64, 65]"],
    },
    Row {
        name: "an unknown model_type",
        case: "llama",
        spoil: |place| place.set("model_type", json!("lama")),
        arguments: &[],
        code: "model-type-unknown",
        words: &["lama", "nearest", "llama", "scaffold"],
    },
    Row {
        name: "custom code without a template",
        case: "my_model",
        spoil: |_| Ok(()),
        arguments: &[],
        code: "model-type-unknown",
        words: &["my_model", "auto_map", "is not run", "scaffold", "--template"],
    },
    Row {
        name: "a quantisation that the weights do not have",
        case: "llama",
        spoil: |place| place.set("quantization_config", json!({"quant_method": "gptq", "bits": 4})),
        arguments: &[],
        code: "tensor-missing",
        words: &["quantization_config", "gptq"],
    },
    Row {
        name: "integer weights",
        case: "llama",
        spoil: |place| {
            place.tensors(|tensors| {
                tensors.retain(|(name, _, _)| name != "model.norm.weight");
                tensors.push(("model.norm.weight".to_owned(), safetensors::Dtype::I8, vec![0; 64]));
            })
        },
        arguments: &[],
        code: "quantization-unsupported",
        words: &["model.norm.weight", "I8"],
    },
    Row {
        name: "a tensor of another shape",
        case: "llama",
        spoil: |place| place.set("intermediate_size", json!(95)),
        arguments: &[],
        code: "tensor-shape",
        words: &["down_proj", "[64, 96]", "[64, 95]"],
    },
    Row {
        name: "a tensor too few",
        case: "llama",
        spoil: |place| place.tensors(|tensors| tensors.retain(|(name, _, _)| name != "model.norm.weight")),
        arguments: &[],
        code: "tensor-missing",
        words: &["model.norm.weight", "nearest"],
    },
    Row {
        name: "a tensor too many",
        case: "llama",
        spoil: stray_tensor,
        arguments: &[],
        code: "tensor-unexpected",
        words: &["model.stray", "--allow-unused-tensor"],
    },
    Row {
        name: "another tensor is allowed",
        case: "llama",
        spoil: stray_tensor,
        arguments: &["--allow-unused-tensor", "model.straw"],
        code: "tensor-unexpected",
        words: &["model.stray"],
    },
    Row {
        name: "a pattern that is none",
        case: "llama",
        spoil: stray_tensor,
        arguments: &["--allow-unused-tensor", "model.[a"],
        code: "usage-invalid",
        words: &["--allow-unused-tensor model.[a"],
    },
    Row {
        name: "a tensor that float16 does not hold",
        case: "llama",
        spoil: |place| {
            place.weights(|bytes| {
                // The head lies at the start of the data, behind the header.
                let length = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
                let at = usize::try_from(length).unwrap_or(0) + 8;
                bytes[at..at + 4].copy_from_slice(&1e9_f32.to_le_bytes());
            })
        },
        arguments: &["--dtype", "f16"],
        code: "tensor-range",
        words: &["1e9", "--dtype f32"],
    },
    Row {
        name: "a key that nobody reads",
        case: "llama",
        spoil: |place| place.set("logit_scale", json!(0.5)),
        arguments: &[],
        code: "config-unused-key",
        words: &["logit_scale", "0.5", "--allow-unused-key"],
    },
    Row {
        name: "a key that is absent",
        case: "llama",
        spoil: |place| place.config(|config| drop(config.remove("hidden_size"))),
        arguments: &[],
        code: "config-missing-key",
        words: &["hidden_size"],
    },
    Row {
        name: "a RoPE that nobody knows",
        case: "llama",
        spoil: |place| place.set("rope_parameters", json!({"rope_type": "spiral", "rope_theta": 1e4})),
        arguments: &[],
        code: "config-invalid",
        words: &["spiral", "llama3", "yarn"],
    },
    Row {
        name: "heads that do not divide",
        case: "llama",
        spoil: |place| place.set("num_key_value_heads", json!(3)),
        arguments: &[],
        code: "spec-invalid",
        words: &["3 key heads", "layer 0"],
    },
    Row {
        name: "an output directory that exists",
        case: "llama",
        spoil: |place| {
            fs::create_dir(place.path("out"))?;
            Ok(fs::write(place.path("out").join("precious.txt"), "mine")?)
        },
        arguments: &[],
        code: "output-exists",
        words: &["out", "--force"],
    },
    Row {
        name: "a template that is not there",
        case: "llama",
        spoil: |_| Ok(()),
        arguments: &["--template", "mine.toml"],
        code: "io",
        words: &["mine.toml"],
    },
    Row {
        name: "a template that is no TOML",
        case: "llama",
        spoil: |place| place.template("extends = \"llama\"\nmodel_type = [\n"),
        arguments: &["--template", "mine.toml"],
        code: "template-invalid",
        words: &["mine.toml:"],
    },
    Row {
        name: "a template with an unknown table",
        case: "llama",
        spoil: |place| place.template(&format!("{TEMPLATE}[atention]\nbias = true\n")),
        arguments: &["--template", "mine.toml"],
        code: "template-invalid",
        words: &["mine.toml:3", "atention", "attention"],
    },
    Row {
        name: "a template with an unknown key",
        case: "llama",
        spoil: |place| place.template(&format!("{TEMPLATE}[attention]\nbais = true\n")),
        arguments: &["--template", "mine.toml"],
        code: "template-invalid",
        words: &["mine.toml:4", "bais", "bias"],
    },
    Row {
        name: "a template with a wrong type",
        case: "llama",
        spoil: |place| place.template(&format!("{TEMPLATE}[attention]\nheads = \"many\"\n")),
        arguments: &["--template", "mine.toml"],
        code: "template-invalid",
        words: &["mine.toml:4", "attention.heads", "many"],
    },
    Row {
        name: "a template with a check that nobody knows",
        case: "llama",
        spoil: |place| place.template(&format!("{TEMPLATE}[drop]\nodd = {{ reason = \"none\", check = \"magic\" }}\n")),
        arguments: &["--template", "mine.toml"],
        code: "template-invalid",
        words: &["mine.toml:4", "drop.odd", "magic", "check"],
    },
    Row {
        name: "a template with an expression that fails",
        case: "llama",
        spoil: |place| place.template(&format!("{TEMPLATE}[attention]\nheads = \"=hidden_size / 'x'\"\n")),
        arguments: &["--template", "mine.toml"],
        code: "expression-failed",
        words: &["mine.toml:4", "attention.heads", "hidden_size / 'x'"],
    },
    Row {
        name: "a template with a name that nobody knows",
        case: "llama",
        spoil: |place| place.template(&format!("{TEMPLATE}[attention]\nheads = \"=n_heads\"\n")),
        arguments: &["--template", "mine.toml"],
        code: "config-missing-key",
        words: &["mine.toml:4", "n_heads"],
    },
    Row {
        name: "a template for another model",
        case: "llama",
        spoil: |place| place.template("extends = \"llama\"\nmodel_type = [\"alpaca\"]\n"),
        arguments: &["--template", "mine.toml"],
        code: "template-invalid",
        words: &["mine.toml", "alpaca", "llama"],
    },
    Row {
        name: "a golden that is not there",
        case: "llama",
        spoil: |_| Ok(()),
        arguments: &["--verify=nowhere.safetensors"],
        code: "golden-invalid",
        words: &["nowhere.safetensors"],
    },
    Row {
        name: "a model that computes something else",
        case: "llama",
        spoil: |place| place.set("rms_norm_eps", json!(0.5)),
        arguments: &["--verify"],
        code: "verification-failed",
        words: &["prefill", "1e-4", "layer 0"],
    },
];

const TEMPLATE: &str = "extends = \"llama\"\nmodel_type = [\"llama\"]\n";

#[test]
fn every_failure_says_what_it_owes() -> TestResult {
    let mut wrong = Vec::new();
    for row in ROWS {
        let place = Place::of(row.case)?;
        (row.spoil)(&place).map_err(|error| format!("{}: {error}", row.name))?;
        let before = place.listing()?;
        let text = place.build(row.arguments)?;
        let json = place.build(&[&["--json"], row.arguments].concat())?;
        let mut complain = |what: String| wrong.push(format!("{}: {what}", row.name));
        complaints(row.code, row.words, &text, &json).into_iter().for_each(&mut complain);
        if place.listing()? != before {
            complain(format!("left behind: {:?}", place.listing()?));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}

/// What is wrong with a failure, as text and as JSON.
fn complaints(code: &str, words: &[&str], text: &Output, json: &Output) -> Vec<String> {
    let mut wrong = Vec::new();
    for output in [text, json] {
        if output.status.code() != Some(1) {
            wrong.push(format!("ended with {}", output.status));
        }
        if String::from_utf8_lossy(&output.stderr).contains("panicked") {
            wrong.push("panicked".to_owned());
        }
    }
    let printed = String::from_utf8_lossy(&text.stderr);
    if !printed.contains(&format!("error[{code}]: ")) {
        wrong.push(format!("not {code}: {printed}"));
    }
    wrong.extend(words.iter().filter(|word| !printed.contains(**word)).map(|word| format!("no {word:?} in {printed}")));
    let stderr = String::from_utf8_lossy(&json.stderr);
    let value: Value = serde_json::from_str(stderr.lines().last().unwrap_or_default()).unwrap_or_default();
    if value["error"]["code"] != code {
        wrong.push(format!("as JSON: {stderr}"));
    }
    for field in ["subject", "found", "expected", "help"] {
        let said = value["error"][field].as_str().unwrap_or_default();
        if said.is_empty() {
            wrong.push(format!("nothing under {field} in {printed}"));
        }
        // What is printed is what is in the JSON, but for the random name of a directory that is being written.
        if field != "subject" && !said.lines().all(|line| printed.contains(line)) {
            wrong.push(format!("{field} differs: {said} in JSON, {printed}"));
        }
    }
    wrong
}

#[test]
fn what_is_allowed_is_recorded() -> TestResult {
    let place = Place::of("llama")?;
    stray_tensor(&place)?;
    place.set("logit_scale", json!(0.5))?;
    let allowed = ["--allow-unused-tensor", "model.stray", "--allow-unused-key", "logit_scale"];
    let ran = place.build(&allowed)?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let manifest: Value = serde_json::from_slice(&fs::read(place.path("out").join("hf2onnx.json"))?)?;
    assert_eq!(manifest["config_keys"]["allowed"], json!(["logit_scale"]));
    assert_eq!(manifest["dropped_tensors"]["model.stray"], json!("allowed by the user"));
    // A directory of hf2onnx's own is replaced when that is asked for, and only then.
    assert_eq!(place.build(&allowed)?.status.code(), Some(1));
    assert!(place.build(&[&allowed[..], &["--force"]].concat())?.status.success());
    assert_eq!(place.names()?, ["out", "repo"]);
    Ok(())
}

/// A file that grows beyond what the system lets it: what a full disk looks like to the writer.
#[cfg(unix)]
#[test]
fn a_full_disk() -> TestResult {
    let place = Place { dir: tempfile::tempdir_in(scratch())? };
    let run = |json: &str| {
        // Ignored, the signal becomes an error of the write.
        let script = format!("trap '' XFSZ; ulimit -f 64; exec \"$0\" {json} build \"$1\" --output out");
        let mut command = Command::new("sh");
        command
            .args(["-c", &script, env!("CARGO_BIN_EXE_hf2onnx")])
            .arg(common::kjv_llama())
            .current_dir(place.dir.path())
            .output()
    };
    let wrong = complaints("io", &["model.onnx_data", "disk space"], &run("")?, &run("--json")?);
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(place.names()?.is_empty(), "left behind: {:?}", place.names()?);
    Ok(())
}

impl Place {
    fn of(case: &str) -> TestResult<Self> {
        let dir = tempfile::tempdir_in(scratch())?;
        let repo = dir.path().join("repo");
        fs::create_dir(&repo)?;
        for entry in fs::read_dir(Case::named(case)?.repo()?)? {
            let entry = entry?;
            fs::copy(entry.path(), repo.join(entry.file_name()))?;
        }
        Ok(Self { dir })
    }

    fn build(&self, arguments: &[&str]) -> TestResult<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hf2onnx"));
        command.args(["build", "repo", "--output", "out"]).args(arguments).current_dir(self.dir.path());
        Ok(command.output()?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path("repo").join(name)
    }

    fn remove(&self, name: &str) -> TestResult {
        Ok(fs::remove_file(self.file(name))?)
    }

    fn write(&self, name: &str, text: &str) -> TestResult {
        Ok(fs::write(self.file(name), text)?)
    }

    fn template(&self, text: &str) -> TestResult {
        Ok(fs::write(self.path("mine.toml"), text)?)
    }

    fn config(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> TestResult {
        let mut config = serde_json::from_slice(&fs::read(self.file("config.json"))?)?;
        change(&mut config);
        self.write("config.json", &serde_json::to_string(&config)?)
    }

    fn set(&self, key: &str, value: Value) -> TestResult {
        self.config(|config| drop(config.insert(key.to_owned(), value)))
    }

    fn weights(&self, change: impl FnOnce(&mut Vec<u8>)) -> TestResult {
        let path = self.file("model.safetensors");
        let mut bytes = fs::read(&path)?;
        change(&mut bytes);
        Ok(fs::write(path, bytes)?)
    }

    /// Changes the list of tensors. New ones are vectors of bytes.
    fn tensors(&self, change: impl FnOnce(&mut Vec<(String, safetensors::Dtype, Vec<u8>)>)) -> TestResult {
        let path = self.file("model.safetensors");
        let bytes = fs::read(&path)?;
        let old = SafeTensors::deserialize(&bytes)?;
        let mut list: Vec<_> =
            old.tensors().into_iter().map(|(name, view)| (name, view.dtype(), view.data().to_vec())).collect();
        change(&mut list);
        let views = list.iter().map(|(name, dtype, data)| {
            let known = old.tensor(name).ok().filter(|view| view.dtype() == *dtype);
            let shape = known.map_or(vec![data.len()], |view| view.shape().to_vec());
            Ok((name.as_str(), TensorView::new(*dtype, shape, data)?))
        });
        let views = views.collect::<TestResult<Vec<_>>>()?;
        Ok(fs::write(path, safetensors::serialize(views, None)?)?)
    }

    fn names(&self) -> TestResult<Vec<String>> {
        names_in(self.dir.path())
    }

    /// What lies in the place and in its output, if there is one.
    fn listing(&self) -> TestResult<(Vec<String>, Vec<String>)> {
        let out = self.path("out");
        Ok((self.names()?, if out.is_dir() { names_in(&out)? } else { Vec::new() }))
    }
}

fn stray_tensor(place: &Place) -> TestResult {
    place.tensors(|tensors| tensors.push(("model.stray".to_owned(), safetensors::Dtype::U8, vec![1, 2, 3])))
}

fn names_in(dir: &Path) -> TestResult<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Replaces the first occurrence by as many other bytes.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap_or_default();
    bytes[at..at + to.len()].copy_from_slice(to);
}
