//! Tied heads, the names that tensors go by, and the range of the types that they are written in: the checkpoint decides.
//!
//! Every row changes the tensors of a golden case in a way that leaves its golden right, or that has to be refused.

mod common;

use std::fs;

use common::changed::Right::{Noted, Refused, Same};
use common::changed::{Repo, Row, Tensor, all_right, f32s, row, strip, tensor, verified};
use common::models::{build_with, options, runtime};
use common::{TestResult, cases, hf2onnx, scratch};
use hf2onnx::compile::{Compiled, Options, Weights, compile};
use hf2onnx::element::ElementType;
use hf2onnx::error::Error;
use safetensors::Dtype;
use serde_json::{Value, json};

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

#[test]
fn heads_that_are_tied() -> TestResult {
    all_right(HEADS)
}

#[test]
fn names_with_and_without_their_prefix() -> TestResult {
    all_right(PREFIXES)
}

/// Every case without its prefix takes the same tensors; what it makes of them is tested above.
#[test]
fn every_template_takes_the_bare_model() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let (mut wrong, mut count) = (Vec::new(), 0);
    for case in cases()? {
        let whole = compile(&case.options("primitive")?)?;
        let mut repo = Repo::of(&case.name)?;
        let prefixes = ["transformer.", "gpt_neox.", "biogpt.", "model."];
        let has = |prefix: &&str| repo.tensors.iter().any(|tensor| tensor.name.starts_with(prefix));
        // A model of its own names has none.
        let Some(prefix) = prefixes.into_iter().find(has) else { continue };
        count += 1;
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
    assert!(wrong.is_empty() && count > 100, "of {count} cases\n{}", wrong.join("\n"));
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
