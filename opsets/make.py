#!/usr/bin/env python3
"""Write opsets/ai.onnx.json and opsets/com.microsoft.json from the official operator schemas.

    make.py            write both files
    make.py --check    exit 1 when a file is not what this script would write

The schemas come from two packages, in exactly these versions:
    pip install onnx==1.23.2 onnxruntime==1.32.0

One operator version stands on a line, sorted by name and version, so that an update reads as a diff of operators:
    name, since        the operator, and the first opset version that this schema is in force for
    domain             only where it is not the file's own
    inputs, outputs    [name, "single" | "optional" | "variadic", type variable or type]; a variadic one also says
                       how many it takes at least
    attributes         name -> [kind, required] or [kind, required, default]
    types              type variable -> the types that it may stand for, without "tensor()"

What is left out, and why (the Rust side checks nodes, it does not document them):
  * types that no tensor of a language model has: see TYPES; an operator whose required parameters have no type left
    (those on sequences, optionals and strings) goes with them;
  * operators that take a subgraph (If, Loop, Scan, beam search), or any number of values of types that differ: no
    graph of ours holds one;
  * operators that are random, that train, or that belong to images and to other hardware: see LEFT_OUT.
"""
import argparse
import json
import re
import struct
import sys
from pathlib import Path

ONNX, ONNXRUNTIME = "1.23.2", "1.32.0"
OLDEST, NEWEST = 17, 23          # the opset versions that targets may ask for
HERE = Path(__file__).resolve().parent

TYPES = ("float", "float16", "bfloat16", "double", "int64", "int32", "int16", "int8", "int4", "uint64", "uint32",
         "uint16", "uint8", "uint4", "bool", "float8e4m3fn", "float8e5m2", "float8e8m0", "float4e2m1")
LEFT_OUT = re.compile("|".join((
    r"Random.*|Bernoulli|Multinomial|Sampl.*",                                              # random
    r"Dropout|BiasDropout|Bitmask.*|NegativeLogLikelihoodLoss|SoftmaxCrossEntropyLoss",     # training
    r"AffineGrid|CenterCropPad|Col2Im|CropAndResize|DeformConv|DepthToSpace|GridSample|ImageDecoder|SpaceToDepth"
    r"|(Max|Lp|Average).*Pool.*|Global.*Pool|MaxUnpool|MaxRoiPool|RoiAlign|NonMaxSuppression|Maxpool.*",    # images
    r"Nhwc.*|QOrdered.*|Quantize(BFP|WithOrder)|Dequantize(BFP|WithOrder)|EPContext|Snpe|GemmFloat8",       # hardware
    r"QLinear.*|ConvInteger|MatMulInteger.*|DynamicQuantizeLSTM|QGemm|QAttention|QEmbed.*|MulInteger",      # old int8
    r"GRU|LSTM|RNN|AttnLSTM|.*(Beam|Greedy)Search|Longformer.*|Tokenizer|SampleOp|CDist|BifurcationDetector"
    r"|Optional.*",
)))


def short(types):
    """The types of TYPES among `types`, in TYPES' order, without tensor()."""
    names = {t[len("tensor("):-1] for t in types if t.startswith("tensor(")}
    return [t for t in TYPES if t in names]


def parameters(formal, least):
    """Inputs or outputs; `least` is how many a node has at the fewest."""
    rows = []
    for at, p in enumerate(formal):
        kind = p.option.name.lower()
        type_ = getattr(p, "type_str", None) or p.typeStr
        row = [p.name, kind, short([type_])[0] if short([type_]) else type_]
        if kind == "variadic":
            row.append(max(0, least - at))
        rows.append(row)
    return rows


def plain(value, kind):
    """An attribute's default as JSON; float32 values in their shortest spelling."""
    if kind == "float":
        return shortest(value)
    if kind == "floats":
        return [shortest(v) for v in value]
    if isinstance(value, bytes):
        return value.decode()
    return [plain(v, "") for v in value] if isinstance(value, (list, tuple)) else value


def shortest(value):
    single = struct.pack("f", value)
    return next(v for v in (float(f"{value:.{n}g}") for n in range(1, 18)) if struct.pack("f", v) == single)


def default_of(attribute, kind):
    """[default] or []; the two packages spell it differently."""
    import onnx
    raw = getattr(attribute, "default_value", None)
    if raw is None and getattr(attribute, "_default_value", b""):
        raw = onnx.AttributeProto()
        raw.ParseFromString(attribute._default_value)
    if raw is None or not raw.type:
        return []
    checked = ("int", "float", "string", "ints", "floats")
    return [plain(onnx.helper.get_attribute_value(raw), kind)] if kind in checked else []


def attributes(schema):
    table = {}
    for name, a in sorted(schema.attributes.items()):
        kind = str(a.type).split(".")[-1].lower()
        table[name] = [kind, bool(a.required), *default_of(a, kind)]
    return table


def row(schema, domain):
    """The line of one schema, or None when a rule of this file leaves it out."""
    if schema.deprecated or LEFT_OUT.fullmatch(schema.name):
        return None
    types = {t.type_param_str: short(t.allowed_type_strs) for t in schema.type_constraints}
    inputs, outputs = parameters(schema.inputs, schema.min_input), parameters(schema.outputs, schema.min_output)
    needed = [p[2] for p in inputs + outputs if p[1] != "optional"]
    if any(not types.get(t, [t] if t in TYPES else []) for t in needed):
        return None
    attrs = attributes(schema)
    if not all(getattr(p, "is_homogeneous", getattr(p, "isHomogeneous", True)) for p in [*schema.inputs, *schema.outputs]):
        return None
    if any(kind in ("graph", "graphs") for kind, *_ in attrs.values()):
        return None
    line = {"name": schema.name, "since": schema.since_version}
    if schema.domain != domain:
        line["domain"] = schema.domain
    return {**line, "inputs": inputs, "outputs": outputs, "attributes": attrs, "types": dict(sorted(types.items()))}


def onnx_rows():
    import onnx
    history = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= NEWEST:
            history.setdefault(schema.name, {})[schema.since_version] = schema
    for versions in history.values():
        for since in sorted({max((v for v in versions if v <= opset), default=0) for opset in range(OLDEST, NEWEST + 1)}):
            if since:
                yield row(versions[since], "")


def onnxruntime_rows():
    from onnxruntime.capi import onnxruntime_pybind11_state as state
    for schema in state.get_all_operator_schema():
        # SimplifiedLayerNormalization stands in ONNX's own domain, although ONNX has no such operator
        if schema.domain == "com.microsoft" or (schema.domain == "" and schema.name == "SimplifiedLayerNormalization"):
            yield row(schema, "com.microsoft")


def text_of(rows):
    rows = sorted((r for r in rows if r), key=lambda r: (r["name"], r["since"]))
    return "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    import onnx
    import onnxruntime
    found = onnx.__version__, onnxruntime.__version__
    if found != (ONNX, ONNXRUNTIME):
        sys.exit(f"this needs onnx {ONNX} and onnxruntime {ONNXRUNTIME}; found {found[0]} and {found[1]}")
    stale = []
    for name, rows in (("ai.onnx.json", onnx_rows()), ("com.microsoft.json", onnxruntime_rows())):
        path, text = HERE / name, text_of(rows)
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
        print(f"{name}: {text.count(chr(10))} schemas, {len(text)} bytes")
    if stale:
        sys.exit(f"not what opsets/make.py writes: {', '.join(stale)}")


if __name__ == "__main__":
    main()
