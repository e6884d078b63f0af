//! What a tensor is, guessed from the words in its name and from its shape.

use super::patterns::Pattern;

/// A guess: which parameter a pattern of tensors makes, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Role {
    /// The parameter's pattern; `{a,b}` for several from one tensor.
    pub(super) parameter: String,
    /// The rule's value as TOML.
    pub(super) rule: String,
    /// Why, and what to look at.
    pub(super) why: String,
}

/// Sizes that tell tensors of the same rank apart.
#[derive(Debug, Clone, Default)]
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) vocab: usize,
    pub(super) experts: usize,
}

const EMBEDDING: &[&str] = &["embed", "embd", "tok", "wte", "emb"];
const HEAD: &[&str] = &["head", "output", "unembed", "logits", "embed_out"];
const NORM: &[&str] = &["norm", "ln"];
const ATTENTION: &[&str] = &["attn", "attention", "mixer", "att"];
const QUERY: &[&str] = &["q", "wq", "query"];
const KEY: &[&str] = &["k", "wk", "key"];
const VALUE: &[&str] = &["v", "wv", "value"];
const FUSED: &[&str] = &["qkv", "wqkv", "query_key_value", "c_attn", "w_pack", "attn_qkv", "in"];
const OUT: &[&str] = &["o", "wo", "out", "dense", "c", "proj", "output", "to_out"];
const GATE: &[&str] = &["gate", "w1", "linear_gate", "wg"];
const UP: &[&str] = &["up", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "linear_1", "wi", "in", "linear_fc1"];
const DOWN: &[&str] = &["down", "w2", "fc2", "fc_out", "c", "dense_4h_to_h", "linear_2", "wo", "out", "linear_fc2"];
const GATE_UP: &[&str] = &["gate_up", "up_gate", "w12", "gate_and_up", "fc1_gate_up"];

/// A name in its parts: module path below the layer, the module that holds the tensor, and the tensor's own name.
struct Parts<'p> {
    pattern: &'p Pattern,
    path: String,
    module: String,
    bias: bool,
}

impl<'p> Parts<'p> {
    fn new(pattern: &'p Pattern) -> Self {
        let lower = pattern.name.to_lowercase();
        let below = lower.split_once("{layer}.").map_or(lower.as_str(), |(_, below)| below);
        let segments: Vec<&str> = below.split('.').filter(|segment| *segment != "{expert}").collect();
        let leaf = segments.last().copied().unwrap_or_default();
        let weight = ["weight", "scale", "gamma", "kernel", "w"].contains(&leaf);
        let bias = ["bias", "beta", "shift", "b"].contains(&leaf);
        let own = usize::from((weight || bias) && segments.len() > 1);
        let modules = segments.get(..segments.len().saturating_sub(own)).unwrap_or_default();
        let module = modules.last().copied().unwrap_or_default();
        let stem = ["_proj", "_layer", "_linear", "_lin"].iter().find_map(|end| module.strip_suffix(end));
        let module = stem.unwrap_or(module).to_owned();
        Self { pattern, path: modules.join("."), module, bias }
    }

    fn is(&self, words: &[&str]) -> bool {
        words.contains(&self.module.as_str())
    }

    fn speaks_of(&self, words: &[&str]) -> bool {
        self.path.split(['.', '_']).any(|part| {
            let part = part.trim_end_matches(|c: char| c.is_ascii_digit());
            words.contains(&part) || words.iter().any(|word| word.len() > 3 && part.contains(word))
        })
    }

    fn kind(&self) -> &'static str {
        if self.bias { "bias" } else { "weight" }
    }
}

fn quoted(name: &str) -> String {
    toml::Value::String(name.to_owned()).to_string()
}

fn plain(parameter: String, pattern: &Pattern, why: &str) -> Role {
    Role { parameter, rule: quoted(&pattern.name), why: why.to_owned() }
}

/// What the tensors of a pattern are, if words and shape say it.
pub(super) fn role(pattern: &Pattern, all: &[Pattern], sizes: &Sizes) -> Option<Role> {
    let parts = Parts::new(pattern);
    if pattern.layers.is_empty() {
        return outer(&parts, sizes);
    }
    if pattern.shape.len() == 1 && parts.speaks_of(NORM) {
        return norm(&parts, sizes);
    }
    if parts.speaks_of(ATTENTION) || parts.is(QUERY) || parts.is(KEY) || parts.is(VALUE) || parts.is(FUSED) {
        return attention(&parts);
    }
    feed_forward(&parts, all, sizes)
}

fn outer(parts: &Parts<'_>, sizes: &Sizes) -> Option<Role> {
    let pattern = parts.pattern;
    let table = pattern.shape.len() == 2 && pattern.shape.first() == Some(&sizes.vocab);
    if table && parts.speaks_of(HEAD) {
        return Some(plain("lm_head.weight".to_owned(), pattern, "vocabulary by hidden size, and its name"));
    }
    if table && parts.speaks_of(EMBEDDING) {
        return Some(plain("model.embed_tokens.weight".to_owned(), pattern, "vocabulary by hidden size, and its name"));
    }
    if pattern.shape == [sizes.vocab] && parts.bias {
        return Some(plain("lm_head.bias".to_owned(), pattern, "one number for each token"));
    }
    let norm = pattern.shape == [sizes.hidden] && parts.speaks_of(NORM);
    norm.then(|| plain(format!("model.norm.{}", parts.kind()), pattern, "the only norm outside of layers"))
}

/// Which of the two norms of a layer: by its words, or by its number.
fn norm(parts: &Parts<'_>, sizes: &Sizes) -> Option<Role> {
    if parts.pattern.shape != [sizes.hidden] || parts.path.contains('.') && parts.speaks_of(ATTENTION) {
        return None;
    }
    let name = parts.path.as_str();
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    let second = has(&["2", "post", "ffn", "mlp", "ff", "feed"]);
    let first = has(&["1", "input", "attn", "attention", "pre"]);
    let place = if second { "post_attention_layernorm" } else { "input_layernorm" };
    let why = match (first, second) {
        (true, true) => "TODO: before the MLP, or behind attention?",
        (false, false) => "TODO: the name does not say where it stands",
        _ => "by its name; pre-norm is assumed",
    };
    Some(plain(format!("model.layers.{{layer}}.{place}.{}", parts.kind()), parts.pattern, why))
}

fn attention(parts: &Parts<'_>) -> Option<Role> {
    let at = |names: &str| format!("model.layers.{{layer}}.self_attn.{names}_proj.{}", parts.kind());
    let pattern = parts.pattern;
    for (words, name) in [(QUERY, "q"), (KEY, "k"), (VALUE, "v")] {
        if parts.is(words) {
            return Some(plain(at(name), pattern, "by its name"));
        }
    }
    if parts.is(FUSED) {
        let rule = format!("{{ split = {} }}", quoted(&pattern.name));
        let why = "all queries, then all keys, then all values; add `groups` if they alternate by head".to_owned();
        return Some(Role { parameter: at("{q,k,v}"), rule, why });
    }
    parts.is(OUT).then(|| plain(at("o"), pattern, "by its name"))
}

fn feed_forward(parts: &Parts<'_>, all: &[Pattern], sizes: &Sizes) -> Option<Role> {
    let pattern = parts.pattern;
    let below = |names: &str| format!("model.layers.{{layer}}.mlp.{names}");
    let rank = pattern.shape.len();
    let rows = pattern.shape.first().copied().unwrap_or(0);
    let expert = pattern.name.contains("{expert}") || rank == 3;
    let shared = parts.speaks_of(&["shared"]);
    if rank == 2 && rows == 1 && parts.module.contains("gate") {
        return Some(plain(below("shared_gate.weight"), pattern, "one row: a gate on the shared expert"));
    }
    let routes = parts.module.contains("router") || parts.is(GATE) || parts.path.contains("router");
    if rank == 2 && sizes.experts > 1 && rows == sizes.experts && !expert && !shared && routes {
        return Some(plain(below("gate.weight"), pattern, "one row for each expert"));
    }
    if rank == 1 && rows == sizes.experts && sizes.experts > 1 && !expert {
        let why = "one number for each expert; set correction_bias in [moe.routing], TODO: where is it added?";
        return Some(plain(below("gate.e_score_correction_bias"), pattern, why));
    }
    let inner = match (expert, shared) {
        (true, _) => "experts.",
        (false, true) => "shared.",
        (false, false) => "",
    };
    if parts.is(GATE_UP) {
        let axis = if rank == 3 { ", axis = 1" } else { "" };
        let rule = format!("{{ split = {}{axis} }}", quoted(&pattern.name));
        let why = "the gate's rows first; `interleave` is not a split".to_owned();
        return Some(Role { parameter: below(&format!("{inner}{{gate,up}}_proj.{}", parts.kind())), rule, why });
    }
    let name = if parts.is(GATE) && gated(pattern, all) {
        "gate"
    } else if parts.is(DOWN) {
        "down"
    } else if parts.is(UP) || parts.is(GATE) {
        "up"
    } else {
        return None;
    };
    let why = if parts.module.starts_with('w') { "w1 is the gate and w3 is up, as in Llama" } else { "by its name" };
    Some(plain(below(&format!("{inner}{name}_proj.{}", parts.kind())), pattern, why))
}

/// `w1` is a gate only where there is something to gate.
fn gated(pattern: &Pattern, all: &[Pattern]) -> bool {
    let parts = Parts::new(pattern);
    let place = |path: &str| path.rsplit_once('.').map_or(String::new(), |(place, _)| place.to_owned());
    all.iter().map(Parts::new).any(|other| place(&other.path) == place(&parts.path) && other.is(UP))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(name: &str, shape: &[usize]) -> Option<String> {
        let (name, _) = super::super::patterns::generalise(name);
        let layers = if name.contains("{layer}") { [0].into() } else { [].into() };
        let pattern = Pattern { name, layers, shape: shape.to_vec(), experts: 0, count: 1 };
        let sizes = Sizes { hidden: 64, vocab: 320, experts: 4 };
        role(&pattern, std::slice::from_ref(&pattern), &sizes).map(|role| role.parameter)
    }

    #[test]
    fn words_and_shapes() {
        let cases: [(&str, &[usize], &str); 10] = [
            ("tok.weight", &[320, 64], "model.embed_tokens.weight"),
            ("transformer.wte.weight", &[320, 64], "model.embed_tokens.weight"),
            ("head.weight", &[320, 64], "lm_head.weight"),
            ("transformer.ln_f.weight", &[64], "model.norm.weight"),
            ("blocks.3.norm2.scale", &[64], "model.layers.{layer}.post_attention_layernorm.weight"),
            ("h.0.attn.c_proj.bias", &[64], "model.layers.{layer}.self_attn.o_proj.bias"),
            ("blocks.0.attn.qkv.weight", &[128, 64], "model.layers.{layer}.self_attn.{q,k,v}_proj.weight"),
            ("blocks.0.ff.router.weight", &[4, 64], "model.layers.{layer}.mlp.gate.weight"),
            ("blocks.0.ff.experts.2.up.weight", &[32, 64], "model.layers.{layer}.mlp.experts.up_proj.weight"),
            ("blocks.0.ff.shared_gate.weight", &[1, 64], "model.layers.{layer}.mlp.shared_gate.weight"),
        ];
        for (name, shape, parameter) in cases {
            assert_eq!(guess(name, shape).as_deref(), Some(parameter), "{name}");
        }
        assert_eq!(guess("blocks.0.mystery.weight", &[7, 7]), None);
    }
}
