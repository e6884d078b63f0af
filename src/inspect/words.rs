//! A specification in words. It is read in its serialised form, so that a repository and the record of a built
//! directory are described by the same words.

use serde::Serialize;
use serde_json::Value;

use super::fields::{Fields, number, phrase, variant};

/// A titled group of lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Section {
    /// `model`, or which layers.
    pub title: String,
    /// What it is about, and the words.
    pub lines: Vec<(String, String)>,
}

/// Describes a serialised [`crate::spec::ModelSpec`]; equal layers are described once.
pub fn describe(spec: &Value) -> Vec<Section> {
    let mut spec = Fields::of(spec.clone());
    let layers = match spec.take("layers") {
        Some(Value::Array(layers)) => layers,
        _ => Vec::new(),
    };
    let mut sections = vec![model(spec, &layers)];
    let mut kinds: Vec<(&Value, Vec<usize>)> = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        match kinds.iter_mut().find(|(known, _)| *known == layer) {
            Some((_, indices)) => indices.push(index),
            None => kinds.push((layer, vec![index])),
        }
    }
    for (kind, indices) in kinds {
        let plural = if indices.len() == 1 { "layer" } else { "layers" };
        let title = format!("{plural} {}", ranges(&indices));
        sections.push(Section { title, lines: layer(Fields::of(kind.clone())) });
    }
    sections
}

/// `0-2, 4`; many equal steps are `5, 11, ... 47 (8 layers)`.
fn ranges(indices: &[usize]) -> String {
    let runs = indices.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        _ => run.first().map(usize::to_string).unwrap_or_default(),
    });
    let runs: Vec<String> = runs.collect();
    match runs.as_slice() {
        [first, second, third, .., last] if runs.len() > 8 => {
            format!("{first}, {second}, {third}, ... {last} ({} layers)", indices.len())
        }
        _ => runs.join(", "),
    }
}

type Lines = Vec<(String, String)>;

fn model(mut spec: Fields, layers: &[Value]) -> Section {
    let mut lines = Lines::new();
    let mut line = |about: &str, words: String| lines.push((about.to_owned(), words));
    // Said above, by whoever prints this.
    let _ = (spec.take("model_type"), spec.take("template"));
    let size = |value: Option<u64>| value.map_or_else(|| "?".to_owned(), |value| value.to_string());
    line("layers", layers.len().to_string());
    line("hidden size", size(spec.size("hidden_size")));
    line("heads", heads(layers));
    line("vocabulary", format!("{} tokens", size(spec.size("vocab_size"))));
    line("context", format!("{} tokens", size(spec.size("context_length"))));
    let mut embedding = spec.object("embedding").unwrap_or_default();
    let scale = embedding.number("scale").map(|scale| format!("scaled by {}", number(scale)));
    let words: Vec<String> = scale.into_iter().chain(embedding.rest()).collect();
    line("embedding", if words.is_empty() { "as it is stored".to_owned() } else { words.join(", ") });
    if let Some(last) = spec.take("final_norm") {
        let (formula, name) = norm(Fields::of(last));
        line("final norm", format!("{formula} ({name})"));
    }
    if let Some(mut head) = spec.object("head") {
        let tied = if head.flag("tied") { "tied to the embedding" } else { "a matrix of its own" };
        let bias = head.flag("bias").then(|| "with a bias".to_owned());
        let words: Vec<String> = [tied.to_owned()].into_iter().chain(bias).chain(head.rest()).collect();
        line("head", words.join(", "));
    }
    for (key, value) in spec.all() {
        if let Some(words) = phrase("", &value) {
            lines.push((key.replace('_', " "), words.trim().to_owned()));
        }
    }
    Section { title: "model".to_owned(), lines }
}

/// The heads of all layers: each combination once.
fn heads(layers: &[Value]) -> String {
    let mut found: Vec<String> = Vec::new();
    for layer in layers {
        let mut attention = Fields::of(layer.get("attention").cloned().unwrap_or_default());
        let words = head_words(&mut attention);
        if !words.is_empty() && !found.contains(&words) {
            found.push(words);
        }
    }
    if found.is_empty() { "none".to_owned() } else { found.join("; ") }
}

fn head_words(attention: &mut Fields) -> String {
    let (Some(heads), Some(kv), Some(size)) =
        (attention.size("heads"), attention.size("kv_heads"), attention.size("key_size"))
    else {
        return String::new();
    };
    let values = attention.size("value_size").filter(|values| *values != size);
    let values = values.map_or_else(String::new, |values| format!(", values of {values}"));
    if heads == kv {
        return format!("{heads} heads of {size}{values}");
    }
    let plural = if kv == 1 { "head" } else { "heads" };
    format!("{heads} query heads and {kv} key-value {plural} of {size}{values}")
}

fn layer(mut fields: Fields) -> Lines {
    let mut lines = Lines::new();
    if let Some(attention) = fields.take("attention") {
        lines.extend(attention_lines(Fields::of(attention)));
    }
    if let Some((kind, part)) = fields.variant("feed_forward") {
        match kind.as_str() {
            "dense" => lines.push(("MLP".to_owned(), mlp(part))),
            "moe" => lines.extend(moe(part)),
            other => lines.push((other.replace('_', " "), part.rest().join(", "))),
        }
    }
    if let Some(places) = fields.object("norms") {
        lines.push(("norms".to_owned(), norms(places)));
    }
    for (key, value) in fields.all() {
        if let Some(words) = phrase("", &value) {
            lines.push((key.replace('_', " "), words.trim().to_owned()));
        }
    }
    lines
}

#[expect(clippy::cast_precision_loss, reason = "head sizes are small")]
fn attention_lines(mut attention: Fields) -> Lines {
    let size = attention.peek_size("key_size");
    let mut words = vec![match attention.size("window") {
        Some(window) => format!("sliding window of {window}"),
        None => "full".to_owned(),
    }];
    words.push(head_words(&mut attention));
    if let Some((kind, projection)) = attention.variant("projection") {
        words.extend(projection_words(&kind, projection));
    }
    if attention.flag("output_bias") {
        words.push("bias on the output".to_owned());
    }
    if let (Some(scale), Some(size)) = (attention.number("scale"), size) {
        let usual = (size as f64).powf(-0.5);
        if (scale - usual).abs() > 1e-9 * usual {
            words.push(format!("products scaled by {} instead of {}", short(scale), short(usual)));
        }
    }
    let rope = match attention.object("rope") {
        Some(rope) => rope_words(rope, size),
        None => "none: no rotary positions".to_owned(),
    };
    words.extend(attention.rest());
    words.retain(|words| !words.is_empty());
    vec![("attention".to_owned(), words.join(", ")), ("rope".to_owned(), rope)]
}

fn projection_words(kind: &str, mut projection: Fields) -> Vec<String> {
    let mut words = Vec::new();
    match kind {
        "separate" => {
            let mut biased = |name: &str| projection.flag(&format!("{name}_bias")).then(|| name.to_owned());
            let biased: Vec<String> = ["query", "key", "value"].into_iter().filter_map(&mut biased).collect();
            if !biased.is_empty() {
                words.push(format!("biases on {}", biased.join(", ")));
            }
        }
        "latent" => {
            let rank = projection.size("query_rank");
            let query = rank.map_or_else(|| "full queries".to_owned(), |rank| format!("queries of rank {rank}"));
            let kv = projection.size("kv_rank").unwrap_or(0);
            let rotated = projection.size("rope_size").unwrap_or(0);
            words.push(format!(
                "from latents ({query}, keys and values of rank {kv}, {rotated} rotated elements shared by all heads)"
            ));
            if projection.flag("bias") {
                words.push("biases on the latents".to_owned());
            }
            if let Some(eps) = projection.number("norm_eps") {
                words.push(format!("latent norms with eps {}", number(eps)));
            }
        }
        other => words.push(other.replace('_', " ")),
    }
    words.extend(projection.rest());
    words
}

fn rope_words(mut rope: Fields, head: Option<u64>) -> String {
    let mut words = Vec::new();
    let pairs = match rope.text("layout").as_deref() {
        Some("half") => "pairs (i, i + half)".to_owned(),
        Some("interleaved") => "interleaved pairs (2i, 2i + 1)".to_owned(),
        other => other.unwrap_or_default().replace('_', " "),
    };
    let part = match (rope.size("size"), head) {
        (Some(size), Some(head)) if size < head => format!(" on {size} of {head} elements"),
        _ => String::new(),
    };
    words.push(format!("{pairs}{part}"));
    if let Some(theta) = rope.number("theta") {
        words.push(format!("theta {}", number(theta)));
    }
    if let Some((kind, scaling)) = rope.variant("scaling").filter(|(kind, _)| kind != "default") {
        let parameters = scaling.rest();
        let parameters = if parameters.is_empty() { String::new() } else { format!(" ({})", parameters.join(", ")) };
        words.push(format!("{kind}{parameters}"));
    }
    if let Some(factor) = rope.number("attention_factor").filter(|factor| (factor - 1.0).abs() > 1e-12) {
        words.push(format!("cosine and sine times {}", short(factor)));
    }
    words.extend(rope.rest());
    words.join(", ")
}

fn mlp(mut mlp: Fields) -> String {
    let activation = mlp.text("activation").unwrap_or_default();
    let form = if mlp.flag("gated") { "gated" } else { "plain" };
    let mut words = vec![format!("{form} {activation}")];
    words.extend(mlp.size("intermediate_size").map(|size| format!("{size} wide")));
    if mlp.flag("bias") {
        words.push("with biases".to_owned());
    }
    words.extend(mlp.rest());
    words.join(", ")
}

fn moe(mut moe: Fields) -> Lines {
    let mut lines = Lines::new();
    let experts = moe.size("experts").unwrap_or(0);
    let top = moe.size("top_k").unwrap_or(0);
    let each = moe.object("expert").map(mlp).unwrap_or_default();
    lines.push(("MoE".to_owned(), format!("{experts} experts, {top} for each token; each {each}")));
    if let Some(routing) = moe.object("routing") {
        lines.push(("routing".to_owned(), routing_words(routing)));
    }
    if let Some(mut shared) = moe.object("shared") {
        let name = shared.text("name").unwrap_or_default();
        let mut words = vec![format!("{name}, for every token"), shared.object("mlp").map(mlp).unwrap_or_default()];
        if shared.flag("gate") {
            words.push("behind a learned sigmoid gate".to_owned());
        }
        words.extend(shared.rest());
        lines.push(("shared expert".to_owned(), words.join(", ")));
    }
    let rest = moe.rest();
    if !rest.is_empty() {
        lines.push(("experts also".to_owned(), rest.join(", ")));
    }
    lines
}

fn routing_words(mut routing: Fields) -> String {
    let mut words = Vec::new();
    words.push(match routing.take("score").and_then(variant) {
        Some((score, _)) if score == "softmax" => "softmax over all experts".to_owned(),
        Some((score, _)) if score == "sigmoid" => "a sigmoid for each expert".to_owned(),
        other => other.map(|(name, _)| name.replace('_', " ")).unwrap_or_default(),
    });
    if routing.flag("correction_bias") {
        words.push("a correction bias on the choice, not on the weights".to_owned());
    }
    if let Some(mut groups) = routing.object("groups") {
        let mut size = |key: &str| groups.size(key).unwrap_or(0);
        let (count, top, best) = (size("count"), size("top"), size("score_top"));
        let rest = groups.rest();
        let rest = if rest.is_empty() { String::new() } else { format!(" ({})", rest.join(", ")) };
        words.push(format!("from the best {top} of {count} groups, each scored by the sum of its best {best}{rest}"));
    }
    if routing.flag("normalize") {
        words.push("weights normalised to a sum of one".to_owned());
    }
    if let Some(scale) = routing.number("scale").filter(|scale| (scale - 1.0).abs() > 1e-12) {
        words.push(format!("weights times {}", number(scale)));
    }
    words.extend(routing.rest());
    words.join(", ")
}

/// Norms of the same formula share it: `RMS, eps 1e-6: a before attention, b before the MLP`.
fn norms(places: Fields) -> String {
    let mut formulas: Vec<(String, Vec<String>)> = Vec::new();
    for (place, value) in places.all().filter(|(_, value)| !value.is_null()) {
        if !value.is_object() {
            formulas.extend(phrase(&place, &value).map(|words| (words, Vec::new())));
            continue;
        }
        let (formula, name) = norm(Fields::of(value));
        let place = match place.as_str() {
            "attention_input" => "before attention".to_owned(),
            "attention_output" => "after attention".to_owned(),
            "feed_forward_input" => "before the MLP".to_owned(),
            "feed_forward_output" => "after the MLP".to_owned(),
            "attention_sum" => "on the residual after attention".to_owned(),
            "feed_forward_sum" => "on the residual after the MLP".to_owned(),
            other => format!("at {}", other.replace('_', " ")),
        };
        let words = format!("{name} {place}");
        match formulas.iter_mut().find(|(known, _)| *known == formula) {
            Some((_, names)) => names.push(words),
            None => formulas.push((formula, vec![words])),
        }
    }
    let words = formulas
        .into_iter()
        .map(|(formula, names)| if names.is_empty() { formula } else { format!("{formula}: {}", names.join(", ")) });
    words.collect::<Vec<_>>().join("; ")
}

/// A norm's formula, and the name of its module.
fn norm(mut norm: Fields) -> (String, String) {
    let name = norm.text("name").unwrap_or_default();
    let kind = norm.take("kind").and_then(variant).map(|(kind, _)| kind).unwrap_or_default();
    let kind = match kind.as_str() {
        "rms" => "RMS".to_owned(),
        "layer" => "LayerNorm".to_owned(),
        other => other.replace('_', " "),
    };
    let mut words = vec![kind];
    words.extend(norm.number("eps").map(|eps| format!("eps {}", number(eps))));
    if !norm.flag("weight") {
        words.push("no weight".to_owned());
    }
    if norm.flag("offset") {
        words.push("weights stored less one".to_owned());
    }
    words.extend(norm.rest());
    (words.join(", "), name)
}

/// Six digits are enough to recognise a number by.
fn short(value: f64) -> String {
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn layers_by_number() {
        assert_eq!(ranges(&[0]), "0");
        assert_eq!(ranges(&[0, 1, 2, 4, 6, 7]), "0-2, 4, 6-7");
        assert_eq!(ranges(&(0..20).map(|i| 2 * i).collect::<Vec<_>>()), "0, 2, 4, ... 38 (20 layers)");
    }
}
