"""Copies graphs of half precision to float32: same nodes, same rounded weights, none of the rounding between nodes.

Run beside PyTorch with equally rounded weights, such a copy differs by float32's own error alone. A fault in structure
or weights stands out of that, and would be lost in the rounding of half precision.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldmseg_fast.backends.graphs.manifest import GraphFile, Manifest, hash_files
from ldmseg_fast.backends.graphs.specs import TensorSpec
from ldmseg_fast.export.calibration import Scale

HALVES = ("float16", "bfloat16")


def float_twin(folder: Path, manifest: Manifest, out: Path) -> Path:
    """Writes the copy into `out`, one tensor in memory at a time.

    Every half type becomes float32, weights keep their (rounded) values. Where inputs of layers are quantised the copy
    leaves them as they are, see `flow_scales`; weights stay quantised.
    """
    graphs = {name: _twin(folder, graph, out) for name, graph in manifest.graphs.items()}
    options = replace(manifest.options, dtype="float32")
    replace(manifest, graphs=graphs, options=options, precision="fp32").write(out)
    return out


def flow_scales(path: Path) -> dict[str, Scale]:
    """Reads the scales by which a graph quantises what flows, as `LAYER/inputs`, `LAYER/outputs`, `LAYER/softmax`.

    Where QuantizeLinear and DequantizeLinear of a pair differ, the scale's step is NaN.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    _unfuse(graph, onnx)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    back = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        step, zero = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:])
        same = list(back[node.output[0]].input[1:]) == list(node.input[1:])
        scale = Scale(float(step) if same else math.nan, int(zero), zero.dtype == np.uint8)
        layers, end, _ = node.name.split("/")
        found |= {f"{layer}/{end}": scale for layer in layers.split("+")}
    return found


def _unfuse(graph: Any, onnx: Any) -> None:
    """Puts pairs, product and bias in the place of ONNX Runtime's MatMulIntegerToFloat, see `cpu_graph`."""
    nodes = []
    for node in graph.node:
        if node.op_type != "MatMulIntegerToFloat":
            nodes.append(node)
            continue
        (x, weight, step, steps, zero, zeros), bias = node.input[:6], node.input[6:]
        floats, stored, result = (f"{node.output[0]}/{kind}" for kind in ("input", "weight", "product"))
        make = onnx.helper.make_node
        nodes += [
            make("DequantizeLinear", [x, step, zero], [floats]),
            make("DequantizeLinear", [weight, steps, zeros], [stored], axis=1),
            make("MatMul", [floats, stored], [result if bias else node.output[0]], name=node.name),
        ]
        if bias:
            nodes.append(make("Add", [result, *bias], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)


def _twin(folder: Path, graph: GraphFile, out: Path) -> GraphFile:
    import onnx

    model = onnx.load(str(folder / graph.file), load_external_data=False)
    _unfuse(model.graph, onnx)
    with (out / (graph.weights or f"{graph.file}.data")).open("wb") as file:
        for tensor in model.graph.initializer:
            _write_float(tensor, folder, file, onnx)
    _bypass_quantisers(model.graph)
    _convert(model.graph, onnx)
    del model.graph.value_info[:]  # types inferred for the original
    onnx.save(model, str(out / graph.file))
    weights = graph.weights or f"{graph.file}.data"
    spec = replace(graph.spec, inputs=_floats(graph.spec.inputs), outputs=_floats(graph.spec.outputs))
    return GraphFile(spec, graph.file, weights, hash_files(out, graph.file, weights))


def _floats(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(t, dtype="float32") if t.dtype in HALVES else t for t in tensors)


def _write_float(tensor: Any, folder: Path, file: IO[bytes], onnx: Any) -> None:
    """Converts an initializer; a large one goes into the file of weights and leaves memory.

    It is converted apart: what a part of a model has held stays in memory as long as the model.
    """
    helper, apart = onnx.external_data_helper, onnx.TensorProto()
    apart.CopyFrom(tensor)
    if apart.data_location == onnx.TensorProto.EXTERNAL:
        helper.load_external_data_for_tensor(apart, str(folder))
        apart.data_location = onnx.TensorProto.DEFAULT
        del apart.external_data[:]
    if apart.data_type in _halves(onnx):
        apart = _as_float(apart, onnx)
    if len(apart.raw_data) > 1024:
        start = file.tell()
        file.write(apart.raw_data)
        helper.set_external_data(apart, Path(file.name).name, start, file.tell() - start)
        apart.ClearField("raw_data")
    tensor.CopyFrom(apart)


def _bypass_quantisers(graph: Any) -> None:
    """Leaves out the pairs of QuantizeLinear and DequantizeLinear that do not stand behind a weight."""
    weights = {tensor.name for tensor in graph.initializer}
    quantised = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in weights
    }
    plain = {
        node.output[0]: quantised[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised
    }
    for node in graph.node:
        for index, name in enumerate(node.input):
            if node.op_type != "DequantizeLinear" and name in plain:
                node.input[index] = plain[name]
    kept = [node for node in graph.node if node.output[0] not in quantised and node.output[0] not in plain]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _convert(graph: Any, onnx: Any) -> None:
    halves, full = _halves(onnx), onnx.TensorProto.FLOAT
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = full
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in halves:
                attribute.i = full
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in halves:
                attribute.t.CopyFrom(_as_float(attribute.t, onnx))


def _halves(onnx: Any) -> tuple[int, int]:
    return onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def _as_float(tensor: Any, onnx: Any) -> Any:
    values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    return onnx.numpy_helper.from_array(values, tensor.name)
