"""Rewrites a graph for ONNX Runtime's kernels on the CPU; what it computes stays the same.

ONNX Runtime has no kernel of a group norm there: it computes the definition, some twenty nodes. It multiplies integers
to floats, but a convolution or a Gemm of integers also returns them, so 1x1 convolutions and Gemms become products.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ldmseg_fast.export.graph_values import constant, replace_value, tidy

CHANNELS_LAST, CHANNELS_FIRST, SWAP_LAST = [0, 2, 3, 1], [0, 3, 1, 2], [0, 1, 3, 2]


def rewrite_for_cpu(model: Any) -> None:
    """Rewrites group norms, 1x1 convolutions, Gemms and the keys' transposition in an `onnx_ir.Model`, in place."""
    for node in list(model.graph):
        if node.op_type == "GroupNormalization":
            _instance_norm(model.graph, node)
        elif node.op_type in ("Conv", "Gemm") and _is_product(node):
            _product(model.graph, node)
        elif node.op_type == "Reshape":
            _swap(model.graph, node)
    tidy(model)


def _instance_norm(graph: Any, norm: Any) -> None:
    """Normalises groups [B, G, n] as channels, then scales and moves the true channels, as a batch norm does."""
    import onnx_ir as ir

    x, scale, bias = norm.inputs
    groups, eps = norm.attributes["num_groups"].as_int(), norm.attributes["epsilon"].as_float()
    split = constant(graph, f"groups_{groups}", np.array([0, groups, -1]))
    ones, zeros = (_filled(graph, groups, value) for value in (1, 0))
    plain, still = (_filled(graph, scale.shape[0], value) for value in (1, 0))
    grouped = ir.node("Reshape", [x, split])
    alike = ir.node(
        "InstanceNormalization", [grouped.outputs[0], ones, zeros], attributes={"epsilon": eps}, name=norm.name
    )
    if all(isinstance(size, int) for size in x.shape[1:]):
        shape, before = constant(graph, f"{norm.name}/shape", np.array([0, *x.shape[1:]])), []
    else:
        before = [ir.node("Shape", [x])]
        shape = before[0].outputs[0]
    back = ir.node("Reshape", [alike.outputs[0], shape])
    moved = ir.node("BatchNormalization", [back.outputs[0], scale, bias, still, plain], attributes={"epsilon": 0.0})
    _put(graph, norm, [*before, grouped, alike, back, moved])


def _filled(graph: Any, count: int, value: int) -> Any:
    return constant(graph, f"{value}_{count}", np.full(count, value, np.float32))


def _is_product(node: Any) -> bool:
    weight = node.inputs[1].const_value
    if weight is None or len(node.inputs) < 3:
        return False
    return tuple(weight.shape[2:]) == (1, 1) if node.op_type == "Conv" else node.attributes["transB"].as_int() == 1


def _product(graph: Any, node: Any) -> None:
    """Multiplies pixels [B, h, w, C], or rows [B, 1, C], by the weight; of rows [B, C] it would become a Gemm again."""
    import onnx_ir as ir

    x, weight, bias = node.inputs
    values = weight.const_value.numpy().reshape(tuple(weight.shape[:2]))
    transposed = constant(graph, f"{weight.name}/transposed", np.ascontiguousarray(values.T))
    axis = constant(graph, "axis_1", np.array([1]))
    if node.op_type == "Conv":
        first = ir.node("Transpose", [x], attributes={"perm": CHANNELS_LAST})
    else:
        first = ir.node("Unsqueeze", [x, axis])
    product = ir.node("MatMul", [first.outputs[0], transposed], name=node.name)
    product.metadata_props.update(node.metadata_props)  # which tell its layer
    moved = ir.node("Add", [product.outputs[0], bias])
    if node.op_type == "Conv":
        last = ir.node("Transpose", [moved.outputs[0]], attributes={"perm": CHANNELS_FIRST})
    else:
        last = ir.node("Squeeze", [moved.outputs[0], axis])
    _put(graph, node, [first, product, moved, last])


def _swap(graph: Any, node: Any) -> None:
    """Transposes keys [B, heads, M, d] as they are, where the exporter flattens the first axes and restores them."""
    import onnx_ir as ir

    transpose = node.inputs[0].producer()
    if (
        transpose is None
        or transpose.op_type != "Transpose"
        or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1]
    ):
        return
    flatten = transpose.inputs[0].producer()
    if flatten is not None and flatten.op_type == "Reshape" and len(flatten.inputs[0].shape) == 4:
        _put(graph, node, [ir.node("Transpose", [flatten.inputs[0]], attributes={"perm": SWAP_LAST})])


def _put(graph: Any, old: Any, nodes: list[Any]) -> None:
    """Puts nodes in the place of an old one."""
    graph.insert_before(old, nodes)
    nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    replace_value(old.outputs[0], nodes[-1].outputs[0])
    graph.remove(old, safe=True)
