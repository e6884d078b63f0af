#!/usr/bin/env python3
"""Cut the quantised golden cases down to the first inputs of the target `encoding`.

    encoding_seeds.py

For each case two files in corpus/encoding, in the framing of src/encoding.rs: `file-CASE`, one module of the checkpoint as
a safetensors file that is read on disk too, and `list-CASE`, two modules as a list of tensors with little data,
of which nothing is changed.
Needs nothing but Python's own library, and writes the same bytes each time.
"""
import json
import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAYER = "model.layers.0."
# The smallest module that the case quantises, where that is not k_proj.
SMALLEST = {
    "awq": "mlp.up_proj",
    "fbgemm": "mlp.up_proj",
    "gptq-v2": "mlp.up_proj",
    "mxfp4": "mlp.experts.down_proj",
}
KEPT = ("model_type", "dtype", "torch_dtype", "quantization_config", "compression_config")
# Larger tensors of a list get what is left of the data, as they would get any other.
SMALL, REST = 256, 64


def tensors(path):
    """Name, type, shape and bytes of each tensor."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    for name, tensor in sorted(header.items()):
        begin, end = tensor["data_offsets"]
        yield name, tensor["dtype"], tensor["shape"], data[start + begin : start + end]


def configuration(case, modules):
    """What says how the weights are stored, without other modules and with the files beside it."""
    config = json.loads((case / "config.json").read_text())
    config = {key: config[key] for key in KEPT if key in config}
    for name in ("quantize_config.json", "hf_quant_config.json", "quanto_qmap.json"):
        if (case / name).exists():
            config[name] = json.loads((case / name).read_text())
    if "quanto_qmap.json" in config:
        qmap = config["quanto_qmap.json"]
        config["quanto_qmap.json"] = {name: kind for name, kind in qmap.items() if name.startswith(modules)}
        weights = tensors(case / "expected.safetensors")
        config["shapes"] = {name: shape for name, _, shape, _ in weights if name.startswith(modules)}
    return compact(config)


def compact(value):
    return json.dumps(value, separators=(",", ":")).encode()


def file(kept):
    header, data = {}, b""
    for name, dtype, shape, part in kept:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    header = compact(header)
    return struct.pack("<Q", len(header)) + header + data


def listed(kept):
    """The small tensors first, whose data says what the others are."""
    kept = sorted(kept, key=lambda tensor: len(tensor[3]) > SMALL)
    names = compact({name: [dtype, shape] for name, dtype, shape, _ in kept})
    small = b"".join(part for *_, part in kept if len(part) <= SMALL)
    rest = b"".join(part for *_, part in kept if len(part) > SMALL)
    return names + b"\0" + small + rest[:REST]


def main():
    into = HERE / "corpus" / "encoding"
    into.mkdir(parents=True, exist_ok=True)
    cases = HERE.parents[1] / "golden" / "quantized"
    for case in sorted(path.parent for path in cases.glob("*/model.safetensors")):
        smallest = LAYER + SMALLEST.get(case.name, "self_attn.k_proj")
        more = (smallest, LAYER + "mlp.up_proj", LAYER + "mlp.experts.gate_up_proj")
        for name, form, modules, made in (("file", b"2", (smallest,), file), ("list", b"5" + bytes(32), more, listed)):
            kept = [tensor for tensor in tensors(case / "model.safetensors") if tensor[0].startswith(modules)]
            text = form + configuration(case, modules) + b"\0" + made(kept)
            (into / f"{name}-{case.name}").write_bytes(text)


if __name__ == "__main__":
    main()
