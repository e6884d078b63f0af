"""The cases: which model, which matrices in which format, and what config.json says of it."""
import re

import floats
import packers

LLAMA = dict(model_type="llama", cfg=dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False))
WIDE = dict(LLAMA, cfg=dict(LLAMA["cfg"], intermediate_size=160))
QWEN_MOE = dict(model_type="qwen3_moe", cfg=dict(
    LLAMA["cfg"], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True,
    decoder_sparse_step=1, mlp_only_layers=[]))
GPT_OSS = dict(model_type="gpt_oss", cfg=dict(
    vocab_size=100, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0)))


def case(name, model, rules, config, note="", dtype="bfloat16", files=None):
    """rules: (pattern of a module's name, function); the first that matches quantises it, None leaves it alone."""
    return dict(model, name=name, rules=rules, quantization=config, note=note, dtype=dtype, files=files or {})


def scheme(kind, targets, **weights):
    return dict(format=kind, targets=targets, weights=weights)


def ct(rules):
    """A mixed compressed-tensors case: pattern, scheme."""
    groups = {f"group_{i}": dict(s, input_activations=None, output_activations=None) for i, (_, s) in enumerate(rules)}
    formats = {s["format"] for _, s in rules}
    config = dict(quant_method="compressed-tensors", config_groups=groups, ignore=["lm_head"],
                  format=formats.pop() if len(formats) == 1 else "mixed-precision", quantization_status="compressed",
                  kv_cache_scheme=None, global_compression_ratio=None, sparsity_config={}, transform_config={},
                  version="0.20.0")
    run = [(p, lambda n, w, s=s: floats.compressed(n, w, dict(s, targets=s["targets"]))) for p, s in rules]
    return run, config


def integers(kind, target, bits, **more):
    return (target, scheme(kind, ["re:" + target], num_bits=bits, type="int", **more))


def numbers(kind, target, bits, **more):
    return (target, scheme(kind, ["re:" + target], num_bits=bits, type="float", symmetric=True, **more))


GPTQ = dict(quant_method="gptq", bits=4, group_size=64, desc_act=False, sym=True, lm_head=False, damp_percent=0.01,
            checkpoint_format="gptq", pack_dtype="int32", meta={"quantizer": ["gptqmodel:7.7.0"]})
ANY = r".*_proj$"
FP8 = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128], modules_to_not_convert=["lm_head"])
PACK, PACK_CONFIG = ct([
    integers("pack-quantized", r".*q_proj$", 4, strategy="group", group_size=32, symmetric=True),
    integers("pack-quantized", r".*[kv]_proj$", 4, strategy="group", group_size=16, symmetric=False),
    integers("pack-quantized", r".*o_proj$", 8, strategy="channel", symmetric=False),
    integers("pack-quantized", r".*(gate|up)_proj$", 2, strategy="group", group_size=32, symmetric=False),
    integers("pack-quantized", r".*down_proj$", 3, strategy="channel", symmetric=True)])
MIXED, MIXED_CONFIG = ct([
    integers("int-quantized", r".*q_proj$", 8, strategy="channel", symmetric=True),
    integers("naive-quantized", r".*k_proj$", 8, strategy="group", group_size=32, symmetric=False),
    integers("int-quantized", r".*v_proj$", 8, strategy="tensor", symmetric=True),
    numbers("float-quantized", r".*o_proj$", 8, strategy="tensor"),
    numbers("float-quantized", r".*gate_proj$", 8, strategy="channel"),
    numbers("float-quantized", r".*up_proj$", 8, strategy="block", block_structure=[128, 128]),
    numbers("mxfp8-quantized", r".*down_proj$", 8, strategy="group", group_size=32, scale_dtype="torch.uint8")])
FOUR, FOUR_CONFIG = ct([
    numbers("nvfp4-pack-quantized", r".*self_attn.*_proj$", 4, strategy="tensor_group", group_size=16,
            scale_dtype="torch.float8_e4m3fn"),
    numbers("mxfp4-pack-quantized", r".*mlp.*_proj$", 4, strategy="group", group_size=32, scale_dtype="torch.uint8")])
INT4_FILE = dict(quantization=dict(quant_algo="W4A16_AWQ", kv_cache_quant_algo=None, group_size=32,
                                   has_zero_point=False, pre_quant_scale=True, exclude_modules=["lm_head"]),
                 producer=dict(name="modelopt", version="0.47.0"))


def hqq_config():
    quant = dict(weight_quant_params=dict(nbits=4, channel_wise=True, group_size=64, optimize=True, round_zero=True,
                                          axis=1, view_as_float=False),
                 scale_quant_params=None, zero_quant_params=None, offload_meta=False)
    return dict(quant_method="hqq", quant_config=quant, skip_modules=["lm_head"])


def partial_gptq(**options):
    return lambda n, w: packers.gptq(n, w, **options)


CASES = [
    case("gptq", LLAMA, [(ANY, partial_gptq(group=64))], GPTQ, "96 inputs: the last group of 64 is short", "float16"),
    case("gptq-actorder", LLAMA, [(ANY, partial_gptq(group=32, sym=False, order=True, low_zeros=True))],
         dict(GPTQ, group_size=32, desc_act=True, sym=False), "zero points of 0, so that v1 borrows", "float16"),
    case("gptq-v2", LLAMA,
         [(r".*k_proj$", None), (r".*up_proj$", partial_gptq(bits=2, group=32, sym=False, version=2)),
          (r".*gate_proj$", partial_gptq(bits=3, group=-1, sym=False, version=2)),
          (r".*down_proj$", partial_gptq(bits=4, group=32, sym=False, version=2)),
          (ANY, partial_gptq(bits=8, group=-1, sym=False, version=2))],
         dict(GPTQ, bits=8, group_size=-1, sym=False, checkpoint_format="gptq_v2", dynamic={
             "-:.*k_proj": {}, "+:.*up_proj": dict(bits=2, group_size=32), "+:.*gate_proj": dict(bits=3),
             ".*down_proj": dict(bits=4, group_size=32)}), "per-module overrides, 2, 3, 4 and 8 bits", "float16"),
    case("awq", LLAMA, [(r".*k_proj$", None), (ANY, packers.awq)],
         dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm", modules_to_not_convert=["k_proj"]),
         "packed in autoawq's order by the script", "float16"),
    case("auto-round", LLAMA, [(ANY, packers.auto_round)],
         dict(quant_method="auto-round", packing_format="auto_round:auto_gptq", bits=4, group_size=32, sym=True,
              data_type="int", autoround_version="0.16.1", block_name_to_quantize="model.layers", iters=0), "", "float16"),
    case("auto-round-awq", LLAMA, [(ANY, packers.awq)],
         dict(quant_method="auto-round", packing_format="auto_round:auto_awq", bits=4, group_size=32, sym=False,
              data_type="int", autoround_version="0.16.1"), "packed in autoawq's order by the script", "float16"),
    case("ct-pack", dict(LLAMA, cfg=dict(LLAMA["cfg"], intermediate_size=100)), PACK, PACK_CONFIG,
         "100 inputs fill no whole word; 2, 3, 4 and 8 bits; packed zero points"),
    case("ct-mixed", WIDE, MIXED, MIXED_CONFIG, "a format for each group of modules; blocks of 128 on 160 rows"),
    case("ct-fp4", LLAMA, FOUR, FOUR_CONFIG, "NVFP4 and MXFP4"),
    case("fp8", WIDE, [(r".*v_proj$", lambda n, w: floats.fp8_blocks(n, w, scale="scalar")), (ANY, floats.fp8_blocks)], FP8,
         "160 rows: the last block of 128 is short; one scalar scale"),
    case("fp8-moe", QWEN_MOE,
         [(r".*self_attn.*_proj$", lambda n, w: floats.fp8_blocks(n, w, (32, 32), "uint8")),
          (r".*experts\..*_proj$", lambda n, w: floats.fp8_blocks(n, w, (32, 32), "ue8m0"))],
         dict(FP8, weight_block_size=[32, 32], scale_fmt="ue8m0", modules_to_not_convert=["lm_head", "mlp.gate"]),
         "experts one by one; 40 rows in blocks of 32; scales as exponents"),
    case("fbgemm", LLAMA, [(r".*self_attn.*_proj$", None), (ANY, floats.fp8_rows)],
         dict(quant_method="fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=["self_attn"]),
         "packed by the script: fbgemm wants a GPU"),
    case("modelopt-fp8", LLAMA, [(r".*o_proj$", lambda n, w: floats.modelopt_fp8(n, w, True)), (ANY, floats.modelopt_fp8)],
         dict(quant_method="modelopt", quant_algo="FP8", kv_cache_scheme=None, ignore=["lm_head"],
              producer=dict(name="modelopt", version="0.47.0")), "scalar scales, and one matrix in blocks"),
    case("modelopt-nvfp4", LLAMA, [(ANY, floats.modelopt_nvfp4)], None, "the sidecar alone says what it is",
         files={"hf_quant_config.json": dict(producer=dict(name="modelopt", version="0.47.0"), quantization=dict(
             quant_algo="NVFP4", kv_cache_quant_algo=None, group_size=16, exclude_modules=["lm_head"]))}),
    case("modelopt-awq", LLAMA, [(ANY, floats.modelopt_awq)], None,
         "packed by modelopt, which can not dequantise it", files={"hf_quant_config.json": INT4_FILE}),
    case("mxfp4", GPT_OSS, [(r".*experts\.(gate_up|down)_proj$", floats.mxfp4_experts)],
         dict(quant_method="mxfp4", modules_to_not_convert=["self_attn", "router", "embed_tokens", "lm_head"])),
    case("bnb-nf4", LLAMA, [(ANY, lambda n, w: packers.bitsandbytes_4bit(n, w, "nf4", True))],
         dict(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type="nf4",
              bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage="uint8",
              llm_int8_skip_modules=None, llm_int8_threshold=6.0), "96 inputs: blocks of 64 cross the rows; dequantised by the library's general code, not by its CPU kernels"),
    case("bnb-fp4", dict(LLAMA, cfg=dict(LLAMA["cfg"], intermediate_size=100)),
         [(ANY, lambda n, w: packers.bitsandbytes_4bit(n, w, "fp4", False, packers.torch.float16))],
         dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4"), "", "float16"),
    case("bnb-int8", LLAMA, [(ANY, packers.bitsandbytes_8bit)],
         dict(quant_method="bitsandbytes", load_in_8bit=True, llm_int8_threshold=6.0), "", "float16"),
    case("hqq", LLAMA,
         [(r".*q_proj$", lambda n, w: packers.hqq(n, w, 8)), (r".*k_proj$", lambda n, w: packers.hqq(n, w, 2, 32)),
          (r".*v_proj$", lambda n, w: packers.hqq(n, w, 3)), (r".*o_proj$", lambda n, w: packers.hqq(n, w, 4, 64, 0)),
          (ANY, packers.hqq)], hqq_config(), "96 inputs: groups of 64 cross the rows; 1 axis 0; 2, 3, 4, 8 bits", "float16"),
    case("quanto", WIDE,
         [(r".*q_proj$", lambda n, w: packers.quanto(n, w, "qint8")), (r".*k_proj$", lambda n, w: packers.quanto(n, w, "qfloat8")),
          (r".*(v|up)_proj$", lambda n, w: packers.quanto(n, w, "qint2")), (ANY, lambda n, w: packers.quanto(n, w, "qint4"))],
         None, "no quantization_config: quanto_qmap.json", files={"quanto_qmap.json": {}}),
]


def chosen(rules, name):
    """The function that quantises the module of this name, if one does."""
    return next((run for pattern, run in rules if re.match(pattern, name)), None)
