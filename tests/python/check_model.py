#!/usr/bin/env python3
"""The onnx package's own opinion of models without vendor operators: check_model.py MODEL.onnx [MODEL.onnx ...]

Each is read with its external data, checked in full, and its shapes are inferred strictly. The graph's outputs must
come out of the inference as the file declares them.
"""
import sys
import tempfile
from pathlib import Path

import onnx


def shape(value):
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]


def check(path):
    onnx.checker.check_model(str(path), full_check=True)
    with tempfile.TemporaryDirectory() as folder:
        inferred = Path(folder) / "inferred.onnx"
        onnx.shape_inference.infer_shapes_path(str(path), str(inferred), check_type=True, strict_mode=True, data_prop=True)
        after = onnx.load(inferred, load_external_data=False)
    declared = onnx.load(path, load_external_data=False)
    for want, got in zip(declared.graph.output, after.graph.output):
        if shape(want) != shape(got) or want.type.tensor_type.elem_type != got.type.tensor_type.elem_type:
            raise SystemExit(f"{path}: output {want.name} is declared {shape(want)} and inferred {shape(got)}")
    vendor = sorted({n.domain for n in declared.graph.node} - {"", "ai.onnx"})
    if vendor:
        raise SystemExit(f"{path}: operators of {', '.join(vendor)}")
    opset = {o.domain: o.version for o in declared.opset_import}
    print(f"{path}: IR {declared.ir_version}, opset {opset}, {len(declared.graph.node)} nodes")


if __name__ == "__main__":
    for model in sys.argv[1:]:
        check(Path(model))
