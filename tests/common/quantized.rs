//! The quantised golden cases, in memory: so that a test can damage one.
// A case that can not be read fails its test.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use hf2onnx::element::StoredType;
use hf2onnx::encoding::{Catalogue, Configs, Parts, Stored};
use hf2onnx::error::{Code, Error, Result};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

/// A stored tensor with its bytes.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Element type.
    pub dtype: StoredType,
    /// Shape.
    pub shape: Vec<usize>,
    /// Little-endian.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// The values of a float tensor.
    pub fn floats(&self) -> Vec<f32> {
        match self.dtype {
            StoredType::F32 => self.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            StoredType::F16 => self.bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            StoredType::BF16 => self.bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            other => panic!("{other} is no float"),
        }
    }
}

/// A quantised repository.
#[derive(Debug, Clone)]
pub struct Repository {
    /// Name of the folder.
    pub name: String,
    /// The JSON files, by name.
    pub files: BTreeMap<String, Map<String, Value>>,
    /// model.safetensors.
    pub tensors: BTreeMap<String, Tensor>,
    /// expected.safetensors: what the format's library dequantises the first layer to.
    pub expected: BTreeMap<String, Tensor>,
}

impl Parts for Repository {
    fn bytes(&self, tensor: &str, range: Range<u64>) -> Result<Cow<'_, [u8]>> {
        let all = self.tensors.get(tensor).ok_or_else(|| Error::new(Code::TensorMissing, tensor))?;
        let (start, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
        all.bytes
            .get(start..end)
            .map(Cow::Borrowed)
            .ok_or_else(|| Error::new(Code::WeightsCorrupt, tensor).found("too few bytes"))
    }
}

impl Repository {
    /// The case of this name.
    pub fn open(name: &str) -> Self {
        Self::read(&folder().join(name))
    }

    /// Every case.
    pub fn all() -> Vec<Self> {
        let mut dirs: Vec<PathBuf> = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
        dirs.sort();
        dirs.iter().filter(|dir| dir.join("expected.safetensors").exists()).map(|dir| Self::read(dir)).collect()
    }

    fn read(dir: &Path) -> Self {
        Self { expected: tensors(&dir.join("expected.safetensors")), ..Self::plain(dir) }
    }

    /// A repository of one model.safetensors that no library has dequantised.
    pub fn plain(dir: &Path) -> Self {
        let json = |path: &PathBuf| path.extension().is_some_and(|kind| kind == "json");
        let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(json);
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let parse = |path: &Path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        Self {
            name: name(dir),
            files: paths.map(|path| (name(&path), parse(&path))).collect(),
            tensors: tensors(&dir.join("model.safetensors")),
            expected: BTreeMap::new(),
        }
    }

    /// The tensors as a header lists them.
    pub fn stored(&self) -> Vec<Stored> {
        let stored = |(name, tensor): (&String, &Tensor)| Stored {
            name: name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        };
        self.tensors.iter().map(stored).collect()
    }

    /// Writes the repository, whatever was done to it, into an empty folder.
    pub fn write(&self, into: &Path) {
        for (name, map) in &self.files {
            fs::write(into.join(name), serde_json::to_vec(map).unwrap()).unwrap();
        }
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, tensor) in &self.tensors {
            let offsets = [data.len(), data.len() + tensor.bytes.len()];
            let (dtype, shape) = (tensor.dtype.as_str(), &tensor.shape);
            header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }));
            data.extend_from_slice(&tensor.bytes);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let length = u64::try_from(header.len()).unwrap().to_le_bytes();
        fs::write(into.join("model.safetensors"), [length.as_slice(), &header, &data].concat()).unwrap();
    }

    /// The catalogue, with the shapes that an architecture would give.
    pub fn catalogue(&self) -> Result<Catalogue> {
        let file = |name: &str| self.files.get(name);
        let configs = Configs {
            config: file("config.json").unwrap(),
            quantize_config: file("quantize_config.json"),
            hf_quant_config: file("hf_quant_config.json"),
            quanto_qmap: file("quanto_qmap.json"),
        };
        let shapes = |name: &str| {
            self.expected.get(&name.replace(".layers.1.", ".layers.0.")).map(|tensor| tensor.shape.clone())
        };
        Catalogue::build(&configs, &self.stored(), self, &shapes)?
            .ok_or_else(|| Error::new(Code::ConfigMissing, &self.name))
    }

    /// The quantisation settings of config.json.
    pub fn settings(&mut self) -> &mut Map<String, Value> {
        self.files.get_mut("config.json").unwrap()["quantization_config"].as_object_mut().unwrap()
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join("quantized")
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let dtype = StoredType::parse(&view.dtype().to_string()).unwrap();
        (name, Tensor { dtype, shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    file.tensors().into_iter().map(tensor).collect()
}
