"""The rule of weights.json: weights that are drawn again, bit for bit, instead of being stored.

weights.json is a list of entries, one for each tensor: name, shape, dtype (torch's word), file, and either `values`
(literal elements) or seed, mean and scale. Element i of a drawn tensor, counted in row-major order, is
    f32(mean) + f32(scale) * f32(s(i) - 131070),   rounded to the tensor's dtype (nearest, ties to even),
where s(i) is the sum of the four 16-bit lanes of splitmix64(seed + (i + 1) * 0x9E3779B97F4A7C15), every operation
rounded to float32 on its own. Rows listed in zero_rows are then set to 0.

Only numpy is needed. tests/common/weights.rs is the same rule in Rust.
    python weights.py CASE_DIR OUTPUT_DIR      writes the safetensors files of a case
"""
import json
import math
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
         "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def splitmix64(seed, count):
    """The first `count` outputs of splitmix64 started at `seed`, as uint64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def encode(values, dtype):
    """Little-endian bytes of float32 values in `dtype`."""
    if dtype == "bfloat16":
        bits = np.asarray(values, "<f4").view("<u4")
        even = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
        return ((bits + even) >> np.uint32(16)).astype("<u2").tobytes()
    return np.asarray(values).astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def draw(entry):
    """The bytes of the tensor that an entry of weights.json describes."""
    if "values" in entry:
        floats = "float" in entry["dtype"] and entry["dtype"] != "float64"
        data = encode(np.array(entry["values"], np.float32 if floats else entry["dtype"]), entry["dtype"])
    else:
        bits = splitmix64(int(entry["seed"]), math.prod(entry["shape"]))
        lanes = sum(((bits >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.int64) for k in range(4))
        steps = np.float32(entry["scale"]) * (lanes - 131070).astype(np.float32)
        data = encode(np.float32(entry["mean"]) + steps, entry["dtype"])
    data = bytearray(data)
    for row in entry.get("zero_rows", ()):
        size = len(data) // entry["shape"][0]
        data[row * size:(row + 1) * size] = bytes(size)
    return bytes(data)


def tensor_seed(name, seed):
    """The seed of one tensor in a case whose own seed is `seed`."""
    return str((zlib.crc32(name.encode()) << 24) + seed)


def restore(recipe, into):
    """Write the safetensors files that a weights.json describes into the folder `into`."""
    files = {}
    for entry in json.loads(Path(recipe).read_text()):
        files.setdefault(entry["file"], []).append(entry)
    for file, entries in files.items():
        header, blocks, at = {"__metadata__": {"format": "pt"}}, [], 0
        for entry in sorted(entries, key=lambda e: e["name"]):
            blocks.append(draw(entry))
            header[entry["name"]] = {"dtype": CODES[entry["dtype"]], "shape": entry["shape"],
                                     "data_offsets": [at, at + len(blocks[-1])]}
            at += len(blocks[-1])
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        (Path(into) / file).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blocks))


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    restore(Path(sys.argv[1]) / "weights.json", sys.argv[2])
