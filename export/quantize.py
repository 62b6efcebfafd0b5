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
from ldmseg_fast.export.graph_values import constant, replace_value, tidy

SCOPES = "pkg.torch.onnx.name_scopes"  # a node's modules, from the outermost in, as the exporter tells them
LAYERS = ("Conv", "MatMul", "Gemm")


def quantize_graph(
    model: Any, module: nn.Module, unet: nn.Module, scales: Mapping[str, LayerScales], precision: str
) -> None:
    """Quantises the layers of a graph in place.

    A QuantizeLinear is named `LAYER/inputs/NODE` or `LAYER/outputs/NODE`; where one product makes q, k and v, LAYER is
    the three names joined by "+".

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
    missing = set(scales)
    for node in list(model.graph):
        if node.op_type in LAYERS and node.inputs[1].const_value is not None:
            names = _layers_of(node, prefix, scales)
            if names:
                _quantize_node(model.graph, node, names, [scales[name] for name in names], precision)
                missing.difference_update(names)
    if missing:
        raise ValueError(f"no node in the graph for {', '.join(sorted(missing)[:3])}")
    tidy(model)


def _layers_of(node: Any, prefix: str, scales: Mapping[str, LayerScales]) -> list[str]:
    """Returns the layer whose weight a node holds, or the three of a fused one; [] for one that is not quantised."""
    scopes = [re.sub(r"@\d+", "", name) for name in re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))]
    name = scopes[-2].removeprefix(prefix) if len(scopes) > 1 else ""  # the last one is the node's own
    names = [name] if name in scales else [f"{name}.{part}" for part in PARTS]
    return names if all(each in scales for each in names) else []


def _quantize_node(graph: Any, node: Any, names: list[str], layers: list[LayerScales], precision: str) -> None:
    import onnx_ir as ir

    name, weight, floats = "+".join(names), node.inputs[1], node.inputs[1].const_value.dtype.numpy()
    kind = {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}[precision]

    def pair(value: Any, scale: Scale, end: str) -> list[Any]:
        step = constant(graph, f"{name}/{end}/step", np.array(scale.step, floats))
        zero_kind = ir.DataType.UINT8 if scale.unsigned else kind
        zero = constant(graph, f"{name}/{end}/zero", np.array(scale.zero, zero_kind.numpy()))
        quantise = ir.node("QuantizeLinear", [value, step, zero], name=f"{name}/{end}/{node.name}")
        return [quantise, ir.node("DequantizeLinear", [quantise.outputs[0], step, zero])]

    axis = 1 if node.op_type == "MatMul" else 0
    stored, steps, zeros = f"{name}/weight", f"{name}/weight/step", f"{name}/weight/zero"
    if stored not in graph.initializers:  # a whole sampler's steps share it
        values, found = _stored(weight.const_value.numpy(), layers, axis, precision)
        constant(graph, stored, values.view(kind.numpy()))
        constant(graph, steps, found.astype(floats))
        constant(graph, zeros, np.zeros(found.shape, kind.numpy()))
    per_channel = {"axis": axis} if layers[0].weight.ndim else {}
    parts = [graph.initializers[each] for each in (stored, steps, zeros)]
    dequantise = ir.node("DequantizeLinear", parts, attributes=per_channel)
    inputs = pair(node.inputs[0], layers[0].inputs, "inputs")
    graph.insert_before(node, [*inputs, dequantise])
    node.replace_input_with(0, inputs[-1].outputs[0])
    node.replace_input_with(1, dequantise.outputs[0])
    if layers[0].outputs is not None:
        outputs = pair(node.outputs[0], layers[0].outputs, "outputs")
        replace_value(node.outputs[0], outputs[-1].outputs[0])
        outputs[0].replace_input_with(0, node.outputs[0])
        graph.insert_after(node, outputs)


def _stored(weight: np.ndarray, layers: list[LayerScales], axis: int, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a weight as bytes, of its shape, and their steps, float32 [] or [C]; fused layers one after the other."""
    values = torch.from_numpy(weight.astype(np.float32))
    steps: Tensor = layers[0].weight
    along = steps
    if layers[0].weight.ndim:
        steps = torch.cat([layer.weight.flatten() for layer in layers])
        along = steps.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
    return to_eight_bits(values, along, precision).view(torch.uint8).numpy(), steps.numpy()
