"""Speed of built directories in one client, onnxruntime-genai, in turns: ours beside its own builder's.

    python benches/clients.py NAME=DIR NAME=DIR [--past 0,1024,4096] [--prompt 128] [--new 16] [--rounds 3]

Prints, for each directory, the time to load, prompt tokens per second, new tokens per second behind each number of past
tokens with the share of the memory's bandwidth that their weights take, and each figure's ratio to the first directory's.
Every figure is the best of the rounds: what else the machine does only ever slows them down.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai


def directory(text):
    name, _, path = text.rpartition("=")
    return name or Path(path).name, Path(path)


def options_of_command_line():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("directories", nargs="+", type=directory, metavar="NAME=DIR")
    parser.add_argument("--past", default="0,1024,4096", help="tokens before those that are timed [default: %(default)s]")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens that are timed [default: %(default)s]")
    parser.add_argument("--new", type=int, default=16, help="new tokens that are timed [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, default=34, metavar="GB/S", help="of the memory [default: %(default)s]")
    return parser.parse_args()


def weight_bytes(path):
    """What a step reads: everything beside the graph, the table of embeddings too where it is the head as well."""
    config = json.loads((path / "genai_config.json").read_text())
    graph = path / config["model"]["decoder"]["filename"]
    return sum(file.stat().st_size for file in graph.parent.glob(graph.name + "*data*"))


def tokens(count):
    return np.random.default_rng(0).integers(10, 2000, size=(count,)).astype(np.int32)


def generator(model, length):
    params = genai.GeneratorParams(model)
    # As long as they may get, so that both fill the same buffers; nothing ends early.
    params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
    return genai.Generator(model, params)


def prompt_speed(model, options):
    running = generator(model, options.prompt + 2)
    start = time.perf_counter()
    running.append_tokens(tokens(options.prompt))
    return options.prompt / (time.perf_counter() - start)


def step_speed(model, past, options):
    running = generator(model, past + options.new + 4)
    # In pieces: a prompt of thousands at once takes memory for all its logits.
    for start in range(0, max(past, 1), 512):
        running.append_tokens(tokens(max(past, 1))[start:start + 512])
    running.generate_next_token()
    running.generate_next_token()
    start = time.perf_counter()
    for _ in range(options.new):
        running.generate_next_token()
    return options.new / (time.perf_counter() - start)


def main():
    options = options_of_command_line()
    pasts = [int(past) for past in options.past.split(",")]
    models, best = {}, {}

    def keep(name, what, value):
        best.setdefault(name, {})[what] = max(value, best.get(name, {}).get(what, 0))

    for name, path in options.directories:
        start = time.perf_counter()
        models[name] = genai.Model(str(path))
        keep(name, "load", 1 / (time.perf_counter() - start))
    for _ in range(options.rounds):
        for name, model in models.items():
            keep(name, "prefill", prompt_speed(model, options))
        for past in pasts:
            for name, model in models.items():
                keep(name, past, step_speed(model, past, options))
    first = best[options.directories[0][0]]
    for name, path in options.directories:
        size, found = weight_bytes(path), best[name]
        print(f"{name}: {size / 1e6:.0f} MB, loads in {1 / found['load']:.2f} s")
        for what in ["prefill", *pasts]:
            title = f"prefill of {options.prompt}" if what == "prefill" else f"decode behind {what}"
            share = "" if what == "prefill" else f", {size * found[what] / options.bandwidth / 1e9:.0%} of the bandwidth"
            print(f"    {title:<20} {found[what]:7.1f} tokens/s, {found[what] / first[what]:.2f} of the first{share}")


if __name__ == "__main__":
    main()
