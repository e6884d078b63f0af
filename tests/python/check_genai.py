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


def generate(model, batch, length):
    """What follows each row of the (right-padded) batch up to `length` tokens in all, and the first logits."""
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=length, batch_size=len(batch))
    generator = og.Generator(model, params)
    generator.append_tokens(batch)
    logits = np.asarray(generator.get_logits())
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(t) for t in generator.get_sequence(row)][batch.shape[1]:] for row in range(len(batch))], logits


def tokens_of(tokenizer, prompts):
    """The tokens as genai's own encode_batch gives them, padded on the right, as it wants them."""
    batch = tokenizer.encode_batch(prompts)
    return np.asarray(batch.as_numpy() if hasattr(batch, "as_numpy") else batch, dtype=np.int32)


def check_alone(model, tokenizer, case, vocabulary):
    """What is wrong with one prompt run by itself, and how many tokens the prompt has."""
    batch = tokens_of(tokenizer, [case["prompt"]])
    size = batch.shape[1]
    if batch[0].tolist() != case["ids"][:size]:
        yield f"{case['prompt']!r} is tokenised as {batch[0].tolist()}"
    (got,), logits = generate(model, batch, len(case["ids"]))
    if got != case["ids"][size:]:
        yield f"alone, {case['prompt']!r}: {got}, expected {case['ids'][size:]}"
    last = logits.reshape(-1, logits.shape[-1])[-1]
    if len(last) != vocabulary or not np.isfinite(logits).all() or int(last.argmax()) != case["ids"][size]:
        yield f"logits of {case['prompt']!r}: shape {logits.shape}, largest at {int(last.argmax())}"


def check_batch(model, tokenizer, cases):
    batch = tokens_of(tokenizer, [c["prompt"] for c in cases])
    sizes = [tokens_of(tokenizer, [c["prompt"]]).shape[1] for c in cases]
    new = [c["ids"][size:] for c, size in zip(cases, sizes)]
    got, _ = generate(model, batch, batch.shape[1] + max(map(len, new)))
    for case, have, want in zip(cases, got, new):
        if have[:len(want)] != want:
            yield f"in a batch, {case['prompt']!r}: {have}, expected {want}"


def main():
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    config = json.loads((folder / "genai_config.json").read_text())
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    wrong = [w for c in cases for w in check_alone(model, tokenizer, c, config["model"]["vocab_size"])]
    wrong += check_batch(model, tokenizer, cases)
    shared = config["search"].get("past_present_share_buffer")
    print(f"{len(cases)} prompts, alone and as one ragged batch; past_present_share_buffer {shared}")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
