#!/usr/bin/env python3
"""Record what transformers computes for a repository, as the golden that `hf2onnx verify` compares with.

    record.py REPO [--output FILE] [--prompt TEXT ...] [--text FILE] [--dtype float32] [--trust-remote-code]
    record.py REPO ... --dtype float16 [--trust-remote-code]      add to goldens how far transformers in that type is from them
    record.py --case NAME [NAME ...] [--into DIR]         make the tiny repositories of cases.py and record them
    record.py --list

REPO is a folder with config.json and safetensors weights, or with weights.json in their place. Install requirements.txt first.

The golden is a safetensors file:
    input_ids, attention_mask, position_ids   three rows, padded on the left; random ids unless --prompt gives texts
    logits                 of those rows, 0 where the mask is 0
    hidden_states_{i}      of row 0: the embedding, then each layer's output (the last one after the final norm)
    greedy_ids             row 0 with 16 greedy tokens; greedy_logits are the logits of each of those steps
    logits_steps, logits_chunks   of row 0 through the cache (10 tokens, then one by one; 10, then the rest), only
                           where transformers' cached run differs from its full pass by more than 1e-4
Its metadata says which versions ran, how far transformers agrees with itself (`checks`), and with --text the mean
negative log-likelihood of a file (eval_nll_per_token, eval_tokens, eval_window, eval_file).

--dtype float16 and bfloat16 leave the tensors as they are and add the metadata `errors_float16` and `errors_bfloat16`:
    {"computed": {SCENARIO: {"max": 0.002, "error": 0.001, "typical": 0.001} or a reason, ...}, "rounded": {...}}
transformers' own errors against its float32, by scenario of `hf2onnx verify` (prefill, batch-left, batch-right, decode,
chunks, batch-decode, greedy). halves.py says what is run and what the numbers are.
"""
import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.dont_write_bytecode = True
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import halves  # noqa: E402
import reference  # noqa: E402
import weights  # noqa: E402


def write(path, tensors, meta):
    """The golden file; metadata values that are not text are JSON."""
    meta = {"transformers": transformers.__version__, "torch": torch.__version__, **meta}
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
    # clone: tied or expanded tensors may share storage, which the format refuses
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path, metadata=header)
    os.chmod(path, 0o644)


@contextlib.contextmanager
def weights_of(repo):
    """A folder from which transformers loads the repository: made from the recipe where there are no weights."""
    with tempfile.TemporaryDirectory() as scratch:
        made = (repo / "weights.json").exists() and not any(f.name != "golden.safetensors" for f in repo.glob("*.safetensors"))
        if made:
            for file in repo.iterdir():
                (Path(scratch) / file.name).write_bytes(file.read_bytes())
            weights.restore(repo / "weights.json", scratch)
        yield Path(scratch) if made else repo


def record(repo, output, prompts=(), text=None, window=512, dtype="float32", trust=False, seed=0):
    """Write the golden of a repository; returns its metadata."""
    with weights_of(repo) as folder:
        model, report = reference.load(folder, trust, getattr(torch, dtype))
    config = model.config.get_text_config()
    pad = next((t for t in (config.pad_token_id, model.generation_config.pad_token_id) if t is not None), 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo, trust_remote_code=trust) if prompts or text else None
    if prompts:
        batch = reference.prompt_batch([tokenizer(p)["input_ids"] for p in prompts], pad)
    else:
        batch = reference.random_batch(reference.vocab_of(config), seed, pad)
    tensors, meta = reference.decoder(model, *batch)
    stored = json.loads((repo / "config.json").read_text())
    meta.update(kind="decoder", model_type=stored.get("model_type", ""), load_report=report, computed_in=dtype,
                dtype=stored.get("dtype") or stored.get("torch_dtype") or "float32")
    if text:
        tokens = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
        mean, count = reference.nll(model, tokens, window)
        meta.update(eval_file=text.name, eval_window=window, eval_tokens=count, eval_nll_per_token=mean)
    write(output, tensors, meta)
    return meta


def add_errors(repo, golden, dtype, trust=False):
    """Add transformers' errors in a half type to a golden; returns them. The tensors stay as they are, and the float32
    that the errors are measured against has to be theirs."""
    tensors = load_file(golden)
    with safe_open(golden, "pt") as file:
        meta = file.metadata()
    trust = trust and "auto_map" in json.loads((repo / "config.json").read_text())
    batch = [tensors[name] for name in ("input_ids", "attention_mask", "position_ids")]
    with weights_of(repo) as folder:
        load = lambda kind: reference.load(folder, trust, kind)[0]
        again = reference.full_pass(load(torch.float32), *batch).logits.float() * batch[1][..., None]
        if not reference.maxdiff(again, tensors["logits"]) <= 1e-6 * float(tensors["logits"].abs().max()):
            raise SystemExit(f"{golden}: float32 gives other logits here: install the versions that recorded it, or record it again")
        found = halves.errors(load, *batch, tensors.get("greedy_ids"), getattr(torch, dtype))
    write(golden, tensors, {**meta, f"errors_{dtype}": found})
    return found


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("repo", nargs="*", type=Path, help="the repository to record")
    ap.add_argument("--output", type=Path, help="default: golden.safetensors in the repository")
    ap.add_argument("--prompt", action="append", default=[], help="a row's text; the longest first")
    ap.add_argument("--seed", type=int, default=0, help="of the random ids, where there is no --prompt")
    ap.add_argument("--text", type=Path, help="also measure the negative log-likelihood of this file")
    ap.add_argument("--window", type=int, default=512, help="tokens scored at a time")
    ap.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"],
                    help="what transformers computes in; the half types measure their errors against the golden that is there")
    ap.add_argument("--trust-remote-code", action="store_true", help="run the repository's own code")
    ap.add_argument("--case", nargs="+", help="names in cases.py")
    ap.add_argument("--into", type=Path, default=Path(__file__).resolve().parent / "cases")
    ap.add_argument("--list", action="store_true", help="list the cases")
    args = ap.parse_args()
    if args.case or args.list:
        import cases
        import tiny
        for case in cases.CASES:
            if args.list:
                print(f"{case['name']:28} {case['model_type']:18} {case.get('dtype', 'float32')}")
            elif case["name"] in args.case:
                tensors, meta = tiny.make(case, args.into / case["name"])
                write(args.into / case["name"] / "golden.safetensors", tensors, meta)
                tiny.finish(case, args.into / case["name"])
                for dtype in ("float16", "bfloat16"):
                    add_errors(args.into / case["name"], args.into / case["name"] / "golden.safetensors", dtype, trust=True)
                print(case["name"], json.dumps({k: meta[k] for k in tiny.FINDINGS}))
        unknown = set(args.case or ()) - {c["name"] for c in cases.CASES}
        sys.exit(f"not in cases.py: {', '.join(sorted(unknown))}" if unknown else 0)
    if not args.repo:
        ap.error("a repository, --case or --list")
    for repo in args.repo:
        output = args.output or repo / "golden.safetensors"
        if args.dtype in ("float16", "bfloat16"):
            print(output, json.dumps(add_errors(repo, output, args.dtype, args.trust_remote_code)), flush=True)
        else:
            meta = record(repo, output, args.prompt, args.text, args.window, args.dtype, args.trust_remote_code, args.seed)
            print(output, json.dumps(meta), flush=True)


if __name__ == "__main__":
    main()
