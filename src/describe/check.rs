//! Specifications that can not be.

use serde_json::Value;

use super::particular;
use crate::error::{Code, Error, Result};
use crate::spec::{FeedForward, ModelSpec};

/// Largest of all sizes: consumers hold them in 32 bits with a sign.
const LARGEST_SIZE: u64 = 0x7fff_ffff;
/// Most heads of a layer, widest head, most experts and most streams: far above any model, and small enough that
/// what a graph spells out for each of them stays small.
const MOST_HEADS: usize = 4096;
const WIDEST_HEAD: usize = 8192;
const MOST_EXPERTS: usize = 65_536;
const MOST_STREAMS: usize = 64;

/// Numbers that no graph can hold: sizes over [`LARGEST_SIZE`], floats that are infinite in float32, and epsilons below 0.
pub(super) fn numbers(spec: &ModelSpec) -> Result<()> {
    let failed = |found: String| Error::new(Code::SpecInvalid, format!("template {}", spec.template)).found(found);
    let value = serde_json::to_value(spec).map_err(|e| failed(e.to_string()))?;
    match number("", &value) {
        None => Ok(()),
        Some((path, found)) => {
            let subject = format!("template {}: {}", spec.template, path.trim_start_matches('.'));
            Err(Error::new(Code::SpecInvalid, subject)
                .found(found)
                .expected(format!(
                    "a whole number up to {LARGEST_SIZE}, or a number that float32 can hold; not below 0 for an epsilon"
                ))
                .help("check the sizes and factors in config.json"))
        }
    }
}

/// The path and value of the first number that is out of range.
fn number(path: &str, value: &Value) -> Option<(String, String)> {
    match value {
        Value::Number(number) => {
            let negative = path.ends_with("eps") && number.as_f64().is_some_and(|eps| eps < 0.0);
            let large = number.as_u64().is_some_and(|size| size > LARGEST_SIZE);
            let wide = number.is_f64() && number.as_f64().is_some_and(|float| float.abs() > f64::from(f32::MAX));
            (large || wide || negative).then(|| (path.to_owned(), number.to_string()))
        }
        Value::Array(items) => {
            items.iter().enumerate().find_map(|(index, item)| number(&format!("{path}[{index}]"), item))
        }
        Value::Object(table) => table.iter().find_map(|(key, item)| number(&format!("{path}.{key}"), item)),
        _ => None,
    }
}

/// Sizes that can not be: they would become wrong graphs or divisions by zero further on.
pub(super) fn sizes(spec: &ModelSpec) -> Result<()> {
    let odd = |what: &str, found: String| {
        Err(Error::new(Code::SpecInvalid, format!("template {}: {what}", spec.template))
            .found(found)
            .expected("sizes from 1 up, of which the parts divide or fit into their whole")
            .help("check the sizes in config.json"))
    };
    if spec.vocab_size == 0 || spec.hidden_size == 0 || spec.layers.is_empty() {
        return odd(
            "model",
            format!("{} layers of {} with {} tokens", spec.layers.len(), spec.hidden_size, spec.vocab_size),
        );
    }
    for (index, layer) in spec.layers.iter().enumerate() {
        let a = &layer.attention;
        if a.kv_heads == 0 || a.heads == 0 || a.heads % a.kv_heads != 0 {
            return odd("attention", format!("{} query heads for {} key heads in layer {index}", a.heads, a.kv_heads));
        }
        if a.window == Some(0) || a.key_size == 0 || a.value_size == 0 {
            return odd("attention", format!("a size of zero in layer {index}"));
        }
        if a.heads > MOST_HEADS || a.key_size.max(a.value_size) > WIDEST_HEAD {
            return odd("attention", format!("{} heads of {} in layer {index}", a.heads, a.key_size.max(a.value_size)));
        }
        if a.softcap == Some(0.0) || spec.head.softcap == Some(0.0) {
            return odd("softcap", format!("a division by 0 in layer {index} or the head"));
        }
        if let Some(rope) = a.rope.as_ref().filter(|rope| rope.size > a.key_size) {
            return odd("rope", format!("{} rotated elements of {} in layer {index}", rope.size, a.key_size));
        }
        let own = match &layer.feed_forward {
            FeedForward::Dense(_) => None,
            FeedForward::Moe(moe) => Some(&**moe),
        };
        let branch = layer.branch.as_ref().map(|branch| &branch.moe);
        for moe in own.into_iter().chain(branch).chain(layer.shortcut.as_deref()) {
            let groups = moe.routing.groups;
            let split =
                groups.is_none_or(|g| g.count > 0 && moe.experts % g.count == 0 && g.top <= g.count && g.top > 0);
            if moe.experts.max(moe.routing.identity_experts) > MOST_EXPERTS {
                return odd("moe", format!("{} experts in layer {index}, over {MOST_EXPERTS}", moe.experts));
            }
            if moe.top_k == 0 || moe.top_k > moe.experts + moe.routing.identity_experts || !split {
                return odd(
                    "moe",
                    format!("{} of {} experts, groups {groups:?}, in layer {index}", moe.top_k, moe.experts),
                );
            }
        }
    }
    if spec.altup.as_ref().is_some_and(|altup| altup.inputs > MOST_STREAMS) {
        return odd("altup", format!("more than {MOST_STREAMS} streams"));
    }
    particular::check(spec, odd)
}
