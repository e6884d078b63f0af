#!/usr/bin/env python3
"""Make the tiny quantised repositories of formats.py with the formats' own libraries, and record them.

    record.py [--into DIR] [NAME ...]

Each folder gets config.json, the format's sidecars, model.safetensors as the format stores it, expected.safetensors (every
quantised weight of the first layer as the library dequantises it) and golden.safetensors (what transformers computes with those, in float32).
"""
import argparse
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.dont_write_bytecode = True
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import formats  # noqa: E402

import record as goldens  # noqa: E402  (the script in the folder above; this one is __main__)
import reference  # noqa: E402
import tiny  # noqa: E402

SEEDS = 60
STACKED = ("experts.gate_up_proj", "experts.down_proj")


def split_experts(name, weight):
    """Stacked experts as qwen3_moe's checkpoints store them: one matrix each."""
    prefix = name.rsplit(".", 1)[0]
    for expert, matrix in enumerate(weight):
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), matrix.chunk(2)):
                yield f"{prefix}.{expert}.{part}.weight", half.contiguous()
        else:
            yield f"{prefix}.{expert}.down_proj.weight", matrix.contiguous()


def as_stored(model, case):
    """name -> float32 tensor, under the names of the checkpoint."""
    for name, tensor in tiny.named_tensors(model):
        if case["model_type"] == "qwen3_moe" and name.endswith(STACKED):
            yield from split_experts(name, tensor.detach())
        else:
            yield name, tensor.detach()


def quantise(model, case):
    """(stored, expected): the checkpoint's tensors, and the library's values of those that are quantised."""
    stored, expected, dtype = {}, {}, getattr(torch, case["dtype"])
    for name, tensor in as_stored(model, case):
        module = name.removesuffix(".weight")
        run = formats.chosen(case["rules"], module) if tensor.dim() >= 2 else None
        if run is None:
            stored[name] = tensor.to(dtype)
            continue
        parts, values = run(module, tensor)
        stored.update(parts)
        expected[name] = values
    return stored, expected


def put(model, values):
    """Give the model float32 values under the checkpoint's names."""
    state = model.state_dict(keep_vars=True)
    for name, value in values.items():
        if name in state:
            state[name].data.copy_(value.float())
            continue
        prefix, expert, part, _ = name.rsplit(".", 3)            # one expert of a stack
        target = state[f"{prefix}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"].data[int(expert)]
        half = target.shape[0] // 2
        view = {"gate_proj": target[:half], "up_proj": target[half:]}.get(part, target)
        view.copy_(value.float())


def attempt(case, seed):
    """(model with the dequantised weights, stored, expected)"""
    config, auto = tiny.make_config(case)
    model = tiny.new_model(config, auto)
    tiny.init_weights(model, seed)
    batch = reference.random_batch(case["cfg"]["vocab_size"], seed, 0)
    tiny.scale_output(model, lambda m: float(reference.full_pass(m, *(x[:1] for x in batch)).logits.std()))
    stored, expected = quantise(model, case)
    put(model, expected)
    put(model, {k: v for k, v in stored.items() if v.is_floating_point() and v.element_size() > 1 and k not in expected
                and (k in model.state_dict() or k.split(".")[-3].isdigit())})
    return model, stored, expected, batch


def make(case, folder):
    base = zlib.crc32(case["name"].encode()) % 10000
    for seed in range(base, base + SEEDS):
        model, stored, expected, batch = attempt(case, seed)
        found = tiny.quality(model, batch)
        if found["greedy_gap"] > 1e-2 and found["topk_gap"] > 1e-3:
            break
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = model.config
    config.dtype = getattr(torch, case["dtype"])
    config.save_pretrained(folder)
    if case["quantization"] is not None:
        text = json.loads((folder / "config.json").read_text())
        text["quantization_config"] = case["quantization"]
        (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n")
    for file, content in case["files"].items():
        if file == "quanto_qmap.json":
            content = qmap(expected, stored)
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    clean = lambda tensors: {k: v.detach().contiguous().clone() for k, v in sorted(tensors.items())}
    save_file(clean(stored), folder / "model.safetensors", metadata={"format": "pt"})
    save_file(clean({k: v for k, v in expected.items() if ".layers.0." in k}), folder / "expected.safetensors")
    tensors, meta = reference.decoder(model, *batch)
    meta.update(found, seed=seed, kind="decoder", model_type=case["model_type"], dtype=case["dtype"], note=case["note"])
    goldens.write(folder / "golden.safetensors", tensors, meta)
    for file in folder.iterdir():
        os.chmod(file, 0o644)
    return dict(found, seed=seed, disagrees=meta["transformers_disagrees"])


def qmap(expected, stored):
    """quanto_qmap.json as quanto writes it."""
    kinds = {}
    for name in expected:
        data = stored.get(name + "._data")
        if data is None:
            kinds[name] = "qint2" if "v_proj" in name or "up_proj" in name else "qint4"
        else:
            kinds[name] = "qint8" if data.dtype == torch.int8 else "qfloat8_e4m3fn"
    return {name.removesuffix(".weight"): dict(weights=kind, activations="none") for name, kind in kinds.items()}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("names", nargs="*")
    ap.add_argument("--into", type=Path, default=HERE)
    args = ap.parse_args()
    for case in formats.CASES:
        if not args.names or case["name"] in args.names:
            try:
                print(case["name"], json.dumps(make(case, args.into / case["name"])), flush=True)
            except Exception as error:
                print(case["name"], f"FAILED: {type(error).__name__}: {error}", flush=True)
                if args.names:
                    raise


if __name__ == "__main__":
    main()
