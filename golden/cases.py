"""The golden cases, as a table. A case is a dict:

    name        folder name
    model_type  key of transformers' CONFIG_MAPPING, or "custom:<folder>" for code in custom/<folder>
    cfg         config overrides
    dtype       dtype on disk: float32 (default) | bfloat16 | float16
    shard       max_shard_size given to save_pretrained, e.g. "150KB"
    legacy      write config.json the way transformers 4 did (rope_theta, rope_scaling, torch_dtype)
    tokenizer   give the repository a tokenizer
    note        free text, copied into the golden file's metadata
"""

IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
BASE = dict(IDS, vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128)
MLA = dict(kv_lora_rank=24, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
           num_key_value_heads=4, num_hidden_layers=3, intermediate_size=40)
DS_MOE = dict(n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=12, n_group=3,
              topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.7, norm_topk_prob=True)
LONG = [1.0, 1.3, 1.9, 2.6, 3.5, 4.5, 6.0, 8.0]
SHORT = [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]


def case(name, model_type=None, cfg=None, base=BASE, **kw):
    return dict(name=name, model_type=model_type or name, cfg={**base, **(cfg or {})}, **kw)


def rope(kind="default", theta=10000.0, **kw):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **kw))


def longrope(original):
    return rope("longrope", factor=4.0, long_factor=LONG, short_factor=SHORT, original_max_position_embeddings=original)


CASES = [
    case("llama", tokenizer=True),
    case("mistral", cfg=dict(sliding_window=8, head_dim=16)),
    case("qwen2", cfg=dict(num_hidden_layers=3, intermediate_size=80, use_sliding_window=True, sliding_window=8,
                           max_window_layers=1)),
    case("qwen2-plain", "qwen2", dict(tie_word_embeddings=True), legacy=True, dtype="bfloat16"),
    case("mixtral", cfg=dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=24, sliding_window=None),
         tokenizer=True),
    case("deepseek_v3", cfg={**MLA, **DS_MOE, **rope("yarn", factor=4.0, original_max_position_embeddings=16,
                             mscale=1.0, mscale_all_dim=0.8, beta_fast=32, beta_slow=1)}),
    case("deepseek_v3-noqlora", "deepseek_v3", {**MLA, **DS_MOE, "q_lora_rank": None, "n_shared_experts": 2,
                                                "num_hidden_layers": 2, "norm_topk_prob": False, "rope_interleave": False}),
    case("gemma", cfg=dict(head_dim=24, num_key_value_heads=1)),
    case("llama-linear", "llama", rope("linear", 5000.0, factor=3.0)),
    case("llama-dynamic-short", "llama", rope("dynamic", factor=4.0), note="prompt stays below the original length"),
    case("llama-dynamic-long", "llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 16},
         note="prompt is longer than max_position_embeddings: the base changes with the length"),
    case("llama-yarn", "llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    case("llama-yarn-attnfactor", "llama", rope("yarn", 1000.0, factor=8.0, original_max_position_embeddings=16,
         attention_factor=1.25, beta_fast=4.0, beta_slow=0.5), legacy=True),
    case("llama-longrope-short", "llama", longrope(64)),
    case("llama-longrope-long", "llama", longrope(8), note="every prefix used is already past the original length"),
    case("llama-longrope-crossing", "llama", longrope(16), note="the prompt crosses the original length"),
    case("llama-llama3", "llama", rope("llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
         original_max_position_embeddings=64)),
    case("llama-tied", "llama", dict(tie_word_embeddings=True)),
    case("llama-bias", "llama", dict(attention_bias=True, mlp_bias=True)),
    case("llama-headdim", "llama", dict(head_dim=24)),
    case("llama-mqa", "llama", dict(num_key_value_heads=1)),
    case("llama-sharded", "llama", dict(num_hidden_layers=3), shard="120KB", legacy=True),
    case("llama-f16", "llama", dict(hidden_act="gelu"), dtype="float16"),
    case("my_model", "custom:my_model", base={}, cfg=dict(IDS, vocab_size=320, width=64, depth=3, heads=4, kv_heads=2,
         ffn_width=96, expert_width=32, experts=4, rope_fraction=0.5, rope_base=10000.0, norm_eps=1e-5, context=128),
         tokenizer=True),
]
