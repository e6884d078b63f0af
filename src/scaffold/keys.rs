//! Keys of configurations by their many names.

use serde_json::{Map, Value};

/// Hugging Face's usual name, and the others that models have used for it.
const SYNONYMS: &[(&str, &[&str])] = &[
    ("vocab_size", &["n_vocab", "vocabulary_size", "padded_vocab_size", "num_tokens"]),
    ("hidden_size", &["n_embd", "d_model", "width", "dim", "model_dim", "embed_dim", "n_embed", "emb_dim"]),
    ("num_hidden_layers", &["n_layer", "n_layers", "depth", "num_layers", "layers", "num_decoder_layers"]),
    ("num_attention_heads", &["n_head", "n_heads", "heads", "num_heads", "attention_heads"]),
    (
        "num_key_value_heads",
        &["kv_heads", "n_kv_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_query_groups"],
    ),
    ("head_dim", &["head_size", "d_head", "kv_channels", "attention_head_dim", "attention_head_size"]),
    (
        "intermediate_size",
        &["ffn_width", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim", "ffn_size", "mlp_dim", "d_inner"],
    ),
    ("rms_norm_eps", &["norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon", "eps"]),
    ("rope_theta", &["rope_base", "rotary_emb_base", "rotary_base", "rope_freq_base", "theta"]),
    (
        "max_position_embeddings",
        &["context", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length", "context_length"],
    ),
    ("hidden_act", &["activation_function", "hidden_activation", "activation", "act_fn", "act", "ffn_act", "mlp_act"]),
    ("tie_word_embeddings", &["tie_embeddings", "tied_embeddings", "share_embeddings", "weight_tying"]),
    ("sliding_window", &["window", "window_size", "attention_window", "sliding_window_size"]),
    ("partial_rotary_factor", &["rope_fraction", "rotary_pct", "rotary_percent", "rope_pct", "rope_percentage"]),
    ("num_experts", &["experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts"]),
    (
        "num_experts_per_tok",
        &["experts_used", "top_k", "moe_top_k", "moe_topk", "num_selected_experts", "experts_per_token", "n_active"],
    ),
    (
        "moe_intermediate_size",
        &["expert_width", "expert_dim", "moe_ffn_dim", "expert_hidden_size", "ffn_expert_size", "expert_ffn_dim"],
    ),
];

/// The key of a configuration that means what `usual` means: that key itself, or a synonym.
pub(super) fn find<'c>(config: &'c Map<String, Value>, usual: &str) -> Option<(&'c str, &'c Value)> {
    let others = SYNONYMS.iter().find(|(name, _)| *name == usual).map_or(&[][..], |(_, others)| *others);
    let mut names = std::iter::once(usual).chain(others.iter().copied());
    // An expression can name only what is an identifier, and every name above is.
    names
        .find_map(|name| config.get_key_value(name))
        .filter(|(_, value)| !value.is_null())
        .map(|(k, v)| (k.as_str(), v))
}

/// A size by its usual name.
pub(super) fn size(config: &Map<String, Value>, usual: &str) -> Option<usize> {
    find(config, usual)?.1.as_u64().and_then(|size| usize::try_from(size).ok())
}

/// A key whose value is this size and whose name holds one of these words.
pub(super) fn by_value<'c>(config: &'c Map<String, Value>, size: usize, words: &[&str]) -> Option<&'c str> {
    let fits = |(key, value): &(&'c String, &Value)| {
        value.as_u64() == u64::try_from(size).ok() && words.iter().any(|word| key.contains(word)) && is_identifier(key)
    };
    config.iter().find(fits).map(|(key, _)| key.as_str())
}

/// True for a name that an expression can hold.
pub(super) fn is_identifier(key: &str) -> bool {
    !key.starts_with(|c: char| c.is_ascii_digit()) && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The configuration with the usual names added where only others stand.
pub(super) fn filled(config: &Map<String, Value>) -> Map<String, Value> {
    let mut filled = config.clone();
    for (usual, _) in SYNONYMS {
        if let (false, Some((_, value))) = (config.contains_key(*usual), find(config, usual)) {
            filled.insert((*usual).to_owned(), value.clone());
        }
    }
    filled
}

/// Usual names that a configuration lacks, with the synonym that it has.
pub(super) fn renamed(config: &Map<String, Value>) -> Vec<(&'static str, &str)> {
    let absent = SYNONYMS.iter().filter(|(usual, _)| !config.contains_key(*usual));
    absent.filter_map(|(usual, _)| find(config, usual).map(|(key, _)| (*usual, key))).collect()
}

/// The usual name that a key is a synonym of, or that has the same value.
pub(super) fn meaning<'c>(config: &'c Map<String, Value>, key: &str) -> Option<&'static str> {
    let (usual, _) = SYNONYMS.iter().find(|(_, others)| others.contains(&key))?;
    let same = config.get(*usual).is_some_and(|value: &'c Value| Some(value) == config.get(key));
    same.then_some(*usual)
}
