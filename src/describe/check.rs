//! Specifications that can not be.

use super::particular;
use crate::error::{Code, Error, Result};
use crate::spec::{FeedForward, ModelSpec};

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
            if moe.top_k == 0 || moe.top_k > moe.experts + moe.routing.identity_experts || !split {
                return odd(
                    "moe",
                    format!("{} of {} experts, groups {groups:?}, in layer {index}", moe.top_k, moe.experts),
                );
            }
        }
    }
    particular::check(spec, odd)
}
