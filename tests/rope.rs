//! How transformers rotates, for configurations that say it in every way that the field has (`golden/rope.py` records
//! them): the description of each has the same angles, or refuses the configuration.

mod common;

use std::fs;
use std::path::Path;

use common::TestResult;
use hf2onnx::describe::{choose, describe};
use hf2onnx::lower::{Frequencies, frequencies};
use hf2onnx::spec::{ModelSpec, Rope};
use serde::Deserialize;
use serde_json::{Map, Value};

/// What stands in a configuration, and what transformers makes of it.
#[derive(Deserialize)]
struct Row {
    name: String,
    rope: Map<String, Value>,
    layers: Option<Vec<Turn>>,
    /// Why transformers refuses it.
    error: Option<String>,
}

/// How a layer rotates.
#[derive(Deserialize)]
struct Turn {
    /// What cosine and sine are multiplied with.
    scale: f64,
    /// Angles at position 1.
    angles: Vec<f64>,
}

/// Keys that a row gives, or that are absent.
const KEYS: [&str; 8] = [
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    "original_max_position_embeddings",
    "rope_local_base_freq",
];

/// What is refused although transformers takes it, by what the error says: it would not be what was meant.
const REFUSED: [&str; 4] = [
    // transformers rotates whole heads, and does not read the key.
    "rotate whole heads",
    // It has sets by layer type and does not read what stands beside them.
    "one set of parameters for all layers",
    // It takes rope_scaling for layers that have parameters of their own.
    "two settings of one thing",
    // It does not read the scaling at all.
    "the old name of rope_type",
];

/// A case's configuration without what the rows give.
fn base(case: &Path) -> TestResult<Map<String, Value>> {
    let mut config: Map<String, Value> = serde_json::from_str(&fs::read_to_string(case.join("config.json"))?)?;
    config.retain(|key, _| !KEYS.contains(&key.as_str()));
    Ok(config)
}

/// The angles at position 1 of a short sequence.
fn angles(rope: &Rope) -> Vec<f64> {
    match frequencies(rope) {
        Frequencies::Fixed(values) | Frequencies::Switched { short: values, .. } => {
            values.into_iter().map(f64::from).collect()
        }
        Frequencies::Growing { theta, exponents, .. } => {
            exponents.into_iter().map(|exponent| theta.powf(-f64::from(exponent))).collect()
        }
    }
}

/// What is wrong with a description, layer by layer; nothing if it is right.
fn difference(spec: &ModelSpec, wanted: &[Turn]) -> Option<String> {
    if spec.layers.len() != wanted.len() {
        return Some(format!("{} layers", spec.layers.len()));
    }
    spec.layers.iter().zip(wanted).enumerate().find_map(|(index, (layer, wanted))| {
        // A layer without rotation is handed what the others use.
        let rope = layer.attention.rope.as_ref()?;
        let got = angles(rope);
        let near = |a: f64, b: f64| (a - b).abs() <= 2e-6 * b.abs().max(1e-3);
        let same = got.len() == wanted.angles.len() && got.iter().zip(&wanted.angles).all(|(a, b)| near(*a, *b));
        let scaled = near(rope.attention_factor, wanted.scale);
        (!same || !scaled).then(|| {
            format!(
                "layer {index}: {got:?} times {}, expected {:?} times {}",
                rope.attention_factor, wanted.angles, wanted.scale
            )
        })
    })
}

#[test]
fn every_spelling_rotates_as_transformers_does_or_is_refused() -> TestResult {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let (mut wrong, mut compared) = (Vec::new(), 0);
    for entry in fs::read_dir(golden.join("rope"))? {
        let path = entry?.path();
        let case = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let rows: Vec<Row> = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let config = base(&golden.join("cases").join(&case))?;
        let template = choose(&config, None)?;
        for row in rows {
            let config = config.clone().into_iter().chain(row.rope.clone()).collect();
            let spec = describe(&template, &config, &[]).map(|description| description.spec);
            let found = match (row.layers, spec) {
                (Some(_), Err(error)) => {
                    let text = error.to_string();
                    (!REFUSED.iter().any(|words| text.contains(words))).then(|| format!("refused: {text}"))
                }
                (Some(wanted), Ok(spec)) => difference(&spec, &wanted),
                // What transformers refuses may have one meaning here; the goldens say which.
                (None, _) => row.error.is_none().then(|| "a row without a result".to_owned()),
            };
            compared += 1;
            wrong.extend(found.map(|found| format!("{case}, {}: {found}", row.name)));
        }
    }
    assert!(compared > 1000, "{compared} rows");
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}
