#!/usr/bin/env python3
"""Write opsets/ort-cuda-kernels.json: which operators onnxruntime's CUDA provider has kernels for, by type.

    make_kernels.py            write the file
    make_kernels.py --check    exit 1 when the file is not what this script would write

The list is the provider's own: the kernels that it registers, in exactly this version, on a machine with a GPU:
    pip install onnxruntime-gpu==1.31.1

One kernel stands on a line, sorted by operator and version: operator, domain (only where it is not ONNX's), the opset
versions from and to which it holds (no end: none known), and for each of its type variables the types it takes.

What is left out: operators that nothing in src/lower writes, and versions and types that no target asks for.
"""
import argparse
import json
import re
import sys
from pathlib import Path

ONNXRUNTIME = "1.31.1"
OLDEST, NEWEST = 17, 23          # as in make.py
TYPES = ("float", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
CACHES = ("int8", "float8e4m3fn")  # also, for caches of keys and values
FOREVER = 2**31 - 1
HERE = Path(__file__).resolve().parent


def written():
    """The operators that lowering writes."""
    text = "\n".join(path.read_text() for path in sorted((HERE.parent / "src" / "lower").glob("*.rs")))
    names = re.findall(r'(?:Operator::(?:new|microsoft)|reduce|expert_call)\(\s*(?:op, )?"(\w+)"', text)
    # Named by a variable there: loops over functions.
    return set(names) | {"Cos", "Sin"}


def lines():
    """The lines of the file."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state
    if onnxruntime.__version__ != ONNXRUNTIME:
        sys.exit(f"onnxruntime {onnxruntime.__version__}, and this file is of {ONNXRUNTIME}")
    wanted, rows = written(), set()
    for kernel in state.get_all_opkernel_def():
        since, until = kernel.version_range
        domain = {"ai.onnx": ""}.get(kernel.domain, kernel.domain)
        newest = NEWEST if domain == "" else FOREVER
        if kernel.provider != "CUDAExecutionProvider" or kernel.op_name not in wanted:
            continue
        if since > newest or (domain == "" and until < OLDEST):
            continue
        asked = {name: TYPES + (CACHES if name == "T_CACHE" else ()) for name in kernel.type_constraints}
        types = {name: [t for t in asked[name] if f"tensor({t})" in found] for name, found in kernel.type_constraints.items()}
        if not all(types.values()):
            continue
        row = {"name": kernel.op_name, "since": since}
        if until < FOREVER:
            row["until"] = until
        if domain:
            row["domain"] = domain
        row["types"] = dict(sorted(types.items()))
        rows.add((row["name"], domain, since, json.dumps(row, separators=(",", ":"))))
    return "".join(line + "\n" for *_, line in sorted(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    path, text = HERE / "ort-cuda-kernels.json", lines()
    if parser.parse_args().check:
        sys.exit(0 if path.read_text() == text else f"{path.name} is not what this script writes")
    path.write_text(text)


if __name__ == "__main__":
    main()
