"""Copies bfloat16 graphs to float32, so that a runtime without bfloat16 can check them: same nodes, same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.backends.graphs.manifest import GraphFile, Manifest, hash_files
from ldmseg_fast.backends.graphs.specs import TensorSpec


def float_twin(folder: Path, manifest: Manifest, out: Path) -> Path:
    """Writes the copy into `out`: every bfloat16 type becomes float32, weights keep their (rounded) values."""
    graphs = {name: _twin(folder, graph, out) for name, graph in manifest.graphs.items()}
    options = replace(manifest.options, dtype="float32")
    replace(manifest, graphs=graphs, options=options, precision="fp32").write(out)
    return out


def _twin(folder: Path, graph: GraphFile, out: Path) -> GraphFile:
    import onnx

    model = onnx.load(str(folder / graph.file))
    _convert(model.graph, onnx)
    del model.graph.value_info[:]  # types inferred for the original
    onnx.save(model, str(out / graph.file), save_as_external_data=graph.weights is not None, location=graph.weights)
    spec = replace(graph.spec, inputs=_floats(graph.spec.inputs), outputs=_floats(graph.spec.outputs))
    return GraphFile(spec, graph.file, graph.weights, hash_files(out, graph.file, graph.weights))


def _floats(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(t, dtype="float32") if t.dtype == "bfloat16" else t for t in tensors)


def _convert(graph: Any, onnx: Any) -> None:
    half, full = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == half:
            tensor.CopyFrom(_as_float(tensor, onnx))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = full
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = full
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == half:
                attribute.t.CopyFrom(_as_float(attribute.t, onnx))


def _as_float(tensor: Any, onnx: Any) -> Any:
    values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    return onnx.numpy_helper.from_array(values, tensor.name)
