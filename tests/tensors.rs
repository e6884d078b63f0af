//! What checkpoints hold besides what a model takes: what transformers loads is built and computes the same, and what
//! contradicts the configuration is refused by name.
//!
//! Every row changes the tensors of a golden case in a way that leaves its golden right, or that has to be refused.
#![allow(clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::changed::Right::{Refused, Same};
use common::changed::{Repo, Row, Tensor, all_right, f32s, halves, row, safetensors_in, strip, tensor, verified};
use common::models::{build_with, options, runtime};
use common::{Case, TestResult, hf2onnx, scratch};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

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
            r.add(f32s("model.rotary_emb.inv_freq", &[8], &frequencies(5000.0, 16)));
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
fn buffers_and_left_overs() -> TestResult {
    all_right(BUFFERS)
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

/// A change of an index; the name is the last shard's.
type Change = fn(&mut Map<String, Value>, &str);

/// What the index says is not what the shards hold: the headers are believed, with a note.
#[test]
fn an_index_that_is_wrong() -> TestResult {
    runtime()?;
    let whole = Case::named("llama-sharded")?.repo()?;
    let index = |text: &str| -> TestResult<Value> { Ok(serde_json::from_str(text)?) };
    let text = fs::read_to_string(whole.join("model.safetensors.index.json"))?;
    let shards: Vec<PathBuf> = safetensors_in(&whole)?;
    let last = shards.last().and_then(|path| path.file_name()?.to_str()).ok_or("no shards")?.to_owned();
    let changes: [(&str, Change); 3] = [
        ("a head that no shard holds", |map, last| drop(map.insert("model.extra.weight".to_owned(), json!(last)))),
        ("a tensor in another shard", |map, last| {
            drop(map.insert("model.embed_tokens.weight".to_owned(), json!(last)));
        }),
        ("a tensor that it does not name", |map, _| drop(map.remove("model.layers.0.mlp.down_proj.weight"))),
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
