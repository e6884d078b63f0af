//! What checkpoints hold besides what a model takes, and names that differ: what transformers loads is built and
//! computes the same, and what contradicts the configuration is refused by name.
//!
//! Every row changes the tensors of a golden case in a way that leaves its golden right, or that has to be refused.
#![allow(clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::models::{build_with, options, runtime};
use common::{Case, TestResult, cases, hf2onnx, scratch};
use hf2onnx::compile::{Compiled, Options, Weights, compile};
use hf2onnx::element::ElementType;
use hf2onnx::error::Error;
use hf2onnx::golden::Golden;
use hf2onnx::verify::{self, against_golden};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

/// A tensor of a checkpoint that is being changed.
#[derive(Clone)]
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// A repository whose configuration and tensors are changed before they are written.
struct Repo {
    config: Map<String, Value>,
    tensors: Vec<Tensor>,
}

impl Repo {
    fn of(case: &str) -> TestResult<Self> {
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

    fn get(&self, name: &str) -> Tensor {
        let found = self.tensors.iter().find(|tensor| tensor.name == name);
        found.cloned().unwrap_or_else(|| f32s(&format!("no tensor {name}"), &[1], &[0.0]))
    }

    fn add(&mut self, tensor: Tensor) {
        self.tensors.retain(|other| other.name != tensor.name);
        self.tensors.push(tensor);
    }

    fn rename(&mut self, from: &str, to: &str) {
        for tensor in self.tensors.iter_mut().filter(|tensor| tensor.name == from) {
            to.clone_into(&mut tensor.name);
        }
    }

    /// A tensor again under another name.
    fn copy(&mut self, from: &str, to: &str) {
        let name = to.to_owned();
        self.add(Tensor { name, ..self.get(from) });
    }

    /// Changes the floats of a tensor that is float32.
    fn floats(&mut self, name: &str, change: impl Fn(usize, f32) -> f32) {
        let Tensor { shape, data, .. } = self.get(name);
        let values: Vec<f32> =
            data.as_chunks().0.iter().enumerate().map(|(i, b)| change(i, f32::from_le_bytes(*b))).collect();
        self.add(f32s(name, &shape, &values));
    }

    fn set(&mut self, key: &str, value: Value) {
        self.config.insert(key.to_owned(), value);
    }

    fn write(&self, dir: &Path) -> TestResult {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("config.json"), serde_json::to_string(&self.config)?)?;
        fs::write(dir.join("model.safetensors"), serialized(&self.tensors)?)?;
        Ok(())
    }
}

fn serialized(tensors: &[Tensor]) -> TestResult<Vec<u8>> {
    let views = tensors.iter().map(|t| Ok((t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.data)?)));
    Ok(safetensors::serialize(views.collect::<TestResult<Vec<_>>>()?, None)?)
}

fn safetensors_in(dir: &Path) -> TestResult<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<TestResult<_>>()?;
    let weights = |path: &Path| path.extension().is_some_and(|end| end == "safetensors");
    paths.retain(|path| weights(path) && path.file_name().is_some_and(|name| name != "golden.safetensors"));
    paths.sort();
    Ok(paths)
}

fn tensor<const N: usize>(name: &str, dtype: Dtype, shape: &[usize], data: impl Iterator<Item = [u8; N]>) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data: data.flatten().collect() }
}

fn f32s(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    tensor(name, Dtype::F32, shape, values.iter().map(|value| value.to_le_bytes()))
}

fn halves(name: &str, dtype: Dtype, values: &[f32]) -> Tensor {
    let bytes = |value: &f32| match dtype {
        Dtype::F16 => half::f16::from_f32(*value).to_le_bytes(),
        _ => half::bf16::from_f32(*value).to_le_bytes(),
    };
    tensor(name, dtype, &[values.len()], values.iter().map(bytes))
}

fn counted(name: &str, first: i64, count: i64) -> Tensor {
    let length = usize::try_from(count).unwrap_or(0);
    tensor(name, Dtype::I64, &[1, length], (first..first + count).map(i64::to_le_bytes))
}

/// `theta^(-2i / size)`, as transformers computes it.
fn frequencies(theta: f32, size: u8) -> Vec<f32> {
    (0..size / 2).map(|i| 1.0 / theta.powf(f32::from(2 * i) / f32::from(size))).collect()
}

/// A causal mask of bytes; a query sees so many keys.
fn mask(name: &str, length: usize, window: usize) -> Tensor {
    let sees = |query: usize, key: usize| key <= query && query - key < window;
    let bytes = (0..length * length).map(|at| [u8::from(sees(at / length, at % length))]);
    tensor(name, Dtype::BOOL, &[1, 1, length, length], bytes)
}

/// What has to become of a changed checkpoint.
enum Right {
    /// It computes what the case computes; these tensors are dropped with these words.
    Same(&'static [(&'static str, &'static str)]),
    /// The same, and a note has these words.
    Noted(&'static [&'static str]),
    /// An error of this code with these words.
    Refused(&'static str, &'static [&'static str]),
}

struct Row {
    name: &'static str,
    case: &'static str,
    change: fn(&mut Repo),
    right: Right,
}

const fn row(name: &'static str, case: &'static str, change: fn(&mut Repo), right: Right) -> Row {
    Row { name, case, change, right }
}

use Right::{Noted, Refused, Same};

const HEADS: &[Row] = &[
    row(
        "the embedding again",
        "llama-tied",
        |r| r.copy("model.embed_tokens.weight", "lm_head.weight"),
        Same(&[("lm_head.weight", "tied")]),
    ),
    row("the head's name alone", "llama-tied", |r| r.rename("model.embed_tokens.weight", "lm_head.weight"), Same(&[])),
    row(
        "the head's name alone, under the model's prefix",
        "llama-tied",
        |r| r.rename("model.embed_tokens.weight", "model.lm_head.weight"),
        Same(&[]),
    ),
    row(
        "the embedding again in a wider type",
        "llama-tied",
        |r| {
            let Tensor { shape, data, .. } = r.get("model.embed_tokens.weight");
            let wide = data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)).to_le_bytes());
            r.add(tensor("lm_head.weight", Dtype::F64, &shape, wide));
        },
        Same(&[("lm_head.weight", "tied")]),
    ),
    row(
        "zeros of another sign",
        "llama-tied",
        |r| {
            // Both are zero, and no token of the golden reads them.
            r.floats("model.embed_tokens.weight", |_, value| value);
            r.copy("model.embed_tokens.weight", "lm_head.weight");
            r.floats("lm_head.weight", |_, value| if value == 0.0 { -value } else { value });
        },
        Same(&[("lm_head.weight", "tied")]),
    ),
    row(
        "a head of its own",
        "llama",
        |r| r.set("tie_word_embeddings", json!(true)),
        Noted(&["lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings"]),
    ),
    row(
        "embed_out of its own",
        "gpt_neox",
        |r| r.set("tie_word_embeddings", json!(true)),
        Noted(&["embed_out.weight"]),
    ),
    row("a head and its bias", "phi", |r| r.set("tie_word_embeddings", json!(true)), Noted(&["lm_head.weight"])),
    row(
        "a head of its own, bare",
        "llama",
        |r| {
            r.set("tie_word_embeddings", json!(true));
            strip(r, "model.");
        },
        Noted(&["lm_head.weight", "embed_tokens.weight"]),
    ),
    row(
        "output_projection again",
        "biogpt",
        |r| r.copy("biogpt.embed_tokens.weight", "output_projection.weight"),
        Same(&[("output_projection.weight", "tied")]),
    ),
    row(
        "decoder.weight again",
        "modernbert-decoder",
        |r| r.copy("model.embeddings.tok_embeddings.weight", "decoder.weight"),
        Same(&[("decoder.weight", "tied")]),
    ),
    row(
        "decoder.weight alone",
        "modernbert-decoder",
        |r| {
            r.rename("model.embeddings.tok_embeddings.weight", "decoder.weight");
        },
        Same(&[]),
    ),
    row(
        "gpt2's head again",
        "gpt2",
        |r| r.copy("transformer.wte.weight", "lm_head.weight"),
        Same(&[("lm_head.weight", "tied")]),
    ),
    row(
        "a head of another shape",
        "llama-tied",
        |r| r.add(f32s("lm_head.weight", &[3, 64], &[0.5; 192])),
        Refused("tensor-shape", &["lm_head.weight", "[3, 64]"]),
    ),
    row(
        "a head of bytes",
        "llama-tied",
        |r| r.add(tensor("lm_head.weight", Dtype::U8, &[2], [[1], [2]].into_iter())),
        Refused("quantization-unsupported", &["lm_head.weight"]),
    ),
    row(
        "neither",
        "llama-tied",
        |r| r.tensors.retain(|t| t.name != "model.embed_tokens.weight"),
        Refused("tensor-missing", &["model.embed_tokens.weight"]),
    ),
];

/// Removes a prefix from every name.
fn strip(repo: &mut Repo, prefix: &str) {
    for tensor in &mut repo.tensors {
        tensor.name = tensor.name.strip_prefix(prefix).unwrap_or(&tensor.name).to_owned();
    }
}

const PREFIXES: &[Row] = &[
    row("bare llama", "llama", |r| strip(r, "model."), Same(&[])),
    row("bare gpt2", "gpt2", |r| strip(r, "transformer."), Same(&[])),
    row("bare opt", "opt", |r| strip(r, "model."), Same(&[])),
    row("bare experts", "mixtral", |r| strip(r, "model."), Same(&[])),
    row(
        "half of it bare",
        "llama",
        |r| {
            for tensor in r.tensors.iter_mut().filter(|t| t.name.contains("layers.1.")) {
                tensor.name = tensor.name.replace("model.", "");
            }
        },
        Same(&[]),
    ),
    row(
        "half of an expert's stack bare",
        "mixtral",
        |r| {
            for tensor in r.tensors.iter_mut().filter(|t| t.name.contains("experts.1.")) {
                tensor.name = tensor.name.replacen("model.", "", 1);
            }
        },
        Same(&[]),
    ),
    row(
        "the prefix twice",
        "llama",
        |r| {
            r.tensors.iter_mut().for_each(|t| t.name = format!("model.{}", t.name));
        },
        Same(&[]),
    ),
    row(
        "a tensor both ways",
        "llama",
        |r| r.copy("model.norm.weight", "norm.weight"),
        Refused("tensor-unexpected", &["norm.weight"]),
    ),
];

const FREQUENCIES: &str = "computed from the configuration";

const BUFFERS: &[Row] = &[
    row(
        "frequencies of the model",
        "llama",
        |r| {
            r.add(f32s("model.rotary_emb.inv_freq", &[8], &frequencies(10000.0, 16)));
        },
        Same(&[("model.rotary_emb.inv_freq", FREQUENCIES)]),
    ),
    row(
        "frequencies of each layer, in bfloat16",
        "llama",
        |r| {
            for layer in 0..2 {
                let name = format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq");
                r.add(halves(&name, Dtype::BF16, &frequencies(10000.0, 16)));
            }
        },
        Same(&[("model.layers.1.self_attn.rotary_emb.inv_freq", FREQUENCIES)]),
    ),
    row(
        "frequencies in float16, of a bare model",
        "llama",
        |r| {
            strip(r, "model.");
            r.add(halves("layers.0.self_attn.rotary_emb.inv_freq", Dtype::F16, &frequencies(10000.0, 16)));
        },
        Same(&[("layers.0.self_attn.rotary_emb.inv_freq", FREQUENCIES)]),
    ),
    row(
        "frequencies that the configuration divides",
        "llama-linear",
        |r| {
            r.add(f32s("model.rotary_emb.inv_freq", &[8], &frequencies(10000.0, 16)));
        },
        Same(&[("model.rotary_emb.inv_freq", FREQUENCIES)]),
    ),
    row(
        "frequencies of another prefix",
        "gpt_neox",
        |r| {
            let size = f32s("gpt_neox.layers.0.attention.rotary_emb.inv_freq", &[2], &frequencies(10000.0, 4));
            r.add(size);
        },
        Same(&[("gpt_neox.layers.0.attention.rotary_emb.inv_freq", FREQUENCIES)]),
    ),
    row(
        "another base",
        "llama",
        |r| {
            r.add(f32s("model.rotary_emb.inv_freq", &[8], &frequencies(500_000.0, 16)));
        },
        Refused("tensor-unexpected", &["model.rotary_emb.inv_freq", "rope_theta", "--allow-unused-tensor"]),
    ),
    row(
        "another base in one layer, in bfloat16",
        "llama",
        |r| {
            r.add(halves("model.layers.1.self_attn.rotary_emb.inv_freq", Dtype::BF16, &frequencies(20000.0, 16)));
        },
        Refused("tensor-unexpected", &["layers.1.self_attn.rotary_emb.inv_freq", "frequency 1"]),
    ),
    row(
        "too many frequencies",
        "llama",
        |r| {
            r.add(f32s("model.rotary_emb.inv_freq", &[16], &frequencies(10000.0, 32)));
        },
        Refused("tensor-unexpected", &["model.rotary_emb.inv_freq"]),
    ),
    row(
        "frequencies of what does not rotate",
        "gpt2",
        |r| {
            r.add(f32s("transformer.h.0.attn.rotary_emb.inv_freq", &[8], &frequencies(10000.0, 16)));
        },
        Refused("tensor-unexpected", &["inv_freq", "rotates nothing"]),
    ),
    row(
        "causal masks",
        "gpt2",
        |r| {
            r.add(mask("transformer.h.0.attn.bias", 32, 99));
            r.add(mask("h.1.attn.bias", 16, 99));
            r.add(f32s("transformer.h.0.attn.masked_bias", &[], &[-1e4]));
            r.add(halves("transformer.h.1.attn.masked_bias", Dtype::F16, &[-1e9]));
        },
        Same(&[("transformer.h.0.attn.bias", "causal mask"), ("transformer.h.1.attn.masked_bias", "masks with")]),
    ),
    row(
        "a mask that lets through",
        "gpt2",
        |r| {
            let mut wrong = mask("transformer.h.0.attn.bias", 32, 99);
            wrong.data[5] = 1;
            r.add(wrong);
        },
        Refused("tensor-unexpected", &["transformer.h.0.attn.bias", "mask"]),
    ),
    row(
        "a masked_bias that masks nothing",
        "gpt2",
        |r| {
            r.add(f32s("transformer.h.0.attn.masked_bias", &[], &[-1.0]));
        },
        Refused("tensor-unexpected", &["masked_bias", "-1000"]),
    ),
    row(
        "positions",
        "openai-gpt",
        |r| r.add(counted("transformer.position_ids", 0, 32)),
        Same(&[("transformer.position_ids", "counted")]),
    ),
    row(
        "positions elsewhere",
        "llama",
        |r| r.add(counted("model.position_ids", 0, 8)),
        Same(&[("model.position_ids", "counted")]),
    ),
    row(
        "positions that begin at 2",
        "llama",
        |r| r.add(counted("model.position_ids", 2, 8)),
        Refused("tensor-unexpected", &["position_ids", "0, 1, 2"]),
    ),
    row(
        "layers for speculation",
        "deepseek_v3",
        |r| {
            let layers = r.config["num_hidden_layers"].as_u64().unwrap_or(0);
            for name in ["eh_proj.weight", "enorm.weight", "mlp.experts.0.up_proj.weight"] {
                r.add(f32s(&format!("model.layers.{layers}.{name}"), &[2], &[0.1, 0.2]));
            }
        },
        Same(&[]),
    ),
    row(
        "a layer too many",
        "glm4_moe",
        |r| {
            let layers = r.config["num_hidden_layers"].as_u64().unwrap_or(0);
            r.add(f32s(&format!("model.layers.{layers}.input_layernorm.weight"), &[2], &[0.1, 0.2]));
        },
        Refused("tensor-unexpected", &["input_layernorm", "num_hidden_layers"]),
    ),
    row(
        "speculation of exaone",
        "exaone_moe",
        |r| r.add(f32s("model.mtp.layers.0.w", &[1], &[1.0])),
        Same(&[("model.mtp.layers.0.w", "speculation")]),
    ),
    row(
        "speculation of mimo",
        "mimo_v2_flash",
        |r| r.add(f32s("model.mtp.layers.0.w", &[1], &[1.0])),
        Same(&[("model.mtp.layers.0.w", "speculation")]),
    ),
    row(
        "speculation of ernie",
        "ernie4_5_moe",
        |r| r.add(f32s("mtp.0.w", &[1], &[1.0])),
        Same(&[("mtp.0.w", "speculation")]),
    ),
    row(
        "speculation of mellum",
        "mellum",
        |r| r.add(f32s("mtp.fc.weight", &[1], &[1.0])),
        Same(&[("mtp.fc.weight", "speculation")]),
    ),
    row(
        "speculation of a llama",
        "llama",
        |r| r.add(f32s("mtp.0.w", &[1], &[1.0])),
        Refused("tensor-unexpected", &["mtp.0.w"]),
    ),
    row(
        "scales of 1",
        "llama",
        |r| {
            r.add(f32s("model.layers.0.self_attn.kv_scale", &[], &[1.0]));
            r.add(f32s("model.layers.0.mlp.down_proj.output_scale", &[1], &[1.0]));
            r.add(halves("model.layers.1.self_attn.k_scale", Dtype::F16, &[1.0]));
        },
        Same(&[("model.layers.0.self_attn.kv_scale", "cache")]),
    ),
    row(
        "a scale that is not 1",
        "llama",
        |r| r.add(f32s("model.layers.0.self_attn.kv_scale", &[], &[0.5])),
        Refused("tensor-unexpected", &["kv_scale", "not 1"]),
    ),
    row(
        "biases of zeros",
        "llama",
        |r| {
            r.add(f32s("model.layers.0.mlp.down_proj.bias", &[64], &[0.0; 64]));
            r.add(halves("model.layers.1.self_attn.q_proj.bias", Dtype::F16, &[-0.0; 64]));
            r.add(f32s("lm_head.bias", &[256], &[0.0; 256]));
        },
        Same(&[("model.layers.0.mlp.down_proj.bias", "zeros"), ("lm_head.bias", "zeros")]),
    ),
    row(
        "a bias that is not zero",
        "llama",
        |r| {
            r.add(f32s("model.layers.0.mlp.down_proj.bias", &[2], &[0.0, 1e-30]));
        },
        Refused("tensor-unexpected", &["model.layers.0.mlp.down_proj.bias", "not zero"]),
    ),
    row(
        "zeros that are no product's bias",
        "llama",
        |r| {
            r.add(f32s("model.layers.0.mlp.other.bias", &[2], &[0.0, 0.0]));
        },
        Refused("tensor-unexpected", &["model.layers.0.mlp.other.bias"]),
    ),
    row(
        "sines and cosines",
        "xglm",
        |r| r.add(sinusoids(r.config["d_model"].as_u64())),
        Same(&[("model.embed_positions.weights", "computed")]),
    ),
    row(
        "sines and cosines of another base",
        "xglm",
        |r| {
            let mut table = sinusoids(r.config["d_model"].as_u64());
            table.data.rotate_left(4);
            r.add(table);
        },
        Refused("tensor-unexpected", &["embed_positions.weights", "sines"]),
    ),
];

/// Sines and cosines of positions, as `XGLMSinusoidalPositionalEmbedding` has them.
fn sinusoids(width: Option<u64>) -> Tensor {
    let width = usize::try_from(width.unwrap_or(0)).unwrap_or(0);
    let (half, rows) = (width / 2, 40);
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let angle = |row: usize, i: usize| row as f32 * (-(i as f32) * (10000_f32.ln() / (half as f32 - 1.0))).exp();
    let value = |at: usize| {
        let (row, column) = (at / width, at % width);
        if column < half { angle(row, column).sin() } else { angle(row, column - half).cos() }
    };
    f32s("model.embed_positions.weights", &[rows, width], &(0..rows * width).map(value).collect::<Vec<_>>())
}

#[test]
fn heads_that_are_tied() -> TestResult {
    all_right(HEADS)
}

#[test]
fn names_with_and_without_their_prefix() -> TestResult {
    all_right(PREFIXES)
}

#[test]
fn buffers_and_left_overs() -> TestResult {
    all_right(BUFFERS)
}

fn all_right(rows: &[Row]) -> TestResult {
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

fn is_right(row: &Row) -> TestResult {
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
            let notes = manifest["notes"].to_string();
            if let Some(word) = words.iter().find(|word| !notes.contains(**word)) {
                return Err(format!("no {word:?} in {notes}").into());
            }
            verified(row.case, &output)
        }
    }
}

/// Must hold against the case's golden.
fn verified(case: &str, output: &Path) -> TestResult {
    let settings = verify::Options { threads: 1, ..verify::Options::default() };
    let report = against_golden(output, &Golden::read(&Case::named(case)?.golden())?, &settings)?;
    if report.holds() { Ok(()) } else { Err(report.to_string().into()) }
}

/// Every case without its prefix takes the same tensors; what it makes of them is tested above.
#[test]
fn every_template_takes_the_bare_model() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let mut wrong = Vec::new();
    for case in cases()? {
        let whole = compile(&case.options("primitive")?)?;
        let mut repo = Repo::of(&case.name)?;
        let prefix = ["transformer.", "gpt_neox.", "biogpt.", "model."]
            .into_iter()
            .find(|prefix| repo.tensors.iter().any(|tensor| tensor.name.starts_with(prefix)))
            .ok_or("a case without a prefix")?;
        strip(&mut repo, prefix);
        let dir = place.path().join(&case.name);
        repo.write(&dir)?;
        let bare = compile(&Options { repository: dir, ..case.options("primitive")? });
        let same = |bare: &Compiled| taken(bare) == taken(&whole).replace(prefix, "");
        match bare {
            Ok(bare) if same(&bare) => {}
            Ok(bare) => wrong.push(format!("{}: {}", case.name, taken(&bare))),
            Err(error) => wrong.push(format!("{}: {error}", case.name)),
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}

fn taken(compiled: &Compiled) -> String {
    let each = compiled.plan.parameters.iter().map(|parameter| parameter.weight.to_string());
    each.collect::<Vec<_>>().join("\n")
}

/// A linked build decides as a packed one does, and so does one that is only foretold.
#[test]
fn a_head_of_its_own_in_every_mode() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let dir = place.path().join("repo");
    let mut repo = Repo::of("llama")?;
    repo.set("tie_word_embeddings", json!(true));
    repo.write(&dir)?;
    let linked = Options { weights: Weights::Link { hash: false }, ..options(&dir, "ort-cpu")? };
    let output = place.path().join("linked");
    let compiled = build_with(&linked, &output)?;
    assert!(!compiled.description.spec.head.tied);
    runtime()?;
    verified("llama", &output)?;
    let out = place.path().join("out");
    let dry: Vec<&std::ffi::OsStr> =
        vec!["build".as_ref(), dir.as_os_str(), "--output".as_ref(), out.as_os_str(), "--dry-run".as_ref()];
    let ran = hf2onnx(dry)?;
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success() && said.contains("the head is its own") && !out.exists(), "{said}");
    let inspected = hf2onnx(["inspect".as_ref(), dir.as_os_str()])?;
    let words = String::from_utf8_lossy(&inspected.stdout).into_owned();
    assert!(words.contains("a matrix of its own") && words.contains("the head is its own"), "{words}");
    // The configuration alone can not say.
    fs::remove_file(dir.join("model.safetensors"))?;
    let alone = hf2onnx(["inspect".as_ref(), dir.as_os_str()])?;
    let words = String::from_utf8_lossy(&alone.stdout).into_owned();
    assert!(!alone.status.success() && words.contains("undecided"), "{words}");
    Ok(())
}

/// All left-overs are in one error, and its last line is what allows them.
#[test]
fn one_line_allows_all_left_overs() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let (dir, out) = (place.path().join("repo"), place.path().join("out"));
    let mut repo = Repo::of("llama")?;
    for layer in 0..2 {
        repo.add(f32s(&format!("model.layers.{layer}.mlp.extra.weight"), &[1], &[1.0]));
        repo.add(f32s(&format!("model.layers.{layer}.mlp.down_proj.bias"), &[1], &[1.0]));
    }
    repo.add(f32s("stray", &[1], &[1.0]));
    repo.add(f32s("odd'name [x]", &[1], &[1.0]));
    repo.write(&dir)?;
    let build = |more: &[String]| {
        let mut arguments: Vec<PathBuf> = vec!["build".into(), dir.clone(), "--output".into(), out.clone()];
        arguments.extend(more.iter().map(PathBuf::from));
        hf2onnx(arguments)
    };
    let refused = build(&[])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    for name in ["model.layers.*.mlp.extra.weight (2 tensors)", "model.layers.*.mlp.down_proj.bias", "stray"] {
        assert!(said.contains(name), "{name}: {said}");
    }
    let line = said.split_once("pass ").map(|(_, line)| line.lines().next().unwrap_or_default()).ok_or("no line")?;
    let flags: Vec<String> =
        line.split('\'').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect();
    let allowed = build(&flags)?;
    assert!(allowed.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&allowed.stderr));
    let manifest: Value = serde_json::from_slice(&fs::read(out.join("hf2onnx.json"))?)?;
    assert_eq!(manifest["dropped_tensors"].as_object().map(Map::len), Some(6), "{}", manifest["dropped_tensors"]);
    Ok(())
}

/// What the index says is not what the shards hold: the headers are believed, with a note.
#[test]
fn an_index_that_is_wrong() -> TestResult {
    runtime()?;
    let whole = Case::named("llama-sharded")?.repo()?;
    let index = |text: &str| -> TestResult<Value> { Ok(serde_json::from_str(text)?) };
    let text = fs::read_to_string(whole.join("model.safetensors.index.json"))?;
    let shards: Vec<PathBuf> = safetensors_in(&whole)?;
    let last = shards.last().and_then(|path| path.file_name()?.to_str()).ok_or("no shards")?.to_owned();
    type Change = fn(&mut Map<String, Value>, &str);
    let changes: [(&str, Change); 3] = [
        ("a head that no shard holds", |map, last| drop(map.insert("model.extra.weight".to_owned(), json!(last)))),
        ("a tensor in another shard", |map, last| {
            drop(map.insert("model.embed_tokens.weight".to_owned(), json!(last)))
        }),
        ("a tensor that it does not name", |map, _| drop(map.remove("model.norm.weight"))),
    ];
    for (name, change) in changes {
        let place = tempfile::tempdir_in(scratch())?;
        let dir = place.path().join("repo");
        fs::create_dir(&dir)?;
        for entry in fs::read_dir(&whole)? {
            let entry = entry?;
            fs::copy(entry.path(), dir.join(entry.file_name()))?;
        }
        let mut changed = index(&text)?;
        change(changed["weight_map"].as_object_mut().ok_or("no map")?, &last);
        fs::write(dir.join("model.safetensors.index.json"), changed.to_string())?;
        let output = place.path().join("out");
        let compiled = build_with(&options(&dir, "ort-cpu")?, &output).map_err(|error| format!("{name}: {error}"))?;
        assert_eq!(compiled.notes.len(), 1, "{name}: {:?}", compiled.notes);
        verified("llama-sharded", &output).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

/// Values that float16 does not hold.
#[test]
fn what_float16_does_not_hold() -> TestResult {
    type Change = fn(&mut Repo);
    const NORM: &str = "model.layers.1.input_layernorm.weight";
    const MATRIX: &str = "model.layers.0.mlp.down_proj.weight";
    let refused: [(&str, Change, &[&str]); 6] = [
        ("a matrix", |r| r.floats(MATRIX, |i, v| if i == 77 { 7e4 } else { v }), &[MATRIX, "7e4", "infinity"]),
        ("a norm", |r| r.floats(NORM, |i, v| if i == 3 { -1e6 } else { v }), &[NORM, "1e6"]),
        (
            "a row of a joined matrix",
            |r| {
                r.floats("model.layers.1.self_attn.k_proj.weight", |i, v| if i == 0 { 65520.0 } else { v });
            },
            &["model.layers.1.self_attn.k_proj.weight"],
        ),
        ("a small matrix", |r| r.floats(MATRIX, |_, v| v * 1e-8), &[MATRIX, "become 0"]),
        ("a norm of small scales", |r| r.floats(NORM, |_, v| v * 1e-7), &[NORM, "too small"]),
        (
            "a small value projection",
            |r| {
                r.floats("model.layers.0.self_attn.v_proj.weight", |_, v| v * 1e-6);
            },
            &["model.layers.0.self_attn.v_proj.weight"],
        ),
    ];
    for (name, change, words) in refused {
        let error = in_float16(change)?.err().ok_or(format!("{name}: it was built"))?;
        let error = error.downcast_ref::<Error>().ok_or("another error")?;
        assert_eq!(error.code.as_str(), "tensor-range", "{name}: {error}");
        for word in words.iter().chain(&["--dtype f32"]) {
            assert!(error.to_string().contains(word), "{name}: no {word} in {error}");
        }
    }
    let fine: [(&str, Change, Option<u64>); 4] = [
        ("the largest that it holds", |r| r.floats(MATRIX, |i, v| if i == 77 { 65504.0 } else { v }), None),
        (
            "a bias of small values",
            |r| {
                r.set("mlp_bias", json!(true));
                for layer in 0..2 {
                    for (name, rows) in [("gate", 96), ("up", 96), ("down", 64)] {
                        let name = format!("model.layers.{layer}.mlp.{name}_proj.bias");
                        r.add(f32s(&name, &[rows], &vec![1e-9; rows]));
                    }
                }
            },
            None,
        ),
        ("three small values", |r| r.floats(MATRIX, |i, v| if i < 3 { 1e-9 } else { v }), Some(3)),
        ("infinity itself", |r| r.floats(MATRIX, |i, v| if i == 0 { f32::INFINITY } else { v }), None),
    ];
    for (name, change, zeros) in fine {
        let manifest = in_float16(change)?.map_err(|error| format!("{name}: {error}"))?;
        assert_eq!(manifest["rounded_to_zero"][MATRIX]["zeros"].as_u64(), zeros, "{name}");
        assert_eq!(manifest["notes"].is_null(), !name.contains("bias"), "{name}: {}", manifest["notes"]);
    }
    let many = in_float16(|r| r.floats(MATRIX, |i, v| if i < 300 { 1e-9 } else { v }))??;
    assert!(many["notes"][0].as_str().is_some_and(|note| note.contains("300 of")), "{}", many["notes"]);
    Ok(())
}

fn in_float16(change: impl Fn(&mut Repo)) -> TestResult<TestResult<Value>> {
    let place = tempfile::tempdir_in(scratch())?;
    let (dir, output) = (place.path().join("repo"), place.path().join("out"));
    let mut repo = Repo::of("llama")?;
    change(&mut repo);
    repo.write(&dir)?;
    // This target holds norms in float16 too, and joins queries, keys and values.
    let options = Options { element: ElementType::F16, ..options(&dir, "ort-cuda")? };
    if let Err(error) = build_with(&options, &output) {
        assert!(!output.exists(), "an output was left behind");
        return Ok(Err(error));
    }
    Ok(Ok(serde_json::from_slice(&fs::read(output.join("hf2onnx.json"))?)?))
}
