//! The tables of an architecture that no template is near to: its sizes from the configuration, its structure from
//! the tensors.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::keys;
use super::patterns::Pattern;
use super::roles::{Role, Sizes, role};
use super::sheet::Sheet;

const ACTIVATIONS: &[&str] =
    &["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "relu", "relu2"];

/// What is known of the repository.
pub(super) struct Known<'k> {
    pub(super) config: &'k Map<String, Value>,
    pub(super) sizes: Sizes,
    /// Each pattern with its role, where one was found.
    pub(super) roles: Vec<(&'k Pattern, Option<Role>)>,
}

impl<'k> Known<'k> {
    pub(super) fn new(config: &'k Map<String, Value>, patterns: &'k [Pattern]) -> Self {
        let mut sizes = Sizes {
            hidden: keys::size(config, "hidden_size").unwrap_or(0),
            vocab: keys::size(config, "vocab_size").unwrap_or(0),
            experts: keys::size(config, "num_experts").unwrap_or(0),
        };
        let counted = patterns.iter().map(|pattern| pattern.experts).max().unwrap_or(0);
        sizes.experts = sizes.experts.max(counted);
        let roles = patterns.iter().map(|pattern| (pattern, role(pattern, patterns, &sizes))).collect();
        Self { config, sizes, roles }
    }

    fn of(&self, parameter: &str) -> Option<&'k Pattern> {
        let found = self.roles.iter().find(|(_, role)| role.as_ref().is_some_and(|role| role.parameter == parameter));
        found.map(|(pattern, _)| *pattern)
    }

    fn has(&self, end: &str) -> bool {
        self.roles.iter().any(|(_, role)| role.as_ref().is_some_and(|role| role.parameter.ends_with(end)))
    }

    /// The pattern of a projection of the MLP, where it is one of `place` (`mlp.`, `mlp.experts.`, `mlp.shared.`).
    fn mlp(&self, place: &str, names: &[&str]) -> Option<&'k Pattern> {
        names.iter().find_map(|name| self.of(&format!("model.layers.{{layer}}.mlp.{place}{name}_proj.weight")))
    }

    /// Rows of an up projection, or columns of a down projection.
    fn width(&self, place: &str) -> Option<usize> {
        let down = self.mlp(place, &["down"]).and_then(|pattern| pattern.shape.last());
        down.or_else(|| self.mlp(place, &["up"])?.shape.iter().rev().nth(1)).copied()
    }

    fn gated(&self, place: &str) -> bool {
        self.mlp(place, &["gate", "{gate,up}"]).is_some()
    }

    /// A size as an expression over the key that holds it, else as a number.
    fn sized(&self, size: usize, usual: &str, words: &[&str]) -> String {
        let named = keys::find(self.config, usual).filter(|(_, value)| value.as_u64() == u64::try_from(size).ok());
        let key = named.map(|(key, _)| key).or_else(|| keys::by_value(self.config, size, words));
        key.map_or_else(|| size.to_string(), |key| format!("\"={key}\""))
    }
}

/// Fills a sheet that extends `llama`.
pub(super) fn fill(sheet: &mut Sheet, known: &Known<'_>) {
    renamed(sheet, known.config);
    norms(sheet, known);
    attention(sheet, known);
    rope(sheet, known.config);
    mlp(sheet, known);
    if known.has("mlp.gate.weight") || known.has("experts.down_proj.weight") {
        moe(sheet, known);
        schedule(sheet, known);
    }
    let tied = !known.has("lm_head.weight");
    let why = if tied { "no tensor looks like a head" } else { "there is a head" };
    sheet.guess("head", "tied", &tied.to_string(), why);
    if known.has("lm_head.bias") {
        sheet.guess("head", "bias", "true", "there is a bias for it");
    }
    tensors(sheet, known.roles.iter().map(|(pattern, role)| (*pattern, role.as_ref())));
}

/// Keys that the expressions of known templates call by another name.
pub(super) fn renamed(sheet: &mut Sheet, config: &Map<String, Value>) {
    // These are read by the normaliser of rotary parameters or by lines of their own.
    let elsewhere =
        ["rope_theta", "partial_rotary_factor", "num_experts", "num_experts_per_tok", "moe_intermediate_size"];
    for (usual, key) in keys::renamed(config).into_iter().filter(|(usual, _)| !elsewhere.contains(usual)) {
        sheet.guess("let", usual, &format!("\"={key}\""), "another name for it");
    }
    for usual in ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"] {
        if keys::find(config, usual).is_none() {
            sheet.ask(
                "let",
                &format!("no key of config.json looks like {usual}: write {usual} = \"=its_key\" or a number"),
            );
        }
    }
    if keys::find(config, "max_position_embeddings").is_none() {
        sheet.todo("model", "context_length", "2048", "no key of config.json looks like the longest sequence");
    }
}

fn norms(sheet: &mut Sheet, known: &Known<'_>) {
    let biased = known.has("norm.bias");
    if biased {
        sheet.todo("norm", "kind", "\"rms\"", "the norms have biases, so this is probably LayerNorm");
    } else {
        sheet.guess("norm", "kind", "\"rms\"", "the norms have no biases");
    }
    if keys::find(known.config, "rms_norm_eps").is_none() {
        sheet.todo("norm", "eps", "1e-6", "no key of config.json looks like the norms' eps");
    }
    for place in ["input_layernorm", "post_attention_layernorm"] {
        if !known.has(&format!("{place}.weight")) {
            sheet.ask("layer", &format!("no tensor looks like {place}: are there norms at other places?"));
        }
    }
}

fn attention(sheet: &mut Sheet, known: &Known<'_>) {
    let biases = known.has("{q,k,v}_proj.bias") || known.has("q_proj.bias");
    sheet.guess("attention", "bias", &biases.to_string(), "from the tensors of the projections");
    let output = known.has("o_proj.bias");
    sheet.guess("attention", "output_bias", &output.to_string(), "from the tensors of the output projection");
    let Some(heads) = keys::size(known.config, "num_attention_heads").filter(|heads| *heads > 0) else { return };
    let Some(inner) = known.of("model.layers.{layer}.self_attn.o_proj.weight").and_then(|p| p.shape.last()) else {
        return sheet.ask("attention", "no tensor looks like the output projection");
    };
    let head = inner / heads;
    if keys::find(known.config, "head_dim").is_none() && head * heads == *inner && *inner != known.sizes.hidden {
        sheet.guess("let", "head_dim", &head.to_string(), "columns of the output projection, by head");
    }
    // q and k and v in one: what is not queries is keys and values.
    let fused = known.of("model.layers.{layer}.self_attn.{q,k,v}_proj.weight").and_then(|p| p.shape.first());
    if let (Some(rows), None) = (fused, keys::find(known.config, "num_key_value_heads")) {
        let kv = rows.saturating_sub(*inner) / (2 * head).max(1);
        if kv != heads && kv > 0 {
            sheet.guess("let", "num_key_value_heads", &kv.to_string(), "rows of the fused projection");
        }
    }
}

fn rope(sheet: &mut Sheet, config: &Map<String, Value>) {
    let what =
        "\"half\" pairs (rotate_half in the modeling file), or \"interleaved\" ones ([..., 0::2] and [..., 1::2])?";
    sheet.todo("rope", "layout", "\"half\"", what);
    if ["rope_parameters", "rope_scaling", "rope_theta"].iter().any(|key| config.contains_key(*key)) {
        return;
    }
    let theta = keys::find(config, "rope_theta").map_or("10000.0".to_owned(), |(key, _)| format!("\"={key}\""));
    let part = keys::find(config, "partial_rotary_factor");
    let part = part.map_or_else(String::new, |(key, _)| format!(", partial_rotary_factor = \"={key}\""));
    let value = format!("{{ rope_type = \"default\", rope_theta = {theta}{part} }}");
    let known = keys::find(config, "rope_theta").is_some();
    let why = if known {
        "keys that look like them"
    } else {
        "TODO: no key of config.json looks like the base: are there rotary positions?"
    };
    sheet.guess("rope", "parameters", &value, why);
}

/// The activation, as an expression or a stand-in.
fn activation(sheet: &mut Sheet, table: &'static str, config: &Map<String, Value>) {
    match keys::find(config, "hidden_act") {
        Some((_, Value::String(name))) if ACTIVATIONS.contains(&name.as_str()) => {
            sheet.guess(table, "activation", "\"=hidden_act\"", "the configuration names it");
        }
        _ => sheet.todo(table, "activation", "\"silu\"", "silu, gelu, gelu_pytorch_tanh, relu or relu2?"),
    }
}

fn mlp(sheet: &mut Sheet, known: &Known<'_>) {
    let Some(width) = known.width("") else { return };
    let size = known.sized(width, "intermediate_size", &["ffn", "ff", "mlp", "inter", "inner", "width"]);
    sheet.guess("mlp", "intermediate_size", &size, "columns of the down projection");
    activation(sheet, "mlp", known.config);
    sheet.guess("mlp", "gated", &known.gated("").to_string(), "from the tensors: is there a gate beside up?");
    let bias = known.has("mlp.down_proj.bias");
    sheet.guess("mlp", "bias", &bias.to_string(), "from the tensors");
}

fn moe(sheet: &mut Sheet, known: &Known<'_>) {
    let experts = known.sized(known.sizes.experts, "num_experts", &["expert"]);
    sheet.guess("moe", "experts", &experts, "counted in the tensors");
    match keys::find(known.config, "num_experts_per_tok") {
        Some((key, _)) => sheet.guess("moe", "top_k", &format!("\"={key}\""), "the key's name"),
        None => sheet.todo("moe", "top_k", "2", "how many experts see a token?"),
    }
    let words = ["expert", "moe", "ffn", "inter"];
    let width = |place: &str| known.width(place).map(|width| known.sized(width, "moe_intermediate_size", &words));
    if let Some(width) = width("experts.") {
        sheet.guess("moe", "intermediate_size", &width, "columns of an expert's down projection");
    }
    activation(sheet, "moe", known.config);
    sheet.guess("moe", "gated", &known.gated("experts.").to_string(), "from the experts' tensors");
    let bias = if known.has("e_score_correction_bias") { ", correction_bias = true" } else { "" };
    let what = "softmax or sigmoid of the router's logits? are the chosen weights divided by their sum?";
    sheet.todo("moe", "routing", &format!("{{ score = \"softmax\", normalize = true{bias} }}"), what);
    if let Some(width) = width("shared.") {
        let gated = known.gated("shared.");
        let gate = known.has("shared_gate.weight");
        let act = keys::find(known.config, "hidden_act").map_or("silu", |_| "=hidden_act");
        let value = format!(
            "{{ name = \"shared\", intermediate_size = {width}, activation = \"{act}\", gated = {gated}, gate = {gate} }}"
        );
        sheet.guess(
            "moe",
            "shared",
            &value,
            "TODO: from the tensors; its activation as above; does every token see it?",
        );
    }
}

/// Which layers are mixtures.
fn schedule(sheet: &mut Sheet, known: &Known<'_>) {
    let layers = keys::size(known.config, "num_hidden_layers").unwrap_or(0);
    let routed: BTreeSet<usize> = known
        .roles
        .iter()
        .filter(|(_, role)| role.as_ref().is_some_and(|role| role.parameter.ends_with("mlp.gate.weight")))
        .flat_map(|(pattern, _)| pattern.layers.iter().copied().filter(|layer| *layer < layers))
        .collect();
    let is = |rule: &dyn Fn(usize) -> bool| (0..layers).all(|layer| routed.contains(&layer) == rule(layer));
    let first = routed.first().copied().unwrap_or(0);
    let cycle = (2..=8).find_map(|n| (0..n).find(|r| is(&|layer| layer % n == *r)).map(|r| (n, r)));
    let value = if is(&|_| true) {
        "\"moe\"".to_owned()
    } else if let Some((n, r)) = cycle.filter(|(n, _)| layers > *n) {
        format!("\"='moe' if layer % {n} == {r} else 'dense'\"")
    } else if is(&|layer| layer >= first) {
        let key = keys::by_value(known.config, first, &["dense", "first", "moe"]);
        format!("\"='dense' if layer < {} else 'moe'\"", key.map_or_else(|| first.to_string(), str::to_owned))
    } else {
        format!("\"='moe' if layer in {routed:?} else 'dense'\"").replace('{', "[").replace('}', "]")
    };
    sheet.guess("layer", "feed_forward", &value, "layers with a router; is there a key that says so?");
}

/// `[tensors]` for the roles that were found, and what to ask for the others.
pub(super) fn tensors<'t>(sheet: &mut Sheet, roles: impl Iterator<Item = (&'t Pattern, Option<&'t Role>)>) {
    let mut unknown = Vec::new();
    let mut taken: BTreeSet<String> = BTreeSet::new();
    for (pattern, role) in roles {
        match role {
            Some(role) if taken.insert(role.parameter.clone()) => {
                // A parameter of its own name needs no rule.
                if role.rule != toml::Value::String(role.parameter.clone()).to_string() {
                    sheet.guess("tensors", &role.parameter, &role.rule, &role.why);
                }
            }
            _ => unknown.push(pattern),
        }
    }
    for pattern in unknown {
        let end = pattern.name.rsplit('.').next().unwrap_or_default();
        if ["inv_freq", "masked_bias", "causal_mask"].contains(&end) {
            let reason = format!("{{ reason = \"computed from the configuration\", check = \"{end}\" }}");
            sheet.guess("drop", &pattern.name, &reason, "buffers of this name hold nothing that is learned");
        } else {
            let (name, shape) = (&pattern.name, &pattern.shape);
            sheet.ask("tensors", &format!("what is {name:?} {shape:?} ({} of them)?", pattern.count));
        }
    }
}
