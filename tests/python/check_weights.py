#!/usr/bin/env python3
"""Compare restored cases with golden/weights.py: check_weights.py CASE_DIR RESTORED_DIR [CASE_DIR RESTORED_DIR ...]"""
import json
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "golden"))
import weights  # noqa: E402


def read(path):
    """{name: (dtype, shape, bytes)} of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[8 + size + t["data_offsets"][0]:8 + size + t["data_offsets"][1]])
            for name, t in header.items()}


def main():
    wrong, count = [], 0
    for case, restored in zip(sys.argv[1::2], sys.argv[2::2]):
        recipe, files = json.loads((Path(case) / "weights.json").read_text()), {}
        for entry in recipe:
            if entry["file"] not in files:
                files[entry["file"]] = read(Path(restored) / entry["file"])
            want = (weights.CODES[entry["dtype"]], entry["shape"], weights.draw(entry))
            wrong += [f"{case}: {entry['name']}"] * (files[entry["file"]].pop(entry["name"], None) != want)
            count += 1
        wrong += [f"{case}: {file} has {name} as well" for file, rest in files.items() for name in rest]
    print(f"{count} tensors compared")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
