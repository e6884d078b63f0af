"""Float formats and compressed-tensors: one matrix quantised and dequantised by each format's own code.

Every function takes (name, float32 weight [out, in]) and returns (stored tensors, what the library dequantises to).
"""
import torch

E4M3 = torch.float8_e4m3fn


def compressed(name, weight, scheme, dtype=torch.bfloat16):
    """compressed-tensors' compressor for the scheme, there and back."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    scheme = QuantizationScheme(**scheme)
    args, weight = scheme.weights, weight.to(dtype)
    n, k = weight.shape
    state = {"weight": weight}
    if args.strategy == "block":
        bm, bn = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -k % bn, 0, -n % bm)).view(-(-n // bm), bm, -(-k // bn), bn)
        low, high = padded.amin((1, 3)), padded.amax((1, 3))
    elif args.strategy in ("group", "tensor_group"):
        grouped = weight.view(n, -1, args.group_size)
        low, high = grouped.amin(-1), grouped.amax(-1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        low, high = weight.min().view(1), weight.max().view(1)
    overall = None
    if args.strategy == "tensor_group":
        overall = generate_gparam(weight.min().view(1), weight.max().view(1))
        state["weight_global_scale"] = overall
    scale, zero = calculate_qparams(low, high, args, global_scale=overall)
    state.update(weight_scale=scale, weight_zero_point=zero)
    kind = BaseCompressor.get_value_from_registry(scheme.format)
    made = kind.compress(dict(state), scheme)
    stored = {f"{name}.{key}": value.contiguous() for key, value in made.items() if value is not None}
    return stored, kind.decompress(dict(made), scheme)["weight"]


def fp8_blocks(name, weight, block=(128, 128), scale="float32", dtype=torch.bfloat16):
    """transformers quantises what divides into blocks; for the short ones at the edges the grid is padded, and its own
    dequantisation is given padded weights too (it infers the block from the shapes, which is wrong there)."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        class quantization_config:
            weight_block_size = list(block)
            scale_fmt = "ue8m0" if scale == "ue8m0" else "float"
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % block[1], 0, -n % block[0]))
    made = Fp8Quantize(Quantizer())._quantize_one(name + ".weight", padded)
    codes, scales = made[name + ".weight"], made[name + ".weight_scale_inv"]
    if scale == "uint8":
        exponents = torch.ceil(torch.log2(scales)) + 127
        scales = exponents.to(torch.uint8)
    elif scale == "scalar":
        scales = scales.max().view(())
    got = Fp8Dequantize(None)._dequantize_one(codes, scales if scales.dim() else scales.view(1, 1), dtype)
    stored = {name + ".weight": codes[:n, :k].contiguous(), name + ".weight_scale_inv": scales}
    return stored, got[:n, :k].contiguous()


def fp8_rows(name, weight, dtype=torch.bfloat16):
    """fbgemm's layout, packed here (its kernels want a GPU): float32 scales of rows; the product is rounded once."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(E4M3)
    return {name + ".weight": codes, name + ".weight_scale": scale}, (codes.float() * scale).to(dtype)


def modelopt_fp8(name, weight, blocks=False):
    """modelopt's FP8QTensor; its dequantize is asked for float32, so that the scale stays as it is stored."""
    from modelopt.torch.quantization.qtensor import FP8QTensor
    sizes = {-1: 32, -2: 32} if blocks else None
    if blocks:
        n, k = weight.shape
        scales = weight.view(n // 32, 32, k // 32, 32).abs().amax((1, 3)) / 448
    else:
        scales = weight.abs().max() / 448
    made, scales = FP8QTensor.quantize(weight, scales, block_sizes=sizes)
    got = made.dequantize(torch.float32, scale=scales, block_sizes=sizes)
    kept = scales[:, None, :, None].contiguous() if blocks else scales
    stored = {name + ".weight": made._quantized_data, name + ".weight_scale": kept}
    if not blocks:
        stored[name + ".input_scale"] = torch.tensor(0.25)
    return stored, got


def modelopt_nvfp4(name, weight, dtype=torch.bfloat16):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    made, scale, overall = NVFP4QTensor.quantize(weight.to(dtype), 16)
    got = made.dequantize(dtype, scale=scale, double_scale=overall, block_sizes={-1: 16})
    stored = {name + ".weight": made._quantized_data, name + ".weight_scale": scale, name + ".weight_scale_2": overall,
              name + ".input_scale": torch.tensor(0.125)}
    return stored, got


def modelopt_awq(name, weight, group=32):
    """Packed by modelopt; it has no way back, so the values are the stored integers times the float32 scales."""
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    n, k = weight.shape
    scales = weight.view(n, k // group, group).abs().amax(-1) / 7
    packed = pack_int4_in_uint8(weight, scales, group)
    low, high = (packed & 15).to(torch.int8), (packed >> 4).to(torch.int8)
    codes = torch.stack([low, high], 1).view(n, k)
    codes = torch.where(codes > 7, codes - 16, codes)
    return {name + ".weight": packed, name + ".weight_scale": scales}, codes * scales.repeat_interleave(group, 1)


def mxfp4_experts(name, weight, dtype=torch.bfloat16):
    """gpt-oss: [experts, in, out] to blocks; rounded here, dequantised by transformers' convert_moe_packed_tensors."""
    from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors
    rows = weight.transpose(1, 2).contiguous()
    grouped = rows.view(*rows.shape[:2], -1, 32)
    exponent = torch.floor(torch.log2(grouped.abs().amax(-1).clamp(min=1e-20))) - 2
    scaled = grouped / torch.exp2(exponent)[..., None]
    codes = (scaled[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1).to(torch.uint8)
    blocks, scales = codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)
    return {name + "_blocks": blocks, name + "_scales": scales}, convert_moe_packed_tensors(blocks, scales, dtype=dtype)
