//! Resolution: a template's tables, evaluated layer by layer, become the specification.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};
use toml::Value as Toml;

use super::check;
use super::expression::Scope;
use super::particular::{self, BranchTable, LaurelTable};
use super::rope;
use super::rules::TensorRules;
use super::tables::{odd, table};
use super::template::Template;
use crate::error::{Code, Error, Result};
use crate::spec::{
    Activation, Alibi, Attention, Differential, Embedding, FeedForward, Groups, Head, HeadTransform, Indexer, Layer,
    LayerNorms, Mixture, Mlp, ModelSpec, Modules, Moe, Norm, NormKind, NormSpan, OutputGate, PositionScale, Positions,
    Projection, QkNorm, Rope, RopeLayout, Routing, Score, SharedExpert,
};

/// `[model]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelTable {
    vocab_size: usize,
    hidden_size: usize,
    layers: usize,
    context_length: usize,
    /// What names in a checkpoint begin with, unless it was saved without its head.
    base_model_prefix: Option<String>,
}

/// `[norm]`: what norms have in common unless they say otherwise.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NormTable {
    kind: NormKind,
    eps: f64,
    #[serde(default = "yes")]
    weight: bool,
    #[serde(default)]
    bias: bool,
    #[serde(default)]
    offset: bool,
}

/// A norm where it stands: the name of its module, or that and what is particular to it.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum NormEntry {
    Name(String),
    Particular(ParticularNorm),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ParticularNorm {
    name: String,
    kind: Option<NormKind>,
    eps: Option<f64>,
    weight: Option<bool>,
    bias: Option<bool>,
    offset: Option<bool>,
}

impl NormTable {
    pub(super) fn at(&self, entry: &NormEntry) -> Norm {
        let norm = self.as_written(entry);
        // A table's offset is for those of its norms that have a weight.
        Norm { offset: norm.offset && norm.weight, ..norm }
    }

    fn as_written(&self, entry: &NormEntry) -> Norm {
        let common = |name: &str| Norm {
            name: name.to_owned(),
            kind: self.kind,
            eps: self.eps,
            weight: self.weight,
            bias: self.bias,
            offset: self.offset,
        };
        match entry {
            NormEntry::Name(name) => common(name),
            NormEntry::Particular(own) => Norm {
                name: own.name.clone(),
                kind: own.kind.unwrap_or(self.kind),
                eps: own.eps.unwrap_or(self.eps),
                weight: own.weight.unwrap_or(self.weight),
                bias: own.bias.unwrap_or(self.bias),
                offset: own.offset.unwrap_or(self.offset),
            },
        }
    }

    fn maybe(&self, entry: Option<&NormEntry>) -> Option<Norm> {
        entry.map(|entry| self.at(entry))
    }
}

/// `[layer]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the table")]
struct LayerTable {
    feed_forward: FeedForwardKind,
    norms: NormsTable,
    #[serde(default)]
    parallel: bool,
    residual_scale: Option<f64>,
    #[serde(default)]
    scalar: bool,
    #[serde(default)]
    normed_residual: bool,
    laurel: Option<LaurelTable>,
    branch: Option<BranchTable>,
    #[serde(default)]
    shortcut: bool,
    modules: Option<Modules>,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum FeedForwardKind {
    Dense,
    Moe,
}

/// `[layer.norms]`: norms by place.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NormsTable {
    attention_input: Option<NormEntry>,
    attention_output: Option<NormEntry>,
    attention_sum: Option<NormEntry>,
    feed_forward_input: Option<NormEntry>,
    feed_forward_output: Option<NormEntry>,
    feed_forward_sum: Option<NormEntry>,
    #[serde(rename = "final")]
    last: Option<NormEntry>,
}

/// `[embedding]`
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct EmbeddingTable {
    scale: Option<f64>,
    size: Option<usize>,
    positions: Option<Positions>,
    norm: Option<NormEntry>,
}

/// `[attention]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "independent choices")]
struct AttentionTable {
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    value_size: Option<usize>,
    bias: bool,
    query_bias: Option<bool>,
    key_bias: Option<bool>,
    value_bias: Option<bool>,
    output_bias: bool,
    scale: Option<f64>,
    window: Option<usize>,
    chunk: Option<usize>,
    softcap: Option<f64>,
    clip: Option<f64>,
    qk_norm: Option<QkNormTable>,
    value_norm: Option<NormEntry>,
    value_scale: Option<f64>,
    #[serde(default)]
    sinks: bool,
    alibi: Option<Alibi>,
    position_scale: Option<PositionScale>,
    output_gate: Option<OutputGate>,
    output_norm: Option<NormEntry>,
    latent: Option<LatentTable>,
    shares: Option<usize>,
    #[serde(default)]
    keys_as_values: bool,
    differential: Option<Differential>,
    mixture: Option<Mixture>,
    indexer: Option<Indexer>,
}

/// `[attention.qk_norm]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QkNormTable {
    query: NormEntry,
    key: NormEntry,
    #[serde(default = "head_span")]
    span: NormSpan,
    #[serde(default)]
    after_rope: bool,
}

/// `[attention.latent]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LatentTable {
    query_rank: Option<usize>,
    kv_rank: usize,
    rope_size: usize,
    norm_eps: f64,
    query_scale: Option<f64>,
    kv_scale: Option<f64>,
}

/// `[mlp]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MlpTable {
    intermediate_size: usize,
    activation: Activation,
    gated: bool,
    bias: bool,
    inner_norm: Option<NormEntry>,
    sparsity: Option<f64>,
}

/// `[rope]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RopeTable {
    layout: RopeLayout,
    size: usize,
    parameters: Value,
    #[serde(default = "yes")]
    enabled: bool,
    #[serde(default)]
    reversed: bool,
    /// These two are read before anything is evaluated.
    #[serde(rename = "partial")]
    _partial: Option<bool>,
    #[serde(rename = "by_type")]
    _by_type: Option<Vec<String>>,
}

/// `[moe]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "independent choices")]
struct MoeTable {
    experts: usize,
    top_k: usize,
    intermediate_size: usize,
    activation: Activation,
    #[serde(default = "yes")]
    gated: bool,
    #[serde(default)]
    bias: bool,
    #[serde(default)]
    weigh_input: bool,
    routing: RoutingTable,
    shared: Option<SharedTable>,
    dense: Option<MlpTable>,
    #[serde(default)]
    output_bias: bool,
}

/// `[moe.routing]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "independent choices")]
struct RoutingTable {
    score: Score,
    #[serde(default)]
    bias: bool,
    #[serde(default)]
    correction_bias: bool,
    groups: Option<Groups>,
    #[serde(default)]
    normalize: bool,
    #[serde(default = "one")]
    scale: f64,
    #[serde(default)]
    identity_experts: usize,
    norm: Option<NormEntry>,
    input_scale: Option<f64>,
    #[serde(default)]
    expert_scale: bool,
}

/// `[moe.shared]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SharedTable {
    name: String,
    intermediate_size: usize,
    activation: Activation,
    #[serde(default = "yes")]
    gated: bool,
    #[serde(default)]
    bias: bool,
    #[serde(default)]
    gate: bool,
}

/// `[head]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadTable {
    tied: bool,
    #[serde(default)]
    bias: bool,
    scale: Option<f64>,
    softcap: Option<f64>,
    transform: Option<HeadTransformTable>,
}

/// `[head.transform]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadTransformTable {
    activation: Activation,
    bias: bool,
    norm: NormEntry,
}

fn head_span() -> NormSpan {
    NormSpan::Head
}

fn yes() -> bool {
    true
}

fn one() -> f64 {
    1.0
}

/// More layers or larger sizes than any model has are a mistake, and would only fill the memory.
const MOST_LAYERS: usize = 4096;

/// The specification that a template gives a configuration, and its tensor rules.
pub(super) fn resolve(template: &Template, config: &Map<String, Value>) -> Result<(ModelSpec, TensorRules)> {
    let mut config = config.clone();
    if let Some(rope) = rope::normalise(&config, &rope_defaults(template), &reading(template)?)? {
        config.insert("rope".to_owned(), rope);
    }
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let scope = Scope::new(Arc::new(template.clone()), config);
    check_requirements(&scope)?;

    let model: ModelTable = table(&scope, "model")?;
    if model.context_length == 0 {
        return Err(odd(&scope, "model.context_length", "0", "a length"));
    }
    if model.layers > MOST_LAYERS {
        return Err(template.error(Code::SpecInvalid, "model.layers").found(model.layers).expected("at most 4096"));
    }
    if let Some(list) = scope.list("layer_types").filter(|length| *length < model.layers) {
        // Jinja calls what lies behind a list undefined, and undefined equals no layer's type.
        return Err(Error::new(Code::ConfigInvalid, "config.json: layer_types")
            .found(format!("{list} types"))
            .expected(format!("one for each of {} layers", model.layers))
            .help("mend the key"));
    }
    let norm: NormTable = table(&scope, "norm")?;
    if norm.eps < 0.0 {
        return Err(odd(&scope, "norm.eps", &norm.eps.to_string(), "a number that is not negative"));
    }
    let layers = (0..model.layers).map(|index| layer(&scope.at(index), &model)).collect::<Result<Vec<_>>>()?;
    // Norms by place may go by layer; the final one is the first layer's.
    let places: LayerTable = table(&scope.at(0), "layer")?;
    let embedding: EmbeddingTable = match template.table("embedding") {
        Some(_) => table(&scope, "embedding")?,
        None => EmbeddingTable::default(),
    };
    let spec = ModelSpec {
        model_type,
        template: template.name.clone(),
        vocab_size: model.vocab_size,
        hidden_size: model.hidden_size,
        context_length: model.context_length,
        embedding: Embedding {
            scale: embedding.scale,
            size: embedding.size.filter(|size| *size != model.hidden_size),
            positions: embedding.positions,
            norm: norm.maybe(embedding.norm.as_ref()),
        },
        layers,
        final_norm: norm.maybe(places.norms.last.as_ref()),
        head: head(table(&scope, "head")?, &norm),
        per_layer: particular::per_layer(&scope, &norm)?,
        altup: particular::altup(&scope, &norm)?,
    };
    check::numbers(&spec)?;
    check::sizes(&spec)?;
    let rules = TensorRules::new(&scope, spec.layers.len(), model.base_model_prefix)?;
    Ok((spec, rules))
}

/// How a template's class reads `RoPE` parameters; known before anything is evaluated.
fn reading(template: &Template) -> Result<rope::Reading> {
    let given = |key: &str| template.table("rope").and_then(|table| table.get(key)).cloned();
    let odd = |key: &str, expected: &str| {
        template.error(Code::TemplateInvalid, &format!("rope.{key}")).expected(expected).help("mend the template")
    };
    let types = |value: Toml| {
        value.try_into().map_err(|_| odd("by_type", "a list of the layer types that rope_scaling changes"))
    };
    let flag = |value: Toml| value.as_bool().ok_or_else(|| odd("partial", "true or false"));
    Ok(rope::Reading {
        by_type: given("by_type").map(types).transpose()?,
        partial: given("partial").map(flag).transpose()?.unwrap_or(false),
    })
}

/// The template's defaults of the keys that are part of the normalised `RoPE` parameters.
fn rope_defaults(template: &Template) -> Map<String, Value> {
    let defaults = template.table("defaults").into_iter().flatten();
    let number = |value: &Toml| value.as_float().map(Value::from).or_else(|| value.as_integer().map(Value::from));
    let of_rope = defaults.filter(|(key, _)| rope::DEFAULTS.contains(&key.as_str()));
    of_rope.filter_map(|(key, value)| Some((key.clone(), number(value)?))).collect()
}

fn layer(scope: &Scope, model: &ModelTable) -> Result<Layer> {
    let layer: LayerTable = table(scope, "layer")?;
    let norm: NormTable = table(scope, "norm")?;
    let feed_forward = match layer.feed_forward {
        FeedForwardKind::Dense => FeedForward::Dense(mlp(&table(scope, "mlp")?, &norm)),
        FeedForwardKind::Moe => FeedForward::Moe(Box::new(moe(table(scope, "moe")?, &norm))),
    };
    let branch = layer.branch.map(|own| Ok(Box::new(own.branch(&norm, moe(table(scope, "moe")?, &norm)))));
    let shortcut = layer.shortcut.then(|| Ok(Box::new(moe(table(scope, "moe")?, &norm))));
    let places = &layer.norms;
    Ok(Layer {
        attention: attention(scope, model, &norm)?,
        feed_forward,
        norms: LayerNorms {
            attention_input: norm.maybe(places.attention_input.as_ref()),
            attention_output: norm.maybe(places.attention_output.as_ref()),
            attention_sum: norm.maybe(places.attention_sum.as_ref()),
            feed_forward_input: norm.maybe(places.feed_forward_input.as_ref()),
            feed_forward_output: norm.maybe(places.feed_forward_output.as_ref()),
            feed_forward_sum: norm.maybe(places.feed_forward_sum.as_ref()),
        },
        parallel: layer.parallel,
        residual_scale: layer.residual_scale,
        scalar: layer.scalar,
        normed_residual: layer.normed_residual,
        laurel: layer.laurel.map(|own| own.laurel(&norm)),
        branch: branch.transpose()?,
        shortcut: shortcut.transpose()?,
        modules: layer.modules,
    })
}

fn attention(scope: &Scope, model: &ModelTable, norm: &NormTable) -> Result<Attention> {
    let t: AttentionTable = table(scope, "attention")?;
    let rope: Option<RopeTable> = match scope.template().table("rope") {
        Some(_) => Some(table(scope, "rope")?),
        None => None,
    };
    let rope = rope.filter(|rope| rope.enabled);
    let resolved = |r: RopeTable| {
        let around =
            rope::Surroundings { head: r.size, context: model.context_length, spelled: rope::spelled(scope.config()) };
        let rope = rope::rope(r.layout, &r.parameters, around)?;
        Ok::<_, Error>(Rope { reversed: r.reversed, ..rope })
    };
    let rope = rope.map(resolved).transpose()?;
    let projection = projection(&t);
    #[expect(clippy::cast_precision_loss, reason = "head sizes are small")]
    let scale = t.scale.unwrap_or_else(|| (t.head_size as f64).powf(-0.5));
    Ok(Attention {
        heads: t.heads,
        kv_heads: t.kv_heads,
        key_size: t.head_size,
        value_size: t.value_size.unwrap_or(t.head_size),
        projection,
        output_bias: t.output_bias,
        scale,
        window: t.window,
        chunk: t.chunk,
        rope,
        softcap: t.softcap,
        clip: t.clip,
        qk_norm: t.qk_norm.map(|own| QkNorm {
            query: norm.at(&own.query),
            key: norm.at(&own.key),
            span: own.span,
            after_rope: own.after_rope,
        }),
        value_norm: norm.maybe(t.value_norm.as_ref()),
        value_scale: t.value_scale,
        sinks: t.sinks,
        alibi: t.alibi,
        position_scale: t.position_scale,
        output_gate: t.output_gate,
        output_norm: norm.maybe(t.output_norm.as_ref()),
        shares: t.shares,
        keys_as_values: t.keys_as_values,
        differential: t.differential,
        mixture: t.mixture,
        indexer: t.indexer,
    })
}

fn head(t: HeadTable, norm: &NormTable) -> Head {
    let transform =
        t.transform.map(|own| HeadTransform { activation: own.activation, bias: own.bias, norm: norm.at(&own.norm) });
    Head { tied: t.tied, bias: t.bias, scale: t.scale, softcap: t.softcap, transform }
}

fn projection(t: &AttentionTable) -> Projection {
    match &t.latent {
        None => Projection::Separate {
            query_bias: t.query_bias.unwrap_or(t.bias),
            key_bias: t.key_bias.unwrap_or(t.bias),
            value_bias: t.value_bias.unwrap_or(t.bias),
        },
        Some(latent) => Projection::Latent {
            query_rank: latent.query_rank,
            kv_rank: latent.kv_rank,
            rope_size: latent.rope_size,
            bias: t.bias,
            norm_eps: latent.norm_eps,
            query_scale: latent.query_scale,
            kv_scale: latent.kv_scale,
        },
    }
}

fn mlp(t: &MlpTable, norm: &NormTable) -> Mlp {
    Mlp {
        intermediate_size: t.intermediate_size,
        activation: t.activation,
        gated: t.gated,
        bias: t.bias,
        inner_norm: norm.maybe(t.inner_norm.as_ref()),
        sparsity: t.sparsity.filter(|share| *share > 0.0),
    }
}

fn moe(t: MoeTable, norm: &NormTable) -> Moe {
    let plain = |intermediate_size, activation, gated, bias| {
        mlp(&MlpTable { intermediate_size, activation, gated, bias, inner_norm: None, sparsity: None }, norm)
    };
    Moe {
        experts: t.experts,
        top_k: t.top_k,
        expert: plain(t.intermediate_size, t.activation, t.gated, t.bias),
        routing: Routing {
            score: t.routing.score,
            bias: t.routing.bias,
            correction_bias: t.routing.correction_bias,
            groups: t.routing.groups,
            normalize: t.routing.normalize,
            scale: t.routing.scale,
            identity_experts: t.routing.identity_experts,
            norm: norm.maybe(t.routing.norm.as_ref()),
            input_scale: t.routing.input_scale,
            expert_scale: t.routing.expert_scale,
        },
        weigh_input: t.weigh_input,
        shared: t.shared.map(|shared| SharedExpert {
            mlp: plain(shared.intermediate_size, shared.activation, shared.gated, shared.bias),
            name: shared.name,
            gate: shared.gate,
        }),
        dense: t.dense.map(|dense| mlp(&dense, norm)),
        output_bias: t.output_bias,
    }
}

/// Every expression in `[require]` must hold; its key says what is wrong when it does not.
fn check_requirements(scope: &Scope) -> Result<()> {
    let template = scope.template();
    for (reason, expression) in template.table("require").into_iter().flatten() {
        let value = scope.evaluate("require", expression)?;
        if !matches!(value, Value::Bool(true)) {
            return Err(Error::new(Code::ConfigUnsupported, format!("config.json with template {}", template.name))
                .found(reason)
                .expected(expression.as_str().unwrap_or_default().trim_start_matches('='))
                .help("write a template that extends this one, if the setting does not matter to you"));
        }
    }
    Ok(())
}
