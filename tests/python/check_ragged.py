#!/usr/bin/env python3
"""A ragged batch in onnxruntime-genai gives every row what the row gives alone.

    check_ragged.py DIR [DIR ...]

The client pads shorter rows on the right and goes on behind the padding. Random prompts of 6, 13 and 24 tokens, 8 steps;
prints the largest difference of the logits for each directory, relative to the largest logit, and fails above 1e-5.
"""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

NEW = 8


def generate(model, rows, pad):
    """Logits of each step, and the tokens that each row chose."""
    longest = max(map(len, rows))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + NEW + 1, min_length=longest + NEW, do_sample=False, batch_size=len(rows))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([row + [pad] * (longest - len(row)) for row in rows], np.int32))
    logits = []
    for _ in range(NEW):
        logits.append(np.array(generator.get_logits()).reshape(len(rows), -1))
        generator.generate_next_token()
    return logits, [list(map(int, generator.get_sequence(i)))[longest:] for i in range(len(rows))]


def worst(folder):
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    pad = config.get("pad_token_id", 0)
    rows = [np.random.default_rng(n).integers(10, config["vocab_size"] - 20, n).tolist() for n in (6, 13, 24)]
    model = og.Model(str(folder))
    together, chosen = generate(model, rows, pad)
    found = 0.0
    for i, row in enumerate(rows):
        alone, own = generate(model, [row], pad)
        for step in range(NEW):
            difference = np.abs(alone[step][0] - together[step][i]).max() / np.abs(alone[step][0]).max()
            found = max(found, float(difference))
            if own[0][step] != chosen[i][step]:        # a near tie: what follows has other tokens before it
                break
    return found


def main():
    found = {folder: worst(Path(folder)) for folder in sys.argv[1:]}
    for folder, difference in found.items():
        print(f"{Path(folder).name}: {difference:.1e}")
    sys.exit("\n".join(f"{folder}: {d:.1e}" for folder, d in found.items() if not d < 1e-5) or 0)


if __name__ == "__main__":
    main()
