"""Times `hf2onnx build` beside a plain copy of what it writes and beside other exporters, in one interleaved run.

Only the standard library is needed. benches/build.sh builds the program and starts this:
    python3 benches/build.py --scratch DIR        makes the checkpoints in DIR, or takes those that are there

One round runs each contender of a row once, in turn; the first round is thrown away, because the first pages that a
virtual machine writes cost more than all later ones. Before each run everything that is written is brought to disk, so
that nobody pays for another. A build waits for the disk before its output appears, and cp does not: cp is timed alone
and with an fsync of its files behind it, and bars are judged by the latter.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GB, MB = 10**9, 10**6
# Bytes of real data; the others are holes.
CHECKPOINTS = {"llama-3.2-1b": 2.48 * GB, "llama-3.1-8b": 16.1 * GB, "llama-3.1-70b": 0, "deepseek-v3": 0}


@dataclass
class Row:
    """What is built, and what it may cost."""
    name: str
    model: str
    arguments: list
    writes: float = 0       # bytes of the output
    seconds: float = None   # bar of the median wall time
    copies: float = None    # bar of the median wall time, in those of cp with fsync
    peers: float = None     # bar of the median wall time, in those of the fastest peer
    memory: float = None    # bar of the peak, in bytes


ROWS = [
    Row("link-1b", "llama-3.2-1b", ["--weights", "link"], seconds=0.2, memory=60 * MB),
    Row("link-70b", "llama-3.1-70b", ["--weights", "link"], seconds=1, memory=100 * MB),
    Row("link-671b", "deepseek-v3", ["--weights", "link"], seconds=10, memory=400 * MB),
    Row("pack-f32-1b", "llama-3.2-1b", ["--weights", "pack"], 4.95 * GB, copies=1.3, peers=0.5, memory=400 * MB),
    Row("pack-1b", "llama-3.2-1b", ["--weights", "pack", "--dtype", "bf16"], 2.48 * GB, copies=1.2, memory=400 * MB),
    Row("pack-8b", "llama-3.1-8b", ["--weights", "pack", "--dtype", "bf16"], 16.1 * GB, copies=1.2, memory=400 * MB),
    Row("graph-8b", "llama-3.1-8b", ["--dry-run"], seconds=0.1),
]
# Packing a larger model may take this much more memory.
MEMORY_ROWS, MEMORY_GROWTH = ("pack-1b", "pack-8b"), 0.05


@dataclass
class Sample:
    """One run. Bytes by calls leave out mapped reads, bytes of the disk what the page cache answers. No peak is below
    that of the Python which starts the program, some 17 MB."""
    wall: float
    user: float = None
    system: float = None
    peak: float = None
    read: int = None
    written: int = None
    disk_read: int = None
    disk_written: int = None
    synced: float = None    # wall with an fsync of what was written


def io_counters(pid):
    """What Linux counts of a process that has ended and is not yet reaped; nothing elsewhere."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        text = Path(f"/proc/{pid}/io").read_text()
    except (AttributeError, OSError):
        return {}
    counters = dict(line.split(": ") for line in text.splitlines())
    names = {"read": "rchar", "written": "wchar", "disk_read": "read_bytes", "disk_written": "write_bytes"}
    return {ours: int(counters[theirs]) for ours, theirs in names.items() if theirs in counters}


def measure(command):
    """Runs a command. A command that fails ends the bench with its words."""
    if hasattr(os, "sync"):
        os.sync()
    with tempfile.TemporaryFile() as words:
        start = time.perf_counter()
        child = subprocess.Popen([str(part) for part in command], stdout=words, stderr=words)
        if hasattr(os, "wait4"):
            counters = io_counters(child.pid)
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
            # Kibibytes, but bytes on macOS.
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            sample = Sample(wall, usage.ru_utime, usage.ru_stime, peak, **counters)
        else:
            child.wait()
            sample = Sample(time.perf_counter() - start)
        if child.returncode != 0:
            words.seek(0)
            tail = words.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(map(str, command))}: exit code {child.returncode}\n{tail}")
        return sample


def copy(files, into):
    """Runs cp, then waits until the copies are on the disk."""
    into.mkdir()
    command = ["cp", *files, into]
    if shutil.which("cp") is None:
        program = "import shutil, sys; [shutil.copy(name, sys.argv[-1]) for name in sys.argv[1:-1]]"
        command = [sys.executable, "-c", program, *files, into]
    sample = measure(command)
    start = time.perf_counter()
    for name in into.iterdir():
        with open(name, "r+b") as file:
            os.fsync(file.fileno())
    sample.synced = sample.wall + time.perf_counter() - start
    return sample


def checkpoint(model, options):
    """The folder of a checkpoint, made if it is not there; nothing if it does not fit."""
    folder, size = options.scratch / model, CHECKPOINTS[model]
    if folder.is_dir():
        return folder
    if not fits(size, options, model):
        return None
    print(f"making {folder}", file=sys.stderr)
    command = [options.binary, "dev", "synth", ROOT / "benches" / "configs" / f"{model}.json", "--output", folder]
    measure(command + ([] if size else ["--sparse"]))
    return folder


def fits(size, options, name):
    """True if so many bytes more may be written."""
    room = min(shutil.disk_usage(options.scratch).free, options.disk * GB)
    if size < room:
        return True
    print(f"{name}: skipped, it takes {size / GB:.0f} GB of disk and {room / GB:.0f} GB may be used", file=sys.stderr)
    return False


def arguments(row, options):
    """The row's arguments for the program at hand; nothing if it lacks one of them."""
    help_text = subprocess.run([options.binary, "build", "--help"], capture_output=True, text=True, check=True).stdout
    wanted = list(row.arguments)
    if wanted[:2] == ["--weights", "pack"] and "--weights" not in help_text:
        # A program without the option only packs.
        wanted = wanted[2:]
    missing = [part for part in wanted if part.startswith("--") and part not in help_text]
    if "bf16" in wanted and "bf16" not in help_text:
        missing.append("--dtype bf16")
    if missing:
        print(f"{row.name}: skipped, this hf2onnx has no {', '.join(missing)}", file=sys.stderr)
        return None
    return wanted


def importable(python, modules):
    """True if an interpreter has all of these modules."""
    check = f"import importlib.util, sys; sys.exit(any(map(lambda n: not importlib.util.find_spec(n), {modules})))"
    return subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0


def peer_commands(row, repo, place, options):
    """Other exporters that are installed, and how each makes what the row makes."""
    if row.peers is None:
        return {}
    # They insist on a tokenizer; without one of the checkpoint's own, which one makes no difference to the weights.
    theirs = place / "peer-repository"
    theirs.mkdir()
    for file in repo.iterdir():
        os.symlink(file.resolve(), theirs / file.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (theirs / name).exists():
            shutil.copy(ROOT / "golden" / "kjv-llama" / name, theirs)
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", theirs, "-p", "fp32", "-e", "cpu", "-c", place / "cache"]
    # What its `mobius` command runs.
    mobius = ["-c", "from mobius.__main__ import main; main()", "build", "--config", theirs, "--dtype", "f32", "--ep", "cpu"]
    known = {
        "onnxruntime-genai": (["onnxruntime_genai", "onnx_ir", "onnx"], lambda out: [*builder, "-o", out]),
        "mobius": (["mobius", "onnx_ir", "onnxscript"], lambda out: [*mobius, out]),
    }
    commands = {}
    for name, (modules, command) in known.items():
        if importable(options.peers, [*modules, "torch", "transformers"]):
            commands[name] = lambda out, command=command: [options.peers, *command(out)]
        else:
            print(f"{row.name}: without {name}, {options.peers} has not all that it imports", file=sys.stderr)
    return commands


def contend(row, repo, options):
    """All samples of a row's contenders, by name."""
    wanted = arguments(row, options)
    if wanted is None:
        return None
    samples = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch) as place:
        place = Path(place)
        peers = peer_commands(row, repo, place, options)
        for number in range(options.rounds + 1):
            out, copied = place / "out", place / "copy"
            round_ = {"hf2onnx": measure([options.binary, "build", repo, "--output", out, *wanted])}
            if row.writes:
                round_["cp"] = copy(sorted(out.glob("onnx/*.onnx_data*")), copied)
                shutil.rmtree(copied)
            shutil.rmtree(out, ignore_errors=True)
            for name, command in peers.items():
                round_[name] = measure(command(out))
                shutil.rmtree(out)
            for name, sample in round_.items() if number else ():
                samples.setdefault(name, []).append(sample)
    return samples


def middle(samples, field):
    """The median of what is known of a field."""
    values = [getattr(sample, field) for sample in samples if getattr(sample, field) is not None]
    return statistics.median(values) if values else None


def shown(value, unit=1, digits=2):
    return "-" if value is None else f"{value / unit:.{digits}f}"


HEAD = ["row", "contender", "wall s (min / median)", "+fsync s (median)", "user s", "system s", "peak MB",
        "read / written GB", "on disk GB", "hf2onnx in these"]


def lines(row, samples):
    """The row's lines of the table."""
    own = middle(samples["hf2onnx"], "wall")
    for name, runs in samples.items():
        wall, synced = middle(runs, "wall"), middle(runs, "synced")
        ratio = "" if name == "hf2onnx" else f"{own / wall:.2f}" + (f" ({own / synced:.2f} with fsync)" if synced else "")
        yield [row.name, name, f"{min(run.wall for run in runs):.3f} / {wall:.3f}", shown(synced, digits=3),
               shown(middle(runs, "user")), shown(middle(runs, "system")),
               shown(max((run.peak for run in runs if run.peak), default=None), MB, 0),
               f"{shown(middle(runs, 'read'), GB)} / {shown(middle(runs, 'written'), GB)}",
               f"{shown(middle(runs, 'disk_read'), GB)} / {shown(middle(runs, 'disk_written'), GB)}", ratio]


def verdicts(row, samples):
    """Each bar of a row, what was measured, and whether it is met."""
    runs = samples["hf2onnx"]
    wall, peak = middle(runs, "wall"), max((run.peak for run in runs if run.peak), default=None)
    peers = [middle(samples[name], "wall") for name in samples if name not in ("hf2onnx", "cp")]
    if row.seconds is not None:
        yield f"{wall:.3f} s", f"{row.seconds} s", wall <= row.seconds
    if row.copies is not None and "cp" in samples:
        ratio = wall / middle(samples["cp"], "synced")
        yield f"{ratio:.2f} x cp with fsync", f"{row.copies} x", ratio <= row.copies
    if row.peers is not None and peers:
        ratio = wall / min(peers)
        yield f"{ratio:.2f} of the faster peer's time", f"{row.peers}", ratio <= row.peers
    if row.memory is not None and peak is not None:
        yield f"{peak / MB:.0f} MB at most", f"{row.memory / MB:.0f} MB", peak <= row.memory


def memory_verdict(results):
    """How the peak grows with the model."""
    if any(name not in results for name in MEMORY_ROWS):
        return
    small, large = (max((run.peak or 0) for run in results[name]["hf2onnx"]) for name in MEMORY_ROWS)
    if small:
        growth = large / small - 1
        bar = f"{MEMORY_GROWTH:.0%} more"
        yield f"{growth:+.1%} of memory from {MEMORY_ROWS[0]} to {MEMORY_ROWS[1]}", bar, growth < MEMORY_GROWTH


def table(rows):
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def options_of_command_line():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--scratch", type=Path, help="where checkpoints are made and kept [default: a temporary folder]")
    parser.add_argument("--rounds", type=int, default=5, help="after the one that is thrown away")
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS), help="which [default: %(default)s]")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="an interpreter that has the peers")
    parser.add_argument("--disk", type=float, default=1e6, metavar="GB", help="most disk that may be taken at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    program = ROOT / "target" / "release" / ("hf2onnx.exe" if os.name == "nt" else "hf2onnx")
    parser.add_argument("--binary", type=Path, default=program)
    options = parser.parse_args()
    unknown = set(options.rows.split(",")) - {row.name for row in ROWS}
    if unknown or options.rounds < 1:
        parser.error(f"no row {', '.join(unknown)}" if unknown else "at least one round is wanted")
    return options


def run(options):
    results, shown_rows, judged = {}, [HEAD], []
    for row in (row for row in ROWS if row.name in options.rows.split(",")):
        # The output and its copy, or a peer's temporary files.
        repo = checkpoint(row.model, options) if fits(2 * row.writes, options, row.name) else None
        samples = contend(row, repo, options) if repo else None
        if samples:
            results[row.name] = samples
            shown_rows.extend(lines(row, samples))
            judged.extend((row.name, *verdict) for verdict in verdicts(row, samples))
    judged.extend(("memory", *verdict) for verdict in memory_verdict(results))
    print(table(shown_rows))
    if judged:
        print()
        print(table([[name, found, f"bar {bar}", "met" if met else "MISSED"] for name, found, bar, met in judged]))
    if options.json:
        rows = {name: {who: [asdict(run) for run in runs] for who, runs in by.items()} for name, by in results.items()}
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def main():
    options = options_of_command_line()
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
        return run(options)
    with tempfile.TemporaryDirectory(prefix="hf2onnx-bench-") as folder:
        options.scratch = Path(folder)
        return run(options)


if __name__ == "__main__":
    main()
