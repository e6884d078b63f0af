//! Rotary position embedding in configurations: every spelling becomes one.
//!
//! transformers 4 wrote `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`, flat or by
//! layer type. Templates see the latter, as the name `rope`. Defaults of the parameters are those of
//! `transformers.modeling_rope_utils`.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use crate::spec::{Rope, RopeBeyond, RopeLayout, RopeScaling};

/// Keys of a configuration that the normaliser accounts for.
pub(super) const KEYS: [&str; 4] = ["rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"];

/// Keys whose defaults in a template hold for the parameters too.
pub(super) const DEFAULTS: [&str; 3] = ["rope_theta", "partial_rotary_factor", "original_max_position_embeddings"];

/// A configuration's `RoPE` parameters in the one form: an object with `rope_type` and `rope_theta`, or an object
/// of such objects by layer type. `None` if the configuration does not speak of `RoPE`.
pub(super) fn normalise(config: &Map<String, Value>, defaults: &Map<String, Value>) -> Option<Value> {
    let given = |key: &str| config.get(key).filter(|value| !value.is_null()).or_else(|| defaults.get(key));
    let theta = given("rope_theta");
    let partial = given("partial_rotary_factor");
    let base = given("rope_parameters").or_else(|| given("rope_scaling")).and_then(Value::as_object);
    if base.is_none() && theta.is_none() {
        return None;
    }
    let base = base.cloned().unwrap_or_default();
    let nested = !base.is_empty() && base.values().all(|value| value.is_object() || value.is_null());
    let complete = |mut parameters: Map<String, Value>| {
        let old_name = parameters.remove("type");
        let kind = parameters.entry("rope_type").or_insert_with(|| old_name.unwrap_or_else(|| "default".into()));
        // The first name of longrope, in Phi-3's first files.
        if kind == "su" {
            *kind = "longrope".into();
        }
        let scaled = matches!(kind.as_str(), Some("llama3" | "yarn" | "longrope"));
        for (key, value) in [("rope_theta", theta), ("partial_rotary_factor", partial)] {
            if let (Some(value), false) = (value, parameters.contains_key(key)) {
                parameters.insert(key.to_owned(), value.clone());
            }
        }
        // Of the original lengths, the one beside the parameters wins, as in transformers.
        let outer = given("original_max_position_embeddings").filter(|_| scaled && !nested);
        let inner = parameters.get("original_max_position_embeddings").filter(|value| !value.is_null());
        let fallback = given("max_position_embeddings").filter(|_| scaled);
        if let Some(original) = outer.or(inner).or(fallback).cloned() {
            parameters.insert("original_max_position_embeddings".to_owned(), original);
        }
        Value::Object(parameters)
    };
    if !nested {
        return Some(complete(base));
    }
    let by_type = base.into_iter().map(|(layer_type, value)| match value {
        Value::Object(parameters) => (layer_type, complete(parameters)),
        other => (layer_type, other),
    });
    Some(Value::Object(by_type.collect()))
}

/// The normalised parameters of one layer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    rope_type: String,
    rope_theta: f64,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    truncate: Option<bool>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
    /// Read by templates where it matters.
    #[serde(rename = "llama_4_scaling_beta")]
    _llama_4_scaling_beta: Option<f64>,
    /// Mistral repeats the context here; transformers reads the one outside.
    #[serde(rename = "max_position_embeddings")]
    _max_position_embeddings: Option<usize>,
    short_mscale: Option<f64>,
    long_mscale: Option<f64>,
}

/// The embedding that normalised parameters describe, for heads whose rotated part is `size` before
/// `partial_rotary_factor`.
pub(super) fn rope(layout: RopeLayout, size: usize, parameters: &Value, context: usize) -> Result<Rope> {
    let p: Parameters = serde_json::from_value(parameters.clone()).map_err(|e| {
        subject()
            .found(e)
            .help("pass --allow-unused-key rope_parameters.NAME for a parameter that means nothing to the rope_type")
    })?;
    check(&p)?;
    let whole = size;
    let size = match p.partial_rotary_factor.filter(|_| p.rope_type != "proportional") {
        Some(part) => truncated(size, part),
        None => size,
    };
    let (size, theta) = paired(size, &p)?;
    let original_context = p.original_max_position_embeddings.unwrap_or(context);
    let (scaling, attention_factor) = scaling(&p, (whole, size), context, original_context)?;
    let attention_factor = p.short_mscale.unwrap_or(attention_factor);
    if !attention_factor.is_finite() {
        return Err(subject().found(format!("an attention factor of {attention_factor}")).expected("a number"));
    }
    let beyond = p.long_mscale.filter(|_| p.long_mscale != p.short_mscale);
    let beyond = beyond.map(|attention_factor| RopeBeyond { length: original_context, attention_factor });
    Ok(Rope { layout, size, theta, scaling, attention_factor, reversed: false, beyond })
}

/// What would divide by zero, take the logarithm of nothing or turn backwards, by name.
fn check(p: &Parameters) -> Result<()> {
    let lists = [("short_factor", &p.short_factor), ("long_factor", &p.long_factor)];
    let listed = lists.iter().flat_map(|(name, list)| list.iter().flatten().map(|value| (*name, Some(*value))));
    let scalars = [
        ("rope_theta", Some(p.rope_theta)),
        ("factor", p.factor),
        ("low_freq_factor", p.low_freq_factor),
        ("high_freq_factor", p.high_freq_factor),
        ("attention_factor", p.attention_factor),
        ("short_mscale", p.short_mscale),
        ("long_mscale", p.long_mscale),
    ];
    // transformers reads a beta of zero as absent.
    let betas = [("beta_fast", p.beta_fast), ("beta_slow", p.beta_slow)].map(|(n, v)| (n, v.filter(|v| *v != 0.0)));
    for (name, value) in scalars.into_iter().chain(betas).chain(listed) {
        if let Some(odd) = value.filter(|value| !value.is_finite() || *value <= 0.0) {
            return Err(parameter(name).found(odd).expected("a number above 0"));
        }
    }
    if let Some(part) = p.partial_rotary_factor.filter(|part| !(0.0..=1.0).contains(part)) {
        return Err(parameter("partial_rotary_factor").found(part).expected("a share of the head, from 0 to 1"));
    }
    if p.original_max_position_embeddings == Some(0) {
        return Err(parameter("original_max_position_embeddings").found(0).expected("a length"));
    }
    if p.low_freq_factor.is_some() && p.low_freq_factor == p.high_freq_factor {
        return Err(parameter("high_freq_factor").found("the low_freq_factor").expected("another number"));
    }
    Ok(())
}

fn parameter(name: &str) -> Error {
    Error::new(Code::ConfigInvalid, format!("config.json: rope_parameters.{name}")).help("mend the key")
}

/// The scaling by its `rope_type`, and the multiplier of cosine and sine. `whole` is the head, `size` its rotated part.
fn scaling(
    p: &Parameters,
    (whole, size): (usize, usize),
    context: usize,
    original_context: usize,
) -> Result<(RopeScaling, f64)> {
    let required = |name: &str, value: Option<f64>| {
        value.ok_or_else(|| subject().found(format!("no {name} for rope_type {}", p.rope_type)))
    };
    let factor = || p.factor.unwrap_or_else(|| ratio(context, original_context));
    Ok(match p.rope_type.as_str() {
        "default" | "mrope" => (RopeScaling::Default, 1.0),
        "linear" => (RopeScaling::Linear { factor: required("factor", p.factor)? }, 1.0),
        "dynamic" => (RopeScaling::Dynamic { factor: required("factor", p.factor)?, original_context: context }, 1.0),
        "llama3" => {
            let scaling = RopeScaling::Llama3 {
                factor: required("factor", p.factor)?,
                low_freq_factor: required("low_freq_factor", p.low_freq_factor)?,
                high_freq_factor: required("high_freq_factor", p.high_freq_factor)?,
                original_context,
            };
            (scaling, 1.0)
        }
        "yarn" => {
            // transformers reads a beta of zero as absent.
            let beta = |value: Option<f64>, default| value.filter(|beta| *beta != 0.0).unwrap_or(default);
            let scaling = RopeScaling::Yarn {
                factor: factor(),
                beta_fast: beta(p.beta_fast, 32.0),
                beta_slow: beta(p.beta_slow, 1.0),
                truncate: p.truncate.unwrap_or(true),
                original_context,
            };
            let attention = || yarn_attention(factor(), p.mscale, p.mscale_all_dim);
            (scaling, p.attention_factor.unwrap_or_else(attention))
        }
        "proportional" => {
            // The whole head is seen as rotated; the part that turns is a share of its pairs.
            let pairs = truncated(whole, p.partial_rotary_factor.unwrap_or(1.0)) / 2;
            (RopeScaling::Proportional { factor: p.factor.unwrap_or(1.0), pairs }, 1.0)
        }
        "longrope" => {
            let scaling = RopeScaling::Longrope {
                short_factor: divisors("short_factor", p.short_factor.clone(), size / 2)?,
                long_factor: divisors("long_factor", p.long_factor.clone(), size / 2)?,
                original_context,
            };
            let attention = || longrope_attention(factor(), original_context);
            (scaling, p.attention_factor.unwrap_or_else(attention))
        }
        other => {
            return Err(subject()
                .found(format!("rope_type {other:?}"))
                .expected("default, linear, dynamic, llama3, yarn, longrope or proportional"));
        }
    })
}

/// The rotated size and the base. An odd size is rotated as the next even one by transformers, with the exponents of
/// the odd one: `theta^(-2i / n)` is `(theta^((n + 1) / n))^(-2i / (n + 1))`.
#[expect(clippy::cast_precision_loss, reason = "sizes are small")]
fn paired(size: usize, p: &Parameters) -> Result<(usize, f64)> {
    match (size, size % 2) {
        (2.., 0) => Ok((size, p.rope_theta)),
        (1.., 1) if ["default", "linear"].contains(&p.rope_type.as_str()) => {
            Ok((size + 1, p.rope_theta.powf((size + 1) as f64 / size as f64)))
        }
        _ => Err(subject().found(format!("{size} rotated elements")).expected("an even number from 2 up")),
    }
}

fn subject() -> Error {
    Error::new(Code::ConfigInvalid, "config.json: rope_parameters")
        .help("a template can give the parameters itself, under [rope], if the model rotates by a type that is known")
}

/// One list of longrope: a divisor for each pair.
fn divisors(name: &str, list: Option<Vec<f64>>, pairs: usize) -> Result<Vec<f64>> {
    let list = list.ok_or_else(|| subject().found(format!("no {name} for rope_type longrope")))?;
    if list.len() == pairs {
        return Ok(list);
    }
    Err(subject().found(format!("{} numbers in {name}", list.len())).expected(pairs))
}

/// `int(size * part)` of Python.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "small sizes")]
fn truncated(size: usize, part: f64) -> usize {
    (size as f64 * part.clamp(0.0, 1.0)) as usize
}

#[expect(clippy::cast_precision_loss, reason = "lengths are far below 2^52")]
fn ratio(context: usize, original: usize) -> f64 {
    context as f64 / original.max(1) as f64
}

/// `0.1 · mscale · ln(factor) + 1`, over the same for `mscale_all_dim` where both are given.
fn yarn_attention(factor: f64, mscale: Option<f64>, all_dim: Option<f64>) -> f64 {
    let get = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    match (mscale.filter(|m| *m != 0.0), all_dim.filter(|m| *m != 0.0)) {
        (Some(mscale), Some(all_dim)) => get(mscale) / get(all_dim),
        _ => get(1.0),
    }
}

/// `sqrt(1 + ln(factor) / ln(original))`
#[expect(clippy::cast_precision_loss, reason = "lengths are far below 2^52")]
fn longrope_attention(factor: f64, original: usize) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn normalised(config: &Value) -> Value {
        let defaults = json!({"rope_theta": 10000.0});
        let defaults = defaults.as_object().expect("an object");
        normalise(config.as_object().expect("an object"), defaults).expect("parameters")
    }

    #[test]
    fn both_spellings_become_one() {
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}});
        let new = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
        let expected = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5});
        assert_eq!(normalised(&old), expected);
        assert_eq!(normalised(&new), expected);
        assert_eq!(normalised(&json!({"rope_scaling": null})), json!({"rope_type": "default", "rope_theta": 10000.0}));
    }

    #[test]
    fn by_layer_type() {
        let config = json!({"rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_theta": 1e4},
        }, "max_position_embeddings": 64});
        let rope = normalised(&config);
        assert_eq!(rope["sliding_attention"], json!({"rope_theta": 1e4, "rope_type": "default"}));
        assert_eq!(rope["full_attention"]["original_max_position_embeddings"], json!(64));
    }

    #[test]
    fn unknown_types_and_parameters_are_errors() {
        let rope_of = |value: Value| rope(RopeLayout::Half, 16, &value, 128);
        let odd = rope_of(json!({"rope_type": "spiral", "rope_theta": 1e4})).expect_err("an unknown type");
        assert!(odd.to_string().contains("spiral"), "{odd}");
        let odd = rope_of(json!({"rope_type": "default", "rope_theta": 1e4, "twist": 3})).expect_err("a stray key");
        assert!(odd.to_string().contains("twist"), "{odd}");
        let odd =
            rope_of(json!({"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}));
        assert!(odd.expect_err("too few").to_string().contains("short_factor"));
    }

    #[test]
    fn attention_factors() {
        approx::assert_relative_eq!(yarn_attention(4.0, None, None), 0.1 * 4.0_f64.ln() + 1.0);
        approx::assert_relative_eq!(yarn_attention(4.0, Some(0.7), Some(0.7)), 1.0);
        approx::assert_relative_eq!(yarn_attention(0.5, None, None), 1.0);
    }
}
