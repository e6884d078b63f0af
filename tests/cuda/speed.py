"""Speed, memory and load time of the shapes of Llama-3.2-1B and Llama-3.1-8B with random weights (see run.py).

Decoding reads every matrix once for all rows and each row's cache: bytes by time, by what the memory can do, is the share
that a step reaches. What is read is counted from the shapes, not from files.
"""
import json
import os
import shutil
from pathlib import Path

import torch_speed

MODELS = os.environ.get("MODELS", "llama-3.2-1b,llama-3.1-8b").split(",")
KINDS = os.environ.get("KINDS", "f16,int4").split(",")
QUANT = os.environ.get("QUANT", "q4")
PADDING = os.environ.get("PADDING", "any")
POSITIONS = os.environ.get("POSITIONS", "mask")
BATCHES = [int(number) for number in os.environ.get("BATCHES", "1,8").split(",")]
PROMPT = int(os.environ.get("PROMPT", 2048))
# Tokens that are in the cache when the first step is timed: one of them is the prompt's.
PASTS = [int(number) for number in os.environ.get("PASTS", "1,512,4096").split(",")]
STEPS = int(os.environ.get("NEW_TOKENS", 64))
# GB/s as the makers give them, by a part of the name that nvidia-smi gives.
NOMINAL = [("H200", 4800), ("H100 80GB HBM3", 3352), ("H100 PCIe", 2039), ("H100", 3352), ("A100-SXM4-80GB", 2039), ("A100", 1555),
           ("L40S", 864), ("L4", 300), ("A10", 600), ("T4", 320)]


def config_of(run, model):
    folder = run.place("configs", Path(__file__).resolve().parent.parent.parent / "benches/configs")
    path = folder / f"{model}.json"
    return path, json.loads(path.read_text())


def bytes_read(config, bits, past, rows):
    """Bytes that one step reads: matrices once, caches (16 bits a number) for each row. Of the embedding a few lines."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    layer = hidden * size * (2 * heads + 2 * pairs) + 3 * hidden * inner
    matrices = config["num_hidden_layers"] * layer + config["vocab_size"] * hidden
    return matrices * bits / 8 + rows * past * config["num_hidden_layers"] * 2 * pairs * size * 2


def bandwidth(run):
    """GB/s: what the maker gives, and what `info` measured."""
    nominal = measured = None
    for line in run.results.read_text().splitlines() if run.results.exists() else []:
        found = json.loads(line)
        if found.get("step") == "info":
            measured = found.get("bandwidth_gb_s", measured)
            name = found.get("gpu") or ""
            nominal = next((speed for part, speed in NOMINAL if part in name), nominal)
    return {"nominal": nominal, "measured": measured}


def bits_of(kind, quant):
    """Bits of a weight with its part of the scale, a float16 for each block."""
    if kind in ("f16", "bf16"):
        return 16
    return 4 + 16 / (32 if quant == "int4" else 128)


def shares(run, config, bits, rows, decode):
    """For each past the share of the bandwidth that tokens per second come to."""
    speeds = {name: speed for name, speed in bandwidth(run).items() if speed}
    found = {name: {} for name in speeds}
    for past, rate in decode.items():
        # The cache grows while it is timed.
        read = bytes_read(config, bits, int(past) + STEPS / 2, rows)
        for name, speed in speeds.items():
            found[name][past] = round(read * rate / rows / (speed * 1e9), 3)
    return found


def built(run, model, kind):
    return run.work / "built" / f"{model}-{kind}"


def make(run):
    for model in MODELS:
        repo = run.work / "checkpoints" / model

        def checkpoint(model=model, repo=repo):
            shutil.rmtree(repo, ignore_errors=True)
            path, _ = config_of(run, model)
            found, error = run.call("dev", "synth", path, "--output", repo, "--dtype", "f16")
            return {"bytes": found.get("bytes")} | ({"error": error} if error else {})

        if not (repo / "config.json").exists():
            run.known.discard(("make", model, "checkpoint"))
            run.case({"step": "make", "model": model, "what": "checkpoint"}, checkpoint)
        for kind in KINDS:
            out = built(run, model, kind)

            def build(repo=repo, out=out, kind=kind):
                quant = ["--quant", QUANT, "--quant-algorithm", "nearest"] if kind == "int4" else []
                dtype = "f16" if kind == "int4" else kind
                target = os.environ.get("TARGET", "ort-cuda")
                # Only the last position's logits: those of 2,048 would take a gigabyte.
                found, error = run.call("build", repo, "--output", out, "--force", "--target", target, "--dtype", dtype,
                                        "--logits", "last", "--padding", PADDING, "--positions", POSITIONS, *quant)
                return {"quant": QUANT if quant else None} | ({"error": error} if error else {})

            if not out.exists():
                run.known.discard(("make", model, kind, "build"))
                run.case({"step": "make", "model": model, "dtype": kind, "what": "build"}, build)


def peers():
    """Graphs of the onnxruntime-genai builder, by the name of the build beside which they run."""
    named = [entry.split("=", 1) for entry in os.environ.get("GENAI", "").split(",") if "=" in entry]
    return {name: directory for name, directory in named}


def bench(run, model, kind, rows):
    """Prefill and decode of a build, beside the builder's graph where there is one."""
    own, peer = built(run, model, kind), peers().get(f"{model}-{kind}")
    dirs = [own] + (["--compare", peer] if peer else [])
    common = ["--batch", rows, "--loads", 1, *run.runtime()]
    prefill, error = run.call("bench", *dirs, "--prompt-tokens", PROMPT, "--new-tokens", 1, "--past", 0, "--repeat", 5, *common)
    if error:
        raise RuntimeError(error)
    pasts = ",".join(str(past - 1) for past in PASTS)
    decode, error = run.call("bench", *dirs, "--prompt-tokens", 1, "--new-tokens", STEPS, "--past", pasts, "--repeat", 3, *common)
    if error:
        raise RuntimeError(error)
    _, config = config_of(run, model)
    figures = []
    for first, then, bits in zip(prefill["models"], decode["models"], [bits_of(kind, QUANT), bits_of(kind, "int4")]):
        median = lambda spread: round(spread["median"], 4) if spread else None
        rates = {str(p["past"] + 1): median(p["decode_tokens_per_second"]) for p in then["points"]}
        mib = lambda spread: round(spread["max"] / 2**20) if spread else None
        figures.append({
            "prefill_tokens_per_second": median(first["points"][0]["prefill_tokens_per_second"]),
            "first_token_seconds": median(first["points"][0]["first_token_seconds"]),
            "decode_tokens_per_second": rates, "bandwidth_share": shares(run, config, bits, rows, rates),
            "load_seconds": median(then["load_seconds"]), "shared_buffers": then["shared_buffers"],
            "peak_device_mib": {"prefill": mib(first["peak_device_bytes"]), "decode": mib(then["peak_device_bytes"])},
            "peak_host_mib": mib(then["peak_bytes"]),
        })
    found = figures[0] | {"notes": decode["notes"]}
    return found | ({"genai": figures[1]} if peer else {})


def speed(run):
    for model in MODELS:
        for kind in KINDS:
            for rows in BATCHES:
                line = {"step": "speed", "model": model, "dtype": kind, "batch": rows}
                run.case(line, lambda m=model, k=kind, r=rows: bench(run, m, k, r))


def by_torch(run):
    for model in MODELS:
        _, config = config_of(run, model)
        for compiled in (True, False):
            for rows in BATCHES:
                line = {"step": "torch", "model": model, "dtype": "f16", "batch": rows, "what": "compiled" if compiled else "eager"}

                def work(config=config, rows=rows, compiled=compiled):
                    found = torch_speed.measure(config, rows, PROMPT, PASTS, STEPS, compiled)
                    return found | {"bandwidth_share": shares(run, config, 16, rows, found["decode_tokens_per_second"])}

                run.case(line, work)
