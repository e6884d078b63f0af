"""The steps of tests/cuda/run.sh: each case prints one JSON line, and is not run again when its line is there.

    info    the GPU, driver, libraries, and the memory's bandwidth
    golden  every golden case in every float type: built, verified, every node on the provider; beside transformers' own error
    kjv     40 greedy tokens of the trained model in each float type; a first difference is shown with the reference's margin
    cache   the trained model with caches in int8 and fp8: verified, its KL from float on the text it was kept from, and greedy tokens
    make    random checkpoints of the shapes, and their builds
    speed   prefill of 2,048 tokens, decode at 1, 512 and 4,096 tokens of past, load time, memory
    torch   the same by transformers with a static cache and torch.compile

PROVIDER, TARGET, DTYPES (f16,bf16,f32), CACHES (int8,fp8), MODELS, QUANT, PADDING, POSITIONS, JOBS, HF2ONNX, ORT and GENAI (NAME=DIR,...; NAME as in `speed`, for example
llama-3.2-1b-int4) are taken from the environment.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = ["info", "golden", "kjv", "cache", "make", "speed", "torch"]
CACHES = os.environ.get("CACHES", "int8,fp8").split(",")
PROVIDER = os.environ.get("PROVIDER", "cuda")
TARGET = os.environ.get("TARGET", "ort-cuda")
DTYPES = os.environ.get("DTYPES", "f16,bf16,f32").split(",")
GREEDY = 40


class Run:
    """Where things are, and what is known already."""

    def __init__(self, arguments):
        self.work = arguments.work
        self.only = arguments.only.split(",") if arguments.only else None
        self.ends = time.monotonic() + arguments.budget
        self.results = self.work / "results.jsonl"
        self.lock = threading.Lock()
        self.left = []
        self.work.mkdir(parents=True, exist_ok=True)
        lines = self.results.read_text().splitlines() if self.results.exists() and not arguments.again else []
        self.known = {key(line) for line in map(json.loads, lines) if "error" not in line}

    def place(self, name, *others):
        """What join unpacked, or the tree's own."""
        joined = self.work / "program" / name
        return next((path for path in (joined, *others) if path.exists()), others[-1])

    @property
    def golden(self):
        return self.place("golden", ROOT / "golden")

    def program(self):
        own = os.environ.get("HF2ONNX")
        return own or str(self.place("hf2onnx", ROOT / "target/release/hf2onnx", ROOT / "target/debug/hf2onnx"))

    def runtime(self):
        """The options of every command that runs a model."""
        library = os.environ.get("ORT") or (self.work / "libs" if (self.work / "libs").exists() and PROVIDER == "cuda" else None)
        return ["--provider", PROVIDER] + (["--runtime", str(library)] if library else [])

    def call(self, *arguments):
        """Runs the program: its JSON, or an exception with its words."""
        done = subprocess.run([self.program(), "--json", *map(str, arguments)], capture_output=True, text=True)
        try:
            value = json.loads(done.stdout) if done.stdout.strip() else {}
        except ValueError:
            value = {}
        # verify prints its report and fails: both count.
        if done.returncode and not value:
            raise RuntimeError(words(done.stderr))
        return value, words(done.stderr) if done.returncode else None

    def case(self, line, work):
        """One line: `work` returns what it found. A failure is a line with `error`, and is run again another time."""
        if key(line) in self.known or (self.only and not any(str(value) in self.only for value in line.values())):
            return
        if time.monotonic() > self.ends:
            self.left.append(" ".join(key(line)))
            return
        begun = time.monotonic()
        try:
            line |= work()
        except Exception as error:  # whatever it is, the other cases are worth running
            line["error"] = f"{type(error).__name__}: {error}"[-600:]
        line["seconds"] = round(time.monotonic() - begun, 2)
        self.print(line)

    def print(self, line):
        text = json.dumps(line)
        with self.lock:
            print(text, flush=True)
            with self.results.open("a") as file:
                file.write(text + "\n")


def key(line):
    return tuple(str(line[name]) for name in ("step", "model", "case", "dtype", "batch", "what") if name in line)


def words(stderr):
    """The error of the program in one line."""
    for line in reversed(stderr.splitlines()):
        try:
            error = json.loads(line)["error"]
            return f"{error['code']}: {error['subject']}: {error['found']}"
        except (ValueError, KeyError, TypeError):
            continue
    return stderr.strip()[-300:]


def info(run):
    def find():
        smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.memory,power.limit", "--format=csv,noheader"]
        found = {"gpu": subprocess.run(smi, capture_output=True, text=True).stdout.strip() if shutil.which(smi[0]) else None}
        report, error = run.call("runtime", *run.runtime())
        found |= {"used": report.get("used"), "driver": report["cuda"]["driver"], "missing": report["cuda"]["missing"]}
        found["libraries"] = {library["name"]: library["version"] for library in report["cuda"]["libraries"]}
        found["runtime_error"] = error
        try:
            import torch_speed
            found |= torch_speed.machine()
        except ImportError as missing:
            found["torch"] = f"none: {missing}"
        return found
    run.case({"step": "info", "what": "machine"}, find)


def restore(run, case):
    """A repository with the weights of a case."""
    sys.path.insert(0, str(run.golden))
    import weights
    repo = run.work / "cases" / case.name
    if not repo.exists():
        fresh = run.work / "cases" / f".{case.name}-{os.getpid()}"
        fresh.mkdir(parents=True, exist_ok=True)
        weights.restore(case / "weights.json", fresh)
        for file in case.iterdir():
            if file.is_file() and file.name != "weights.json":
                shutil.copy(file, fresh)
        fresh.rename(repo)
    return repo


def build(run, repo, out, dtype, *more):
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    run.call("build", repo, "--output", out, "--target", TARGET, "--dtype", dtype, *more)


def verify_case(run, case, dtype):
    repo, out = restore(run, case), run.work / "built" / f"{case.name}-{dtype}"
    template = ["--template", case / "template.toml"] if (case / "template.toml").exists() else []
    build(run, repo, out, dtype, *template)
    report, error = run.call("verify", out, "--golden", repo / "golden.safetensors", "--strict-provider", "--threads", 2,
                             *run.runtime())
    shutil.rmtree(out)
    placement = report.get("placement") or {}
    count = lambda name: {f"{o['operator']} ({o['provider']})": o["count"] for o in placement.get(name, [])}
    scenarios = report["scenarios"]
    found = {
        "holds": report["holds"], "worst": max((s["max"] for s in scenarios if s.get("max") is not None), default=None),
        "tolerance": report["tolerance"], "failed": [s["scenario"] for s in scenarios if s["verdict"] == "fails"],
        "nodes": placement.get("nodes"), "elsewhere": count("elsewhere"), "shapes": count("shapes"), "copies": count("copies"),
        # Whatever the report says of each, transformers' own error in this type with it.
        "scenarios": {s["scenario"]: {k: v for k, v in s.items() if k not in ("scenario", "positions")} for s in scenarios},
    }
    divergence = report.get("divergence")
    found |= {"divergence": divergence["message"]} if divergence else {}
    # A model that does not hold is a finding; what kept it from being judged is an error.
    return found | ({"refused": error} if error else {})


def golden(run):
    support = tomllib.loads((run.golden / "support.toml").read_text())
    cases = sorted(path for path in (run.golden / "cases").iterdir() if path.is_dir())
    named = [case for case in cases if TARGET in support.get(case.name, {}).get("targets", [])]
    jobs = int(os.environ.get("JOBS", max(1, (os.cpu_count() or 2) // 2)))
    todo = [(case, dtype) for dtype in DTYPES for case in (named or cases)]
    for case in {case for case, _ in todo if not run.only or case.name in run.only}:
        restore(run, case)
    with ThreadPoolExecutor(jobs) as pool:
        for case, dtype in todo:
            line = {"step": "golden", "case": case.name, "dtype": dtype, "target": TARGET, "provider": PROVIDER}
            pool.submit(run.case, line, lambda case=case, dtype=dtype: verify_case(run, case, dtype))


def margin(repo, prompt, ids, step, pair):
    """How far apart the reference has two tokens' logits at a step, relative to the largest: float32, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(repo, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(repo)(prompt, return_tensors="pt").input_ids[0].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([tokens + ids[:step]])).logits[0, -1]
    return float((logits[pair[0]] - logits[pair[1]]) / logits.abs().max())


def continued(run, out, text):
    """The tokens that follow a prompt, those of the reference, and how many of the first are equal."""
    found, error = run.call("generate", out, "--prompt", text["prompt"], "--max-new-tokens", GREEDY, *run.runtime())
    if error:
        raise RuntimeError(error)
    got, start = found["generated"]["ids"], len(found["generated"]["prompt_ids"])
    want = text["ids"][start:start + GREEDY]
    return got, want, next((k for k, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))


def kjv(run):
    repo = run.golden / "kjv-llama"
    texts = json.loads((repo / "greedy.json").read_text())

    def compare(number, text, dtype):
        out = run.work / "built" / f"kjv-{dtype}-{number}"
        build(run, repo, out, dtype)
        try:
            got, want, same = continued(run, out, text)
        finally:
            shutil.rmtree(out)
        result = {"prompt": text["prompt"], "equal": same, "of": len(want), "holds": same == len(want)}
        if same < min(len(got), len(want)):
            result["tokens"] = [want[same], got[same]]
            result["margin"] = margin(repo, text["prompt"], want, same, result["tokens"])
        return result

    for dtype in DTYPES:
        for number, text in enumerate(texts):
            line = {"step": "kjv", "case": number, "dtype": dtype, "target": TARGET, "provider": PROVIDER}
            run.case(line, lambda number=number, text=text, dtype=dtype: compare(number, text, dtype))


def cache(run):
    """Prompts, padding and single tokens on caches in 8 bits, which float32 has not on a GPU."""
    repo = run.golden / "kjv-llama"
    text = json.loads((repo / "greedy.json").read_text())[0]

    def check(kind, dtype):
        out = run.work / "built" / f"kjv-{dtype}-{kind}"
        calibration = run.place("calibration.txt", ROOT / "tests/calibration.txt")
        build(run, repo, out, dtype, "--kv-cache", kind, "--calibrate", calibration)
        report, error = run.call("verify", out, "--golden", repo / "golden.safetensors", "--strict-provider", *run.runtime())
        try:
            _, want, equal = continued(run, out, text)
        finally:
            shutil.rmtree(out)
        result = {"holds": report["holds"], "cost": report.get("cost"), "equal": equal, "of": len(want),
                  "failed": [s["scenario"] for s in report["scenarios"] if s["verdict"] == "fails"]}
        return result | ({"refused": error} if error else {})

    for dtype in [dtype for dtype in DTYPES if dtype != "f32" or TARGET == "ort-cpu"]:
        for kind in CACHES:
            line = {"step": "cache", "case": kind, "dtype": dtype, "target": TARGET, "provider": PROVIDER}
            run.case(line, lambda kind=kind, dtype=dtype: check(kind, dtype))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help=" ".join(STEPS))
    parser.add_argument("--work", type=Path, default=ROOT / "target/cuda")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no case is begun")
    parser.add_argument("--only", help="cases or models, with commas between")
    parser.add_argument("--again", action="store_true", help="also what has a line already")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    run = Run(arguments)
    import speed
    steps = {"info": info, "golden": golden, "kjv": kjv, "cache": cache, "make": speed.make, "speed": speed.speed, "torch": speed.by_torch}
    for step in arguments.steps or ["info", "golden", "kjv", "cache"]:
        steps[step](run)
    if run.left:
        print(f"{len(run.left)} cases are left for another call: {'; '.join(run.left[:5])} ...", file=sys.stderr)
    if out := os.environ.get("OUT"):
        shutil.copy(run.results, Path(out) / "results.jsonl")


if __name__ == "__main__":
    main()
