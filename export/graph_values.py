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


def tidy(model: Any) -> None:
    """Removes nodes and initializers that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
