//! Checkpoints of golden cases whose tensors or configuration are changed, and what has to become of a build of them.

use std::fs;
use std::path::{Path, PathBuf};

use hf2onnx::error::Error;
use hf2onnx::golden::Golden;
use hf2onnx::verify::{self, against_golden};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

use super::models::{build_with, options, runtime};
use super::{Case, TestResult, scratch};

/// A tensor of a checkpoint that is being changed.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// A repository whose configuration and tensors are changed before they are written.
pub struct Repo {
    pub config: Map<String, Value>,
    pub tensors: Vec<Tensor>,
}

impl Repo {
    pub fn of(case: &str) -> TestResult<Self> {
        let dir = Case::named(case)?.repo()?;
        let config = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
        let mut tensors = Vec::new();
        for path in safetensors_in(&dir)? {
            let bytes = fs::read(path)?;
            for (name, view) in SafeTensors::deserialize(&bytes)?.tensors() {
                let (dtype, shape, data) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                tensors.push(Tensor { name, dtype, shape, data });
            }
        }
        Ok(Self { config, tensors })
    }

    pub fn get(&self, name: &str) -> Tensor {
        let found = self.tensors.iter().find(|tensor| tensor.name == name);
        found.cloned().unwrap_or_else(|| f32s(&format!("no tensor {name}"), &[1], &[0.0]))
    }

    pub fn add(&mut self, tensor: Tensor) {
        self.tensors.retain(|other| other.name != tensor.name);
        self.tensors.push(tensor);
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        for tensor in self.tensors.iter_mut().filter(|tensor| tensor.name == from) {
            to.clone_into(&mut tensor.name);
        }
    }

    /// A tensor again under another name.
    pub fn copy(&mut self, from: &str, to: &str) {
        let name = to.to_owned();
        self.add(Tensor { name, ..self.get(from) });
    }

    /// Changes the floats of a tensor that is float32.
    pub fn floats(&mut self, name: &str, change: impl Fn(usize, f32) -> f32) {
        let Tensor { shape, data, .. } = self.get(name);
        let values: Vec<f32> =
            data.as_chunks().0.iter().enumerate().map(|(i, b)| change(i, f32::from_le_bytes(*b))).collect();
        self.add(f32s(name, &shape, &values));
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.config.insert(key.to_owned(), value);
    }

    pub fn write(&self, dir: &Path) -> TestResult {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("config.json"), serde_json::to_string(&self.config)?)?;
        fs::write(dir.join("model.safetensors"), serialized(&self.tensors)?)?;
        Ok(())
    }
}

pub fn serialized(tensors: &[Tensor]) -> TestResult<Vec<u8>> {
    let views = tensors.iter().map(|t| Ok((t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.data)?)));
    Ok(safetensors::serialize(views.collect::<TestResult<Vec<_>>>()?, None)?)
}

pub fn safetensors_in(dir: &Path) -> TestResult<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<TestResult<_>>()?;
    let weights = |path: &Path| path.extension().is_some_and(|end| end == "safetensors");
    paths.retain(|path| weights(path) && path.file_name().is_some_and(|name| name != "golden.safetensors"));
    paths.sort();
    Ok(paths)
}

pub fn tensor<const N: usize>(
    name: &str,
    dtype: Dtype,
    shape: &[usize],
    data: impl Iterator<Item = [u8; N]>,
) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data: data.flatten().collect() }
}

pub fn f32s(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    tensor(name, Dtype::F32, shape, values.iter().map(|value| value.to_le_bytes()))
}

pub fn halves(name: &str, dtype: Dtype, values: &[f32]) -> Tensor {
    let bytes = |value: &f32| match dtype {
        Dtype::F16 => half::f16::from_f32(*value).to_le_bytes(),
        _ => half::bf16::from_f32(*value).to_le_bytes(),
    };
    tensor(name, dtype, &[values.len()], values.iter().map(bytes))
}

/// What has to become of a changed checkpoint.
pub enum Right {
    /// It computes what the case computes; these tensors are dropped with these words.
    Same(&'static [(&'static str, &'static str)]),
    /// The same, and a note has these words.
    Noted(&'static [&'static str]),
    /// An error of this code with these words.
    Refused(&'static str, &'static [&'static str]),
}

pub struct Row {
    pub name: &'static str,
    pub case: &'static str,
    pub change: fn(&mut Repo),
    pub right: Right,
}

pub const fn row(name: &'static str, case: &'static str, change: fn(&mut Repo), right: Right) -> Row {
    Row { name, case, change, right }
}

use Right::{Noted, Refused, Same};

/// Removes a prefix from every name.
pub fn strip(repo: &mut Repo, prefix: &str) {
    for tensor in &mut repo.tensors {
        tensor.name = tensor.name.strip_prefix(prefix).unwrap_or(&tensor.name).to_owned();
    }
}

pub fn all_right(rows: &[Row]) -> TestResult {
    runtime()?;
    let mut wrong = Vec::new();
    for row in rows {
        if let Err(error) = is_right(row) {
            wrong.push(format!("{} ({}): {error}", row.name, row.case));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}

pub fn is_right(row: &Row) -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let mut repo = Repo::of(row.case)?;
    (row.change)(&mut repo);
    let (dir, output) = (place.path().join("repo"), place.path().join("out"));
    repo.write(&dir)?;
    let options = options(&dir, "ort-cpu")?;
    let built = build_with(&options, &output);
    match (&row.right, built) {
        (Refused(code, words), Err(error)) => {
            let error = error.downcast_ref::<Error>().ok_or("another error")?;
            let absent = words.iter().find(|word| !error.to_string().contains(**word));
            match absent {
                _ if error.code.as_str() != *code => Err(format!("{} instead: {error}", error.code.as_str()).into()),
                Some(word) => Err(format!("no {word:?} in {error}").into()),
                None if output.exists() => Err("it left an output behind".into()),
                None => Ok(()),
            }
        }
        (Refused(..), Ok(_)) => Err("it was built".into()),
        (_, Err(error)) => Err(error),
        (Same(dropped), Ok(compiled)) => {
            let reason = |name: &str| compiled.plan.dropped.get(name).map_or("it is not dropped", String::as_str);
            if let Some((name, _)) = dropped.iter().find(|(name, word)| !reason(name).contains(word)) {
                return Err(format!("{name}: {}", reason(name)).into());
            }
            if !compiled.notes.is_empty() {
                return Err(format!("a note too many: {:?}", compiled.notes).into());
            }
            verified(row.case, &output)
        }
        (Noted(words), Ok(_)) => {
            let manifest: Value = serde_json::from_slice(&fs::read(output.join("hf2onnx.json"))?)?;
            let notes = manifest.get("notes").map(Value::to_string).unwrap_or_default();
            if let Some(word) = words.iter().find(|word| !notes.contains(**word)) {
                return Err(format!("no {word:?} in {notes}").into());
            }
            verified(row.case, &output)
        }
    }
}

/// Must hold against the case's golden.
pub fn verified(case: &str, output: &Path) -> TestResult {
    let settings = verify::Options { threads: 1, ..verify::Options::default() };
    let report = against_golden(output, &Golden::read(&Case::named(case)?.golden())?, &settings)?;
    if report.holds() { Ok(()) } else { Err(report.to_string().into()) }
}
