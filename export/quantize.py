"""Quantises an exported UNet: pairs of QuantizeLinear and DequantizeLinear on what flows, weights stored in 8 bits.

It edits the graph as the dynamo exporter made it, so that everything else, group norms included, stays as it is. The
image encoder and the mask decoder stay floats: each runs once per image, the denoiser N times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldmseg_fast.export.calibration import PARTS, LayerScales, Scale, to_eight_bits
from ldmseg_fast.export.graph_values import constant, fold_transposes, replace_value, tidy

SCOPES = "pkg.torch.onnx.name_scopes"  # a node's modules, from the outermost in, as the exporter tells them
LAYERS = ("Conv", "MatMul", "Gemm")


def quantize_graph(
    model: Any, module: nn.Module, unet: nn.Module, scales: Mapping[str, LayerScales], precision: str
) -> None:
    """Quantises the layers of a graph in place.

    A QuantizeLinear is named `LAYER/inputs/NODE`, `LAYER/outputs/NODE` or `LAYER/softmax/NODE`; where one product makes
    q, k and v, the LAYER of its inputs is the three names joined by "+".

    Args:
        model: `onnx_ir.Model` of `module`.
        module: what was exported, with `unet` in it.
        unet: whose layers have `scales`.
        scales: see `calibration.calibrate`.
        precision: "fp8" or "int8".

    Raises:
        ValueError: a layer that has scales and no node.
    """
    prefix = next(name for name, each in module.named_modules() if each is unet) + "."
    found: set[str] = set()
    wanted = set(scales) | {f"{name}/softmax" for name, layer in scales.items() if layer.softmax is not None}
    fold_transposes(model.graph)
    for node in list(model.graph):
        scope = _scope_of(node, prefix)
        if node.op_type in LAYERS and node.inputs[1].const_value is not None:
            names = _layers_of(scope, scales)
            if names:
                _quantize_node(model.graph, node, names, [scales[name] for name in names], precision)
                found.update(names)
        elif node.op_type == "Softmax" and f"{scope}.to_v/softmax" in wanted:
            name = f"{scope}.to_v"
            floats, scale = node.outputs[0].dtype.numpy(), scales[name].softmax
            _quantize_result(model.graph, node, node.outputs[0], scale, f"{name}/softmax", floats, precision)
            found.add(f"{name}/softmax")
    if wanted - found:
        raise ValueError(f"no node in the graph for {', '.join(sorted(wanted - found)[:3])}")
    tidy(model)


def _scope_of(node: Any, prefix: str) -> str:
    """Returns the name of the module that a node belongs to."""
    scopes = [re.sub(r"@\d+", "", name) for name in re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))]
    return scopes[-2].removeprefix(prefix) if len(scopes) > 1 else ""  # the last one is the node's own


def _layers_of(scope: str, scales: Mapping[str, LayerScales]) -> list[str]:
    """Returns the layer of a module's weight, or the three of a fused one; [] for one that is not quantised."""
    names = [scope] if scope in scales else [f"{scope}.{part}" for part in PARTS]
    return names if all(each in scales for each in names) else []


def _quantize_node(graph: Any, node: Any, names: list[str], layers: list[LayerScales], precision: str) -> None:
    import onnx_ir as ir

    name, weight, floats = "+".join(names), node.inputs[1], node.inputs[1].const_value.dtype.numpy()
    kind, axis = _kind(precision), 1 if node.op_type == "MatMul" else 0
    stored, steps, zeros = f"{name}/weight", f"{name}/weight/step", f"{name}/weight/zero"
    if stored not in graph.initializers:  # a whole sampler's steps share it
        values, found = _stored(weight.const_value.numpy(), layers, axis, precision)
        constant(graph, stored, values.view(kind))
        constant(graph, steps, found.astype(floats))
        constant(graph, zeros, np.zeros(found.shape, kind))
    per_channel = {"axis": axis} if layers[0].weight.ndim else {}
    parts = [graph.initializers[each] for each in (stored, steps, zeros)]
    dequantise = ir.node("DequantizeLinear", parts, attributes=per_channel)
    inputs = _pair(graph, node.inputs[0], layers[0].inputs, f"{name}/inputs", node.name, floats, precision)
    graph.insert_before(node, [*inputs, dequantise])
    node.replace_input_with(0, inputs[-1].outputs[0])
    node.replace_input_with(1, dequantise.outputs[0])
    results, maker = node.outputs, node
    if len(names) > 1:  # cut up at once, so that each part has its own scale
        (maker,) = node.outputs[0].consumers()
        results = maker.outputs
    for part, layer, result in zip(names, layers, results, strict=True):
        if layer.outputs is not None:
            _quantize_result(graph, maker, result, layer.outputs, f"{part}/outputs", floats, precision)


def _quantize_result(graph: Any, node: Any, result: Any, scale: Scale, title: str, floats: Any, precision: str) -> None:
    """Quantises and restores one of a node's outputs, for whatever reads it."""
    after = _pair(graph, result, scale, title, node.name, floats, precision)
    replace_value(result, after[-1].outputs[0])
    after[0].replace_input_with(0, result)
    graph.insert_after(node, after)


def _pair(graph: Any, value: Any, scale: Scale, title: str, node: str, floats: Any, precision: str) -> list[Any]:
    import onnx_ir as ir

    step = constant(graph, f"{title}/step", np.array(scale.step, floats))
    zero = constant(graph, f"{title}/zero", np.array(scale.zero, np.uint8 if scale.unsigned else _kind(precision)))
    quantise = ir.node("QuantizeLinear", [value, step, zero], name=f"{title}/{node}")
    return [quantise, ir.node("DequantizeLinear", [quantise.outputs[0], step, zero])]


def _kind(precision: str) -> Any:
    """Returns NumPy's type of a precision's stored weights."""
    import onnx_ir as ir

    return {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}[precision].numpy()


def _stored(weight: np.ndarray, layers: list[LayerScales], axis: int, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a weight as bytes, of its shape, and their steps, float32 [] or [C]; fused layers one after the other."""
    values = torch.from_numpy(weight.astype(np.float32))
    steps: Tensor = layers[0].weight
    along = steps
    if layers[0].weight.ndim:
        steps = torch.cat([layer.weight.flatten() for layer in layers])
        along = steps.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
    return to_eight_bits(values, along, precision).view(torch.uint8).numpy(), steps.numpy()
