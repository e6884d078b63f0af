//! Quantised checkpoints against the formats' own libraries: every weight to the last bit, and an error for each damage.

// Damaging a golden case is the point; one that is not what it was fails its test.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fmt::Write as _;

use common::quantized::{Repository, Tensor};
use hf2onnx::element::StoredType;
use hf2onnx::encoding::{Logical, affine, affine_rows, decode_rows, order};
use hf2onnx::error::{Code, Error};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// The bits of values; every NaN counts as the same.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() }).collect()
}

#[test]
fn every_weight_is_the_librarys_to_the_last_bit() {
    let cases = Repository::all();
    assert!(cases.len() >= 20, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let catalogue = match case.catalogue() {
            Ok(catalogue) => catalogue,
            Err(error) => {
                wrong.push(format!("{}: {error}", case.name));
                continue;
            }
        };
        let first: Vec<&Logical> =
            catalogue.weights.iter().filter(|weight| weight.name.contains(".layers.0.")).collect();
        let names: Vec<&str> = first.iter().map(|weight| weight.name.as_str()).collect();
        let expected: Vec<&str> = case.expected.keys().map(String::as_str).collect();
        assert_eq!(names, expected, "{}", case.name);
        assert_eq!(catalogue.weights.len(), 2 * names.len(), "{}: two layers alike", case.name);
        for weight in first {
            let expected = &case.expected[&weight.name];
            assert_eq!(weight.shape, expected.shape, "{}: {}", case.name, weight.name);
            assert_eq!(StoredType::element(expected.dtype), Some(weight.dtype), "{}: {}", case.name, weight.name);
            let (got, want) = (decode_rows(weight, &case, 0..weight.rows()).unwrap(), expected.floats());
            let differ = bits(&got).iter().zip(bits(&want)).filter(|(a, b)| **a != *b).count();
            if differ > 0 || got.len() != want.len() {
                let at = bits(&got).iter().zip(bits(&want)).position(|(a, b)| *a != b).unwrap_or(0);
                wrong.push(format!(
                    "{}: {} ({}): {differ} of {} differ, first at {at}: {} instead of {}",
                    case.name,
                    weight.name,
                    weight.encoding.format,
                    want.len(),
                    got[at],
                    want[at]
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn rows_in_pieces_are_the_whole() {
    for case in Repository::all() {
        for weight in &case.catalogue().unwrap().weights {
            let whole = decode_rows(weight, &case, 0..weight.rows()).unwrap();
            for piece in [1, 7, 16, 23] {
                let mut pieces = Vec::new();
                for start in (0..weight.rows()).step_by(piece) {
                    let rows = start..weight.rows().min(start + piece);
                    pieces.extend(decode_rows(weight, &case, rows).unwrap());
                }
                assert!(bits(&pieces) == bits(&whole), "{}: {} in pieces of {piece}", case.name, weight.name);
            }
        }
    }
}

/// What the affine form of a weight gives, or why it has none.
fn through_affine(case: &Repository, weight: &Logical) -> Result<Vec<f32>, String> {
    let form = affine(weight)?;
    let order = order(weight, case).map_err(|error| error.found)?;
    assert_eq!(form.ordered, order.is_some());
    let mut values = Vec::new();
    for start in (0..weight.rows()).step_by(24) {
        let rows = start..weight.rows().min(start + 24);
        let made = affine_rows(weight, case, rows.clone(), order.as_deref()).unwrap();
        assert_eq!(made.codes.len(), rows.len() * weight.columns());
        assert_eq!(made.scales.len(), rows.len() * made.blocks());
        assert!(made.codes.iter().all(|code| u32::from(*code) < 1 << form.bits));
        let outside = [(rows.len(), 0), (0, weight.columns()), (usize::MAX, 0), (usize::MAX, usize::MAX)];
        assert!(outside.iter().all(|(n, k)| made.value(*n, *k).is_none()));
        for n in 0..rows.len() {
            let mut row = vec![0.0; weight.columns()];
            for k in 0..weight.columns() {
                row[order.as_ref().map_or(k, |order| order[k])] = made.value(n, k).unwrap();
            }
            values.extend(row);
        }
    }
    Ok(values)
}

#[test]
fn the_affine_form_has_the_same_values() {
    let mut report = String::new();
    for case in Repository::all() {
        for weight in case.catalogue().unwrap().weights.iter().filter(|weight| weight.name.contains("layers.0.")) {
            let whole = decode_rows(weight, &case, 0..weight.rows()).unwrap();
            let said = match through_affine(&case, weight) {
                Ok(values) if affine(weight).unwrap().exact => {
                    assert!(bits(&values) == bits(&whole), "{}: {}", case.name, weight.name);
                    format!("{:?}", affine(weight).unwrap().zeros)
                }
                Ok(values) => {
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() * f32::EPSILON;
                    assert!(values.iter().zip(&whole).all(near), "{}: {}", case.name, weight.name);
                    "to the last bit but one".to_owned()
                }
                Err(reason) => format!("none: {reason}"),
            };
            let name = weight.name.trim_start_matches("model.layers.0.").trim_end_matches(".weight");
            writeln!(report, "{:15} {name:24} {}: {said}", case.name, weight.encoding.format).unwrap();
        }
    }
    insta::assert_snapshot!(report);
}

/// Symmetric weights have the zero point of their version, whatever the configuration calls it.
#[test]
fn a_version_that_lies_is_seen_through() {
    let mut case = Repository::open("gptq");
    let honest = case.catalogue().unwrap();
    assert!(honest.notes.is_empty(), "{:?}", honest.notes);
    case.settings().insert("checkpoint_format".to_owned(), json!("gptq_v2"));
    let liar = case.catalogue().unwrap();
    assert_eq!(honest.weights, liar.weights);
    assert!(liar.notes.iter().all(|note| note.contains("stored as version 1")) && !liar.notes.is_empty());
}

#[test]
fn what_is_left_out_is_said() {
    let case = Repository::open("modelopt-fp8");
    let catalogue = case.catalogue().unwrap();
    assert!(
        catalogue.ignored.iter().any(|tensor| tensor.name.ends_with("input_scale") && tensor.reason.contains("float"))
    );
    assert!(catalogue.plain.iter().any(|name| name == "model.norm.weight"));
    let all = catalogue.plain.len()
        + catalogue.ignored.len()
        + catalogue.weights.iter().map(|weight| weight.parts.len()).sum::<usize>();
    assert_eq!(all, case.tensors.len());
    let case = Repository::open("gptq");
    let keys = case.catalogue().unwrap().keys;
    assert!(keys.used.contains(&"bits".to_owned()) && keys.without_effect.contains_key("damp_percent"), "{keys:?}");
}

fn error(case: &Repository) -> Error {
    match case.catalogue() {
        Err(error) => error,
        Ok(_) => panic!("{} was taken", case.name),
    }
}

/// A change to a case, and the code and a word of the error that it has to cause.
type Damage = (&'static str, fn(&mut Repository), Code, &'static str);

const Q: &str = "model.layers.0.self_attn.q_proj";

fn tensor<'a>(case: &'a mut Repository, part: &str) -> &'a mut Tensor {
    case.tensors.get_mut(&format!("{Q}.{part}")).unwrap()
}

fn remove(case: &mut Repository, part: &str) {
    case.tensors.remove(&format!("{Q}.{part}")).unwrap();
}

fn set(case: &mut Repository, key: &str, value: Value) {
    case.settings().insert(key.to_owned(), value);
}

/// Changes the scheme of the query projection.
fn scheme(case: &mut Repository, path: &[&str], value: Value) {
    let mut at = &mut case.settings()["config_groups"]["group_0"];
    for key in path {
        at = &mut at[*key];
    }
    *at = value;
}

fn flat(case: &mut Repository, part: &str) {
    let tensor = tensor(case, part);
    tensor.shape = vec![tensor.shape.iter().product()];
}

const MISSING: [Damage; 14] = [
    ("gptq", |c| remove(c, "scales"), Code::TensorMissing, "scales"),
    ("gptq", |c| remove(c, "qzeros"), Code::TensorMissing, "qzeros"),
    ("gptq", |c| remove(c, "qweight"), Code::TensorUnexpected, "g_idx"),
    ("gptq-actorder", |c| remove(c, "g_idx"), Code::TensorMissing, "g_idx"),
    ("awq", |c| remove(c, "scales"), Code::TensorMissing, "scales"),
    ("ct-pack", |c| remove(c, "weight_scale"), Code::TensorMissing, "weight_scale"),
    ("ct-pack", |c| remove(c, "weight_shape"), Code::TensorMissing, "weight_shape"),
    ("fp8", |c| remove(c, "weight_scale_inv"), Code::TensorUnexpected, "q_proj.weight"),
    ("modelopt-nvfp4", |c| remove(c, "weight_scale_2"), Code::TensorMissing, "weight_scale_2"),
    ("bnb-nf4", |c| remove(c, "weight.absmax"), Code::TensorMissing, "absmax"),
    ("bnb-nf4", |c| remove(c, "weight.quant_state.bitsandbytes__nf4"), Code::TensorUnexpected, "q_proj"),
    ("bnb-int8", |c| remove(c, "SCB"), Code::TensorUnexpected, "q_proj"),
    ("hqq", |c| remove(c, "zero"), Code::TensorMissing, "zero"),
    ("quanto", |c| remove(c, "weight._scale"), Code::TensorUnexpected, "_data"),
];

const SETTINGS: [Damage; 24] = [
    ("gptq", |c| set(c, "group_size", json!(32)), Code::TensorShape, "scales"),
    ("gptq", |c| set(c, "group_size", json!(0)), Code::QuantizationUnsupported, "group_size"),
    ("gptq", |c| set(c, "group_size", json!(i64::MIN)), Code::QuantizationUnsupported, "group_size"),
    ("gptq", |c| set(c, "bits", json!(5)), Code::QuantizationUnsupported, "bits"),
    ("gptq", |c| set(c, "bits", json!(8)), Code::TensorShape, "qweight"),
    ("gptq", |c| set(c, "bits", json!("four")), Code::QuantizationUnsupported, "bits"),
    ("gptq", |c| set(c, "checkpoint_format", json!("marlin")), Code::QuantizationUnsupported, "checkpoint_format"),
    ("gptq", |c| set(c, "new_rotation", json!(true)), Code::ConfigUnusedKey, "new_rotation"),
    ("gptq", |c| set(c, "dynamic", json!({"-:.*q_proj": {}})), Code::WeightsCorrupt, "q_proj"),
    ("gptq", |c| set(c, "dynamic", json!({"+:(": {}})), Code::ConfigInvalid, "quantization_config"),
    ("awq", |c| set(c, "group_size", json!(64)), Code::TensorShape, "scales"),
    ("awq", |c| set(c, "bits", json!(3)), Code::QuantizationUnsupported, "bits"),
    ("awq", |c| set(c, "version", json!("gemv")), Code::QuantizationUnsupported, "version"),
    ("ct-pack", |c| set(c, "ignore", json!(["re:.*q_proj"])), Code::WeightsCorrupt, "q_proj"),
    ("ct-pack", |c| scheme(c, &["format"], json!("sparse-24-bitmask")), Code::QuantizationUnsupported, "format"),
    ("ct-pack", |c| scheme(c, &["weights", "group_size"], json!(16)), Code::TensorShape, "weight_scale"),
    ("ct-pack", |c| scheme(c, &["weights", "group_size"], json!(-7)), Code::QuantizationUnsupported, "config_groups"),
    ("ct-pack", |c| scheme(c, &["weights", "num_bits"], json!(12)), Code::QuantizationUnsupported, "num_bits"),
    ("ct-pack", |c| scheme(c, &["weights", "symmetric"], json!(false)), Code::TensorMissing, "weight_zero_point"),
    ("fp8", |c| set(c, "weight_block_size", json!([64, 64])), Code::TensorShape, "weight_scale_inv"),
    ("fp8", |c| set(c, "weight_block_size", json!([0, -1])), Code::QuantizationUnsupported, "weight_block_size"),
    ("fp8", |c| set(c, "scale_fmt", json!("log")), Code::QuantizationUnsupported, "scale_fmt"),
    ("mxfp4", |c| set(c, "quant_method", json!("aqlm")), Code::QuantizationUnsupported, "quant_method"),
    ("mxfp4", |c| set(c, "quant_method", json!("fp8")), Code::TensorMissing, "quantization_config"),
];

const DATA: [Damage; 13] = [
    (
        "gptq-actorder",
        |c| tensor(c, "g_idx").bytes[..4].copy_from_slice(&99i32.to_le_bytes()),
        Code::WeightsCorrupt,
        "g_idx",
    ),
    (
        "gptq-actorder",
        |c| tensor(c, "g_idx").bytes[..4].copy_from_slice(&(-1i32).to_le_bytes()),
        Code::WeightsCorrupt,
        "g_idx",
    ),
    ("gptq", |c| tensor(c, "scales").dtype = StoredType::I16, Code::WeightsCorrupt, "scales"),
    ("gptq", |c| tensor(c, "qweight").dtype = StoredType::F32, Code::WeightsCorrupt, "qweight"),
    ("gptq", |c| flat(c, "qweight"), Code::TensorShape, "qweight"),
    ("ct-pack", |c| flat(c, "weight_packed"), Code::TensorShape, "weight_packed"),
    ("ct-pack", |c| tensor(c, "weight_shape").bytes[7] = 0x7f, Code::TensorShape, "weight_packed"),
    ("ct-pack", |c| tensor(c, "weight_shape").bytes[7] = 0xff, Code::WeightsCorrupt, "weight_shape"),
    ("ct-fp4", |c| flat(c, "weight_scale"), Code::TensorShape, "weight_scale"),
    (
        "bnb-nf4",
        |c| tensor(c, "weight.quant_state.bitsandbytes__nf4").bytes[0] = b'[',
        Code::WeightsCorrupt,
        "quant_state",
    ),
    ("bnb-int8", |c| flat(c, "weight"), Code::TensorShape, "weight"),
    ("hqq", |c| tensor(c, "group_size").bytes.fill(0), Code::WeightsCorrupt, "W_q"),
    ("hqq", |c| tensor(c, "shape").bytes.fill(0x7f), Code::WeightsCorrupt, "W_q"),
];

#[test]
fn damage_is_an_error() {
    for (name, damage, code, subject) in MISSING.into_iter().chain(SETTINGS).chain(DATA) {
        let mut case = Repository::open(name);
        assert!(case.catalogue().is_ok(), "{name} before the damage");
        damage(&mut case);
        let error = error(&case);
        assert!(
            error.code == code && error.subject.contains(subject),
            "{name}, expected {code:?} about {subject}: {error}"
        );
    }
}

/// Bytes that are not there when they are read are an error, not a panic.
#[test]
fn a_file_that_shrinks_is_an_error() {
    for mut case in Repository::all() {
        let catalogue = case.catalogue().unwrap();
        case.tensors.values_mut().for_each(|tensor| tensor.bytes.truncate(tensor.bytes.len() / 2));
        for weight in &catalogue.weights {
            assert!(decode_rows(weight, &case, 0..weight.rows()).is_err(), "{}: {}", case.name, weight.name);
        }
        let weight = &catalogue.weights[0];
        assert!(decode_rows(weight, &case, 0..weight.rows() + 1).is_err());
    }
}

#[test]
fn what_is_not_read_is_named() {
    for method in
        ["aqlm", "vptq", "quip", "spqr", "higgs", "eetq", "bitnet", "torchao", "sinq", "quark", "metal", "unheard_of"]
    {
        let mut case = Repository::open("gptq");
        set(&mut case, "quant_method", json!(method));
        let error = error(&case);
        assert!(error.code == Code::QuantizationUnsupported && error.found.contains(method), "{error}");
        assert!(error.expected.contains("compressed-tensors") && !error.help.is_empty(), "{error}");
    }
    let mut case = Repository::open("modelopt-awq");
    let scale = Tensor { dtype: StoredType::BF16, shape: vec![64], bytes: vec![0; 128] };
    case.tensors.insert(format!("{Q}.pre_quant_scale"), scale.clone());
    assert!(error(&case).found.contains("the layer's input"));
    let mut case = Repository::open("modelopt-nvfp4");
    case.tensors.insert("model.layers.0.self_attn.k_proj.k_scale".to_owned(), scale);
    let ignored = case.catalogue().unwrap().ignored;
    assert!(ignored.iter().any(|tensor| tensor.name.ends_with("k_scale") && tensor.reason.contains("cache")));
}

/// Whatever shapes, types and bytes a file has: an answer or an error.
#[test]
fn nothing_panics() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let (mut taken, mut refused) = (0, 0);
    for original in Repository::all() {
        let names: Vec<String> = original.tensors.keys().filter(|name| name.contains("layers.0.")).cloned().collect();
        for _ in 0..80 {
            let mut case = original.clone();
            let name = &names[random.random_range(0..names.len())];
            damage(case.tensors.get_mut(name).unwrap(), &mut random);
            match case.catalogue() {
                Ok(catalogue) => {
                    taken += 1;
                    for weight in
                        catalogue.weights.iter().filter(|weight| weight.parts.iter().any(|p| p.tensor.name == *name))
                    {
                        let last = weight.rows().saturating_sub(3)..weight.rows();
                        let _ = decode_rows(weight, &case, 0..weight.rows().min(3))
                            .and_then(|_| decode_rows(weight, &case, last));
                        let _ =
                            order(weight, &case).and_then(|order| affine_rows(weight, &case, 0..1, order.as_deref()));
                    }
                }
                Err(error) => {
                    refused += 1;
                    assert!(!error.subject.is_empty(), "{error}");
                    assert!(!error.found.is_empty() || !error.expected.is_empty(), "{error}");
                }
            }
        }
    }
    assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused");
}

fn damage(tensor: &mut Tensor, random: &mut ChaCha8Rng) {
    let sizes = [0, 1, 2, 3, 63, 65, 1 << 20, 1 << 40, usize::MAX / 2, usize::MAX];
    match random.random_range(0..4) {
        0 => tensor.dtype = StoredType::ALL[random.random_range(0..StoredType::ALL.len())],
        1 if !tensor.shape.is_empty() => {
            let axis = random.random_range(0..tensor.shape.len());
            tensor.shape[axis] = sizes[random.random_range(0..sizes.len())];
        }
        2 => tensor.shape.push(sizes[random.random_range(0..sizes.len())]),
        _ => tensor.bytes.iter_mut().for_each(|byte| *byte = random.random()),
    }
}
