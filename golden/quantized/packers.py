"""Integer formats: one matrix quantised and dequantised by each format's own code.

Every function takes (name, float32 weight [out, in]) and returns (stored tensors, what the library dequantises to).
"""
import importlib.util
import sys
from pathlib import Path

import torch


def grid(weight, bits, group, symmetric):
    """(scales, zeros), both [out, groups]; plain min and max."""
    n, k = weight.shape
    groups = -(-k // group)
    padded = torch.nn.functional.pad(weight, (0, groups * group - k)).view(n, groups, group)
    top = 2 ** bits - 1
    if symmetric:
        return padded.abs().amax(-1) / (top // 2), torch.full((n, groups), float(2 ** (bits - 1)))
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    scale = (high - low) / top
    return scale, torch.round(-low / scale).clamp(0, top)


def gptq(name, weight, bits=4, group=32, sym=True, order=False, version=1, low_zeros=False):
    """gptqmodel's own pack, conversion between v1 and v2, and dequantize_weight."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
    n, k = weight.shape
    size = k if group == -1 else group
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight
    g_idx = torch.arange(k, dtype=torch.int32) // size
    gen = torch.Generator().manual_seed(len(name))
    if order:
        g_idx = g_idx[torch.randperm(k, generator=gen)]
    by_group = torch.argsort(g_idx.long(), stable=True)
    scales, zeros = grid(weight[:, by_group], bits, size, sym)
    if low_zeros:                      # v1 stores z - 1: a zero point of 0 borrows from the next field
        zeros[::5] = 0
    scales = scales.half().float()
    made = TorchLinear(bits=bits, group_size=group, sym=sym, desc_act=order, in_features=k, out_features=n)
    made.pack_original(linear, scales, zeros.to(torch.int32), g_idx)
    if version == 1:
        class Config:
            pass
        Config.bits, Config.pack_dtype = bits, torch.int32
        convert_gptq_v2_to_v1_format_module(made, Config)
    stored = {f"{name}.{part}": getattr(made, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
    if version == 1:
        convert_gptq_v1_to_v2_format_module(made, bits, torch.int32)
    made.post_init()
    return stored, made.dequantize_weight().T.contiguous()


def awq_packing():
    """awq's packing_utils alone: the package's __init__ wants an older transformers."""
    for folder in sys.path:
        path = Path(folder) / "awq" / "utils" / "packing_utils.py"
        if path.exists():
            spec = importlib.util.spec_from_file_location("packing_utils", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise SystemExit("autoawq is not installed")


def awq(name, weight, group=32):
    """Packed here in the order of autoawq's from_linear (which wants a GPU), dequantised by its dequantize_gemm."""
    utils = awq_packing()
    scales, zeros = grid(weight, 4, group, False)
    scales = scales.half()
    wide = lambda t: t.repeat_interleave(group, 1)[:, :weight.shape[1]]
    codes = torch.round(weight / wide(scales.float()) + wide(zeros)).clamp(0, 15).to(torch.int32)

    def pack(t):                       # [rows, columns] -> 8 columns in a word
        t = t.reshape(t.shape[0], -1, 8)
        words = sum(t[:, :, utils.AWQ_ORDER[i]] << (4 * i) for i in range(8))
        return words.to(torch.int32).contiguous()

    stored = {f"{name}.qweight": pack(codes.T.contiguous()), f"{name}.qzeros": pack(zeros.T.to(torch.int32)),
              f"{name}.scales": scales.T.contiguous()}
    got = utils.dequantize_gemm(*(stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")), 4, group)
    return stored, got.T.contiguous()


def auto_round(name, weight, group=32):
    """auto-round's own torch QuantLinear, whose zero points are GPTQ's of version 1."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    n, k = weight.shape
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight
    scales, zeros = grid(weight, 4, group, True)
    made = QuantLinear(4, group, k, n, False)
    made.pack(linear, scales.half().float(), zeros, None)
    stored = {f"{name}.{part}": getattr(made, part).clone() for part in ("qweight", "qzeros", "scales")}
    seen = made(torch.eye(k, dtype=torch.float16))     # x @ w with a unit matrix: each product is a weight, exactly
    return stored, seen.T.contiguous()


def bitsandbytes_4bit(name, weight, kind, double, dtype=torch.bfloat16):
    import bitsandbytes as bnb
    packed, state = bnb.functional.quantize_4bit(weight.to(dtype), quant_type=kind, blocksize=64,
                                                 compress_statistics=double)
    stored = {name + ".weight": packed}
    stored.update({f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()})
    # The library's own general code, which GPUs agree with: its CPU kernels restart the blocks at each row.
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return stored, _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, dtype)


def bitsandbytes_8bit(name, weight):
    import bitsandbytes as bnb
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    stored = {name + ".weight": codes, name + ".SCB": scale, name + ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, bnb.functional.int8_vectorwise_dequant(codes, scale)


def hqq(name, weight, bits=4, group=64, axis=1):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.half()
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    made = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    stored = {f"{name}.{key}": value.data for key, value in made.state_dict().items()}
    return stored, made.dequantize()


def quanto(name, weight, kind, dtype=torch.bfloat16):
    from optimum import quanto as q
    linear = q.QLinear.from_module(linear_of(weight, dtype), weights=getattr(q, kind))
    linear.freeze()
    stored = {f"{name}.{key}": value for key, value in linear.state_dict().items() if isinstance(value, torch.Tensor)}
    return stored, linear.weight.dequantize()


def linear_of(weight, dtype):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.to(dtype)
    return linear
