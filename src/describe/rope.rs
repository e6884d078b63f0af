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

/// The name under which parameters are checked.
const KEY: &str = "rope_parameters";

/// Keys whose defaults in a template hold for the parameters too.
pub(super) const DEFAULTS: [&str; 3] = ["rope_theta", "partial_rotary_factor", "original_max_position_embeddings"];

/// How a template's class reads `RoPE` parameters, as `[rope]` says it.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// Parameters stand by layer type, and `rope_scaling` changes those of these types; of a class with none of them it
    /// changes nothing.
    pub(super) by_type: Option<Vec<String>>,
    /// The class rotates a part of each head if `partial_rotary_factor` says so.
    pub(super) partial: bool,
}

/// A configuration's `RoPE` parameters in the one form: an object with `rope_type` and `rope_theta`, or an object
/// of such objects by layer type. `None` if the configuration does not speak of `RoPE`.
///
/// Where two keys say the same, the one holds that transformers takes: `rope_scaling` before `rope_parameters`, and what
/// stands within the parameters before what stands beside them, but for `original_max_position_embeddings`.
pub(super) fn normalise(
    config: &Map<String, Value>,
    defaults: &Map<String, Value>,
    reading: &Reading,
) -> Result<Option<Value>> {
    let by_type = reading.by_type.as_deref();
    let beside = Beside::new(config, defaults)?;
    let scaling = object(config, "rope_scaling")?;
    let parameters = object(config, "rope_parameters")?;
    if scaling.is_none() && parameters.is_none() && beside.theta.is_none() {
        return Ok(None);
    }
    check_form(scaling, parameters, by_type)?;
    if !reading.partial {
        check_whole_heads(config, scaling, parameters)?;
    }
    let Some(typed) = parameters.filter(|own| is_by_type(own)) else {
        return Ok(Some(beside.complete(scaling.or(parameters).cloned().unwrap_or_default(), false)));
    };
    let mut types = typed.clone();
    if by_type.is_some() {
        for name in ["full_attention", "sliding_attention"] {
            types.entry(name).or_insert(Value::Null);
        }
    }
    let types = types.into_iter().map(|(layer_type, value)| {
        let mut own = value.as_object().cloned().unwrap_or_default();
        if let Some(scaling) = scaling.filter(|_| by_type.is_some_and(|changed| changed.contains(&layer_type))) {
            own.extend(scaling.clone());
        }
        (layer_type, beside.complete(own, true))
    });
    Ok(Some(Value::Object(types.collect())))
}

/// What stands beside a configuration's parameters, or a template gives by default.
struct Beside {
    theta: Option<Value>,
    partial: Option<Value>,
    original_context: Option<Value>,
    context: Option<Value>,
}

impl Beside {
    fn new(config: &Map<String, Value>, defaults: &Map<String, Value>) -> Result<Self> {
        let given = |key: &str| config.get(key).filter(|value| !value.is_null()).or_else(|| defaults.get(key)).cloned();
        let number = |key: &str| Ok::<_, Error>(number(config, key)?.or_else(|| defaults.get(key)).cloned());
        // Of this key null is no default: transformers then rotates whole heads.
        let whole_heads = config.get("partial_rotary_factor").is_some_and(Value::is_null);
        Ok(Self {
            theta: number("rope_theta")?,
            partial: if whole_heads { Some(1.0.into()) } else { number("partial_rotary_factor")? },
            original_context: given("original_max_position_embeddings"),
            context: given("max_position_embeddings"),
        })
    }

    /// One set of parameters with all that it has from elsewhere.
    fn complete(&self, mut parameters: Map<String, Value>, nested: bool) -> Value {
        let old_name = parameters.remove("type");
        let kind = parameters.entry("rope_type").or_insert_with(|| old_name.unwrap_or_else(|| "default".into()));
        // The first name of longrope, in Phi-3's first files.
        if kind == "su" {
            *kind = "longrope".into();
        }
        let scaled = matches!(kind.as_str(), Some("llama3" | "yarn" | "longrope"));
        for (key, value) in [("rope_theta", &self.theta), ("partial_rotary_factor", &self.partial)] {
            let own = parameters.get(key).is_some_and(|own| !own.is_null());
            if let (Some(value), false) = (value, own) {
                parameters.insert(key.to_owned(), value.clone());
            }
        }
        // transformers reads `truncate` beside the layer types only, and null as false.
        if nested {
            parameters.remove("truncate");
        } else if parameters.get("truncate").is_some_and(Value::is_null) {
            parameters.insert("truncate".to_owned(), false.into());
        }
        // Of the original lengths, the one beside the parameters wins, as in transformers.
        let outer = self.original_context.as_ref().filter(|_| scaled && !nested);
        let inner = parameters.get("original_max_position_embeddings").filter(|value| !value.is_null());
        let fallback = self.context.as_ref().filter(|_| scaled);
        if let Some(original) = outer.or(inner).or(fallback).cloned() {
            parameters.insert("original_max_position_embeddings".to_owned(), original);
        }
        Value::Object(parameters)
    }
}

/// Settings in a form that the class does not read, or that contradict each other.
fn check_form(
    scaling: Option<&Map<String, Value>>,
    parameters: Option<&Map<String, Value>>,
    by_type: Option<&[String]>,
) -> Result<()> {
    let typed = parameters.is_some_and(is_by_type);
    match (scaling, parameters, by_type) {
        (_, Some(_), Some(_)) if !typed => Err(Error::new(Code::ConfigUnsupported, "config.json: rope_parameters")
            .found("one set of parameters for all layers")
            .expected("a set for each layer type, full_attention and sliding_attention")
            .help("write the parameters by layer type; transformers does not read these for this model_type")),
        (Some(scaling), _, Some(_)) if scaling.contains_key("type") && !scaling.contains_key("rope_type") => {
            Err(Error::new(Code::ConfigUnsupported, "config.json: rope_scaling.type")
                .found("the old name of rope_type, which transformers does not read for this model_type")
                .expected("rope_type")
                .help("rename the key, if the model is to be scaled so, or remove rope_scaling"))
        }
        (Some(_), _, Some([])) => Err(Error::new(Code::ConfigUnsupported, "config.json: rope_scaling")
            .found("a setting that transformers does not read for this model_type")
            .expected("rope_parameters by layer type")
            .help("write it into rope_parameters, or remove the key")),
        (Some(_), Some(_), None) if typed => {
            Err(Error::new(Code::ConfigInvalid, "config.json: rope_scaling and rope_parameters")
                .found("two settings of one thing, the second by layer type")
                .expected("one of them")
                .help("keep the one that the model was trained with"))
        }
        _ => Ok(()),
    }
}

/// A share of each head, where the class rotates whole ones and does not look at the key.
fn check_whole_heads(
    config: &Map<String, Value>,
    scaling: Option<&Map<String, Value>>,
    parameters: Option<&Map<String, Value>>,
) -> Result<()> {
    let given = [scaling, parameters].into_iter().flatten();
    let by_type = given.clone().flat_map(|own| own.values().filter_map(Value::as_object));
    let sets = given.chain(by_type).filter(|own| own.get("rope_type").is_none_or(|kind| kind != "proportional"));
    let share = |own: &Map<String, Value>| own.get("partial_rotary_factor").cloned();
    let shares = sets.filter_map(share).chain(config.get("partial_rotary_factor").cloned());
    match shares.into_iter().find(|share| !share.is_null() && share.as_f64() != Some(1.0)) {
        None => Ok(()),
        Some(share) => Err(Error::new(Code::ConfigUnsupported, "config.json: partial_rotary_factor")
            .found(share)
            .expected("1, or no such key: models of this model_type rotate whole heads")
            .help("remove the key, which transformers does not read either; a template of a class that does says `partial = true` under [rope]")),
    }
}

/// The key that holds what is followed, for errors to name.
pub(super) fn spelled(config: &Map<String, Value>) -> &'static str {
    if matches!(object(config, "rope_scaling"), Ok(Some(_))) { "rope_scaling" } else { KEY }
}

/// Why `rope_parameters` are not followed, if they are not.
pub(super) fn passed_over(config: &Map<String, Value>) -> Option<String> {
    let own = |key: &str| object(config, key).ok().flatten();
    let (scaling, parameters) = (own("rope_scaling")?, own(KEY)?);
    (!is_by_type(parameters) && parameters != scaling)
        .then(|| "rope_scaling stands beside it and says another thing; transformers takes that one".to_owned())
}

/// True of parameters by layer type.
fn is_by_type(parameters: &Map<String, Value>) -> bool {
    !parameters.is_empty()
        && parameters.values().all(|value| value.is_object() || value.is_null())
        && parameters.keys().any(|key| key.ends_with("_attention"))
}

/// An object of settings; nothing if it is absent, null or empty.
fn object<'c>(config: &'c Map<String, Value>, key: &str) -> Result<Option<&'c Map<String, Value>>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(own)) => Ok(Some(own).filter(|own| !own.is_empty())),
        Some(other) => Err(Error::new(Code::ConfigInvalid, format!("config.json: {key}"))
            .found(other)
            .expected("an object, as in {\"rope_type\": \"linear\", \"factor\": 2.0}, or null for the default rotation")
            .help("mend the key")),
    }
}

/// A number beside the parameters; nothing if it is absent or null.
fn number<'c>(config: &'c Map<String, Value>, key: &str) -> Result<Option<&'c Value>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(own @ Value::Number(_)) => Ok(Some(own)),
        Some(other) => Err(Error::new(Code::ConfigInvalid, format!("config.json: {key}"))
            .found(other)
            .expected("a number")
            .help("mend the key")),
    }
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

/// What else decides about a rotation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Surroundings {
    /// Size of the head, before `partial_rotary_factor`.
    pub(super) head: usize,
    /// Longest sequence.
    pub(super) context: usize,
    /// The key of config.json that holds the parameters.
    pub(super) spelled: &'static str,
}

/// The embedding that normalised parameters describe.
pub(super) fn rope(layout: RopeLayout, parameters: &Value, around: Surroundings) -> Result<Rope> {
    parsed(layout, parameters, around).map_err(|mut error| {
        // Parameters are checked under one name, and named as the user wrote them.
        error.subject = error.subject.replace(KEY, around.spelled);
        error.help = error.help.replace(KEY, around.spelled);
        error
    })
}

fn parsed(layout: RopeLayout, parameters: &Value, around: Surroundings) -> Result<Rope> {
    let Surroundings { head, context, .. } = around;
    if parameters.as_object().is_some_and(is_by_type) {
        return Err(subject()
            .found("parameters by layer type")
            .expected("one set of parameters for all layers, which is what this model_type reads")
            .help("give the parameters that all layers have"));
    }
    let p: Parameters = serde_json::from_value(parameters.clone()).map_err(|e| {
        subject()
            .found(e)
            .help(format!("pass --allow-unused-key {KEY}.NAME for a parameter that means nothing to the rope_type"))
    })?;
    check(&p)?;
    let share = p.partial_rotary_factor.filter(|_| p.rope_type != "proportional");
    let size = share.map_or(head, |share| truncated(head, share));
    let (size, theta) = paired(size, &p)?;
    let original_context = p.original_max_position_embeddings.unwrap_or(context);
    let (scaling, attention_factor) = scaling(&p, (head, size), context, original_context)?;
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
    Error::new(Code::ConfigInvalid, format!("config.json: {KEY}.{name}")).help("mend the key")
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
    Error::new(Code::ConfigInvalid, format!("config.json: {KEY}"))
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
        normalise(config.as_object().expect("an object"), defaults, &Reading::default())
            .expect("valid")
            .expect("parameters")
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
        let around = Surroundings { head: 16, context: 128, spelled: "rope_scaling" };
        let rope_of = |value: Value| rope(RopeLayout::Half, &value, around);
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
