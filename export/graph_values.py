"""Edits values of a graph in onnx_ir's form."""

from __future__ import annotations

from typing import Any

import numpy as np


def constant(graph: Any, name: str, values: np.ndarray) -> Any:
    """Returns the initializer `name` of a graph; where it has none yet it gets `values`, of any shape and dtype."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(values, name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        )
    return graph.initializers[name]


def replace_value(old: Any, new: Any) -> None:
    """Lets whatever reads the value `old` read `new`."""
    for node, index in list(old.uses()):
        node.replace_input_with(index, new)


def fold_transposes(graph: Any) -> None:
    """Stores weights as their readers take them, in the place of nodes that transpose them.

    The exporter folds those nodes itself, but not of a large weight that several nodes share, as a sampler's steps do.
    """
    for node in list(graph):
        if node.op_type == "Transpose" and node.inputs[0].const_value is not None:
            perm = node.attributes.get("perm")
            values = np.transpose(node.inputs[0].const_value.numpy(), perm and perm.as_ints())
            stored = constant(graph, f"{node.outputs[0].name}/transposed", np.ascontiguousarray(values))
            replace_value(node.outputs[0], stored)


def tidy(model: Any) -> None:
    """Removes nodes and initializers that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
