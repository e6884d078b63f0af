#!/usr/bin/env python3
"""onnxruntime-genai loads a built directory as it is and generates the expected tokens.

    check_genai.py DIR greedy.json

greedy.json is a list of {prompt, ids}: ids are the prompt's tokens and the greedy tokens after them. The prompts run
one at a time and then as one ragged batch, with the search options as genai_config.json has them.
"""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


def generate(model, prompts, new):
    """The tokens of each prompt with its continuation, and the first logits."""
    longest = max(len(p) for p in prompts)
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=longest + new, batch_size=len(prompts))
    generator = og.Generator(model, params)
    # a ragged batch is padded on the left with the pad token, as the tokenizer's own encode_batch does
    pad = json.loads((Path(sys.argv[1]) / "genai_config.json").read_text())["model"]["pad_token_id"]
    generator.append_tokens(np.array([[pad] * (longest - len(p)) + p for p in prompts], dtype=np.int32))
    logits = np.asarray(generator.get_logits())
    while not generator.is_done():
        generator.generate_next_token()
    out = []
    for row, prompt in enumerate(prompts):
        tokens = [int(t) for t in generator.get_sequence(row)][longest - len(prompt):]
        out.append(tokens[:len(prompt) + new])
    return out, logits


def main():
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    config = json.loads((folder / "genai_config.json").read_text())
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    vocabulary, wrong, prompts = config["model"]["vocab_size"], [], []
    new = min(len(c["ids"]) - len(tokenizer.encode(c["prompt"])) for c in cases)
    for case in cases:
        prompt = [int(t) for t in tokenizer.encode(case["prompt"])]
        prompts.append(prompt)
        if prompt != case["ids"][:len(prompt)]:
            wrong.append(f"{case['prompt']!r} is tokenised as {prompt}")
        (got,), logits = generate(model, [prompt], len(case["ids"]) - len(prompt))
        if got != case["ids"]:
            wrong.append(f"alone, {case['prompt']!r}: {got}, expected {case['ids']}")
        if logits.shape[-1] != vocabulary or not np.isfinite(logits).all() or int(logits.reshape(-1, vocabulary)[-1].argmax()) != case["ids"][len(prompt)]:
            wrong.append(f"logits of {case['prompt']!r}: shape {logits.shape}, finite {bool(np.isfinite(logits).all())}")
    batch, _ = generate(model, prompts, new)
    for case, prompt, got in zip(cases, prompts, batch):
        if got != case["ids"][:len(prompt) + new]:
            wrong.append(f"in a batch, {case['prompt']!r}: {got}, expected {case['ids']}")
    shared = config["search"].get("past_present_share_buffer")
    print(f"{len(cases)} prompts, {new} tokens each, alone and as a batch; past_present_share_buffer {shared}")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
