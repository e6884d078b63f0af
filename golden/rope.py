#!/usr/bin/env python3
"""Record how transformers rotates, for configurations that say it in every way that the field has.

    rope.py CASES_DIR [--into golden/rope]

CASES_DIR holds the cases of golden/cases. Each way of MUTATIONS is put into the config.json of each of CASES, a model is
made of it (random weights, which do not matter), and what its layers are handed as cosine and sine is written down:
one JSON file a case, a list of {name, config, layers} or {name, config, error}. `layers` has {scale, angles} for each
layer: the length of (cos, sin), and the angles at position 1, in radians. Install requirements.txt first.
"""
import argparse
import copy
import json
import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Layouts and classes that differ in how they read their configuration: half and interleaved, flat and by layer type.
CASES = ["llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "stablelm", "glm", "glm4_moe", "gpt_neox", "cohere", "cohere2", "olmo3",
         "gemma", "gemma2", "gemma3_text", "granite", "starcoder2", "gpt_oss", "smollm3", "exaone4", "nemotron", "helium",
         "seed_oss", "mellum", "modernbert-decoder", "mimo_v2_flash", "gemma4_text", "ministral3", "persimmon", "minimax_m2", "hunyuan_v1_dense", "solar_open"]
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
             "original_max_position_embeddings", "rope_local_base_freq")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 3e4}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 3e4}


def without(parameters, *keys):
    return {k: v for k, v in parameters.items() if k not in keys}


def layer_types(config):
    return sorted(set(config.get("layer_types") or []))


def by_type(config, first, rest):
    """Parameters by layer type: `first` for one, `rest` for the others; none where there are no types to tell apart."""
    types = layer_types(config)
    return {"rope_parameters": {t: first if t == "full_attention" else rest for t in types}} if len(types) > 1 else None


def factors(config):
    """The divisors of longrope for a head of this configuration."""
    pairs = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    return {"short_factor": [1 + i / 8 for i in range(pairs)], "long_factor": [2 + i / 4 for i in range(pairs)]}


# Name, and what stands in config.json in place of the keys above; a function is given the configuration.
MUTATIONS = {
    "nothing": {},
    "theta": {"rope_theta": 2e4},
    "theta-whole-number": {"rope_theta": 20000},
    "theta-inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "theta-inside-and-outside": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rope_theta": 2e4},
    "theta-outside-type-inside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e4},
    "no-type": {"rope_parameters": {"rope_theta": 5e4}},
    "old-name-of-type": {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 5e4}},
    "two-types": {"rope_parameters": {"type": "linear", "rope_type": "default", "rope_theta": 5e4}},
    "scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 2e4},
    "scaling-null": {"rope_scaling": None, "rope_theta": 2e4},
    "scaling-empty": {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "scaling-beside-parameters": {"rope_scaling": without(YARN, "rope_theta"), "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "scaling-beside-parameters-and-theta": {"rope_scaling": without(YARN, "rope_theta"), "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rope_theta": 2e4},
    "scaling-with-theta-beside-parameters": {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "scaling-default-beside-parameters": {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
    "scaling-null-beside-parameters": {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
    "scaling-same-as-parameters": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
    "linear-factor-1": {"rope_parameters": {"rope_type": "linear", "factor": 1, "rope_theta": 5e4}},
    "dynamic-factor-1": {"rope_parameters": {"rope_type": "dynamic", "factor": 1, "rope_theta": 5e4}},
    "yarn": {"rope_parameters": YARN},
    "yarn-factor-1": {"rope_parameters": {**YARN, "factor": 1}},
    "yarn-factor-null": {"rope_parameters": {**YARN, "factor": None}},
    "yarn-truncate-null": {"rope_parameters": {**YARN, "truncate": None}},
    "yarn-truncate-false": {"rope_parameters": {**YARN, "truncate": False}},
    "yarn-mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4}},
    "yarn-mscale-alone": {"rope_parameters": {**YARN, "mscale": 0.7}},
    "yarn-attention-factor": {"rope_parameters": {**YARN, "attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 1.4}},
    "yarn-betas": {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 0}},
    "yarn-betas-null": {"rope_parameters": {**YARN, "beta_fast": None, "beta_slow": None}},
    "yarn-original-outside": {"rope_parameters": YARN, "original_max_position_embeddings": 32},
    "yarn-original-missing": {"rope_parameters": without(YARN, "original_max_position_embeddings")},
    "llama3-factor-1": {"rope_parameters": {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64, "rope_theta": 3e4}},
    "longrope": lambda c: {"rope_parameters": {**LONG, **factors(c)}},
    "longrope-factor-1": lambda c: {"rope_parameters": {**LONG, **factors(c), "factor": 1}},
    "longrope-factor-null": lambda c: {"rope_parameters": {**LONG, **factors(c), "factor": None}},
    "partial": {"partial_rotary_factor": 0.5, "rope_theta": 2e4},
    "partial-one": {"partial_rotary_factor": 1.0, "rope_theta": 2e4},
    "partial-null": {"partial_rotary_factor": None, "rope_theta": 2e4},
    "partial-inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}},
    "partial-inside-and-outside": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
    "partial-linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4, "partial_rotary_factor": 0.5}},
    "by-type": lambda c: by_type(c, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}, {"rope_type": "default", "rope_theta": 2e4}),
    "by-type-no-type": lambda c: by_type(c, {"rope_theta": 5e4}, {"rope_theta": 2e4}),
    "by-type-no-theta": lambda c: by_type(c, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "default"}),
    "by-type-theta-outside": lambda c: by_type(c, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "default"}) and {**by_type(c, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "default"}), "rope_theta": 3e4},
    "by-type-truncate": lambda c: by_type(c, {**YARN, "truncate": False}, {"rope_type": "default", "rope_theta": 2e4}),
    "by-type-null": lambda c: by_type(c, {"rope_type": "default", "rope_theta": 5e4}, None),
    "by-type-beside-scaling": lambda c: by_type(c, {"rope_theta": 5e4}, {"rope_theta": 2e4}) and {**by_type(c, {"rope_theta": 5e4}, {"rope_theta": 2e4}), "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def turned(model):
    """What each layer is handed for positions 0 and 1."""
    found = {}

    def note(index):
        def hook(_, args, kwargs):
            found[index] = kwargs["position_embeddings"]
        return hook

    layers = model.base_model.layers
    hooks = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 7]]))
    for hook in hooks:
        hook.remove()
    result = []
    for index in range(len(layers)):
        cos, sin = (x.reshape(-1, x.shape[-1])[1].double() for x in found[index])
        half = len(cos) // 2
        # Both elements of a pair have the same angle: they stand half a head apart, or side by side, or as one.
        if torch.equal(cos[:half], cos[half:]) and torch.equal(sin[:half], sin[half:]):
            cos, sin = cos[:half], sin[:half]
        elif torch.equal(cos[::2], cos[1::2]) and torch.equal(sin[::2], sin[1::2]):
            cos, sin = cos[::2], sin[::2]
        scale = torch.hypot(cos, sin)
        result.append({"scale": round(float(scale.mean()), 7), "angles": [float(f"{a:.7g}") for a in torch.atan2(sin, cos)]})
    return result


def record(config):
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)), attn_implementation="eager").eval()
        return {"layers": turned(model)}
    except Exception as error:  # transformers' own refusals are of every type
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("cases", type=Path)
    arguments.add_argument("--into", type=Path, default=Path(__file__).parent / "rope")
    options = arguments.parse_args()
    logging.disable(logging.WARNING)
    options.into.mkdir(exist_ok=True)
    for case in CASES:
        base = json.loads((options.cases / case / "config.json").read_text())
        base = {k: v for k, v in base.items() if k not in ROPE_KEYS}
        rows = []
        for name, change in MUTATIONS.items():
            keys = change(base) if callable(change) else change
            if keys is None:
                continue
            rows.append({"name": name, "rope": keys, **record({**base, **keys})})
        lines = ",\n".join(json.dumps(row) for row in rows)
        (options.into / f"{case}.json").write_text("[\n" + lines + "\n]\n")
        print(case, sum("layers" in row for row in rows), "of", len(rows))


if __name__ == "__main__":
    main()
