"""Rewrites a graph for ONNX Runtime's kernels on the CPU; what it computes stays the same.

ONNX Runtime has no kernel of a group norm there: it computes the definition, some twenty nodes. It multiplies integers
to floats, but a convolution or a Gemm of integers also returns them, so 1x1 convolutions and Gemms become products.
Once these are quantised they are fused: each with its bias, those of one input with each other, and attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ldmseg_fast.export.graph_values import constant, replace_value, tidy

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own nodes
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


def fuse_for_cpu(model: Any) -> None:
    """Fuses what a quantised `onnx_ir.Model` holds of products and attention into nodes of ONNX Runtime's, in place.

    Rows [B, 1, C] that several layers multiply, as those of the time step, are multiplied once. A product takes its
    bias with it (MatMulIntegerToFloat), attention is one node without transposed copies (MultiHeadAttention), and what
    is resized to the nearest value is quantised before.
    """
    alike: dict[Any, list[_Product]] = {}
    for product in _products(model.graph):
        unsqueeze = product.quantise.inputs[0].producer()
        if unsqueeze is not None and unsqueeze.op_type == "Unsqueeze" and product.bias is not None:
            values = (value.const_value.numpy().item() for value in product.quantise.inputs[1:])
            alike.setdefault((unsqueeze.inputs[0], *values), []).append(product)
    for products in alike.values():
        if len(products) > 1:
            _multiply_once(model.graph, products)
    tidy(model)
    for product in _products(model.graph):
        _fuse_product(model.graph, product)
    for node in list(model.graph):
        if node.op_type == "Softmax":
            _fuse_attention(model.graph, node)
        elif node.op_type == "QuantizeLinear":
            _resize_bytes(model.graph, node)
    model.opset_imports[MICROSOFT] = 1
    tidy(model)


@dataclass(frozen=True)
class _Product:
    """Holds the nodes of a quantised product: of its input, its weight, the product, and its bias where it has one."""

    quantise: Any
    dequantise: Any
    node: Any
    add: Any | None

    @property
    def bias(self) -> Any | None:
        return self.add and next(value for value in self.add.inputs if value.const_value is not None)

    @property
    def result(self) -> Any:
        return (self.add or self.node).outputs[0]


def _products(graph: Any) -> list[_Product]:
    """Finds the products of a quantised input and a quantised weight."""
    found = []
    for node in graph:
        pairs = [value.producer() for value in node.inputs] if node.op_type == "MatMul" else []
        if len(pairs) == 2 and all(pair is not None and pair.op_type == "DequantizeLinear" for pair in pairs):
            quantise, weight = (pair.inputs[0] for pair in pairs)
            if quantise.producer() is not None and weight.const_value is not None:
                found.append(_Product(quantise.producer(), pairs[1], node, _bias_of(node, weight.shape[-1])))
    return found


def _bias_of(node: Any, columns: int) -> Any | None:
    """Returns the node that adds a constant [C] to a product's result and is alone in reading it."""
    add = _only_reader(node.outputs[0], "Add")
    constants = [value.const_value for value in add.inputs if value.const_value is not None] if add else []
    return add if [tuple(value.shape) for value in constants] == [(columns,)] else None


def _multiply_once(graph: Any, products: list[_Product]) -> None:
    """Multiplies an input by the weights of several layers side by side, and cuts up the result."""
    import onnx_ir as ir

    first = products[0]
    name = "+".join(product.quantise.name.split("/")[0] for product in products)

    def joined(kind: str, values: list[Any]) -> Any:
        return constant(graph, f"{name}/{kind}", np.concatenate([value.const_value.numpy() for value in values], -1))

    stored, steps, zeros = (
        joined(kind, [product.dequantise.inputs[index] for product in products])
        for index, kind in enumerate(("weight", "weight/step", "weight/zero"))
    )
    bias = joined("bias", [product.bias for product in products])
    sizes = constant(graph, f"{name}/sizes", np.array([product.bias.shape[0] for product in products]))
    _, step, zero = first.quantise.inputs
    title = f"{name}/{'/'.join(first.quantise.name.split('/')[1:])}"
    quantise = ir.node("QuantizeLinear", list(first.quantise.inputs), name=title)
    back = ir.node("DequantizeLinear", [quantise.outputs[0], step, zero])
    weight = ir.node("DequantizeLinear", [stored, steps, zeros], attributes={"axis": 1})
    node = ir.node("MatMul", [back.outputs[0], weight.outputs[0]], name=first.node.name)
    moved = ir.node("Add", [node.outputs[0], bias])
    nodes, results, axis = [quantise, back, weight, node, moved], [product.result for product in products], -1
    for kind in ("Squeeze", "Unsqueeze"):  # to [B, C], and to [B, C, 1, 1]
        readers = [_only_reader(result, kind) for result in results]
        if any(reader is None or reader.inputs[1] is not readers[0].inputs[1] for reader in readers):
            break
        nodes.append(ir.node(kind, [nodes[-1].outputs[0], readers[0].inputs[1]]))
        results, axis = [reader.outputs[0] for reader in readers], 1
    nodes.append(ir.node("Split", [nodes[-1].outputs[0], sizes], attributes={"axis": axis}, num_outputs=len(products)))
    graph.insert_after(first.quantise, nodes)
    for result, part in zip(results, nodes[-1].outputs, strict=True):
        part.type, part.shape = result.type, result.shape
        replace_value(result, part)


def _fuse_product(graph: Any, product: _Product) -> None:
    """Puts one node in the place of a product, or one for each part where it is only made to be cut up evenly."""
    columns, split = product.dequantise.inputs[0].shape[-1], _only_reader(product.result, "Split")
    is_cut = split is not None and all(part.shape[-1] * len(split.outputs) == columns for part in split.outputs)
    results = split.outputs if is_cut else [product.result]
    if any(result.is_graph_output() for result in (product.result, *results)):
        return
    width = columns // len(results)
    for index, result in enumerate(results):
        fused = _integer_product(graph, product, slice(index * width, (index + 1) * width) if is_cut else None)
        fused.outputs[0].type, fused.outputs[0].shape = result.type, result.shape
        graph.insert_before(product.node, [fused])
        replace_value(result, fused.outputs[0])


def _integer_product(graph: Any, product: _Product, columns: slice | None) -> Any:
    """Makes the node of a product, or of some of its columns."""
    import onnx_ir as ir

    def cut(value: Any) -> Any:
        if columns is None:
            return value
        name = f"{value.name}/{columns.start}"
        return constant(graph, name, np.ascontiguousarray(value.const_value.numpy()[..., columns]))

    (x, step, zero), kept = (product.quantise.outputs[0], *product.quantise.inputs[1:]), product.dequantise.inputs
    stored, steps, zeros, *bias = (cut(value) for value in (*kept, *([product.bias] if product.add else [])))
    name = f"{product.node.name}/{columns.start}" if columns else product.node.name
    return ir.node("MatMulIntegerToFloat", [x, stored, step, steps, zero, zeros, *bias], name=name, domain=MICROSOFT)


def _fuse_attention(graph: Any, softmax: Any) -> None:
    """Puts one node in the place of heads that are cut out of [B, N, C], attended, and put together again."""
    import onnx_ir as ir

    scores, weighted = softmax.inputs[0].producer(), _only_reader(softmax.outputs[0], "MatMul")
    last = softmax.attributes["axis"].as_int() in (-1, 3) if "axis" in softmax.attributes else True
    if weighted is None or scores is None or scores.op_type != "MatMul" or not last:
        return
    (q, q_scale), (k, k_scale), (v, v_scale) = (_before_heads(x) for x in (*scores.inputs, weighted.inputs[1]))
    transpose = _only_reader(weighted.outputs[0], "Transpose")
    reshape = transpose and _only_reader(transpose.outputs[0], "Reshape")
    heads, sources = weighted.outputs[0].shape[1], [q, k, v]
    if reshape is None or None in sources or not isinstance(heads, int) or v_scale != 1.0:
        return
    if reshape.outputs[0].is_graph_output():
        return
    attributes = {"num_heads": heads, "scale": q_scale * k_scale}
    fused = ir.node("MultiHeadAttention", sources, attributes=attributes, name=softmax.name, domain=MICROSOFT)
    _put(graph, reshape, [fused])


def _resize_bytes(graph: Any, quantise: Any) -> None:
    """Quantises before a resizing that repeats values too; ONNX Runtime then resizes bytes."""
    import onnx_ir as ir

    resize = quantise.inputs[0].producer()
    if resize is None or resize.op_type != "Resize" or len(list(resize.outputs[0].consumers())) > 1:
        return
    if "mode" in resize.attributes and resize.attributes["mode"].as_string() != "nearest":
        return
    (layers, end, _), scale = quantise.name.split("/"), quantise.inputs[1:]
    before = ir.node("QuantizeLinear", [resize.inputs[0], *scale], name=f"{layers}/{end}/{resize.name}")
    back = ir.node("DequantizeLinear", [before.outputs[0], *scale])
    graph.insert_before(resize, [before, back])
    resize.replace_input_with(0, back.outputs[0])


def _before_heads(value: Any) -> tuple[Any | None, float]:
    """Returns what was cut into heads [B, h, N, d], or [B, h, d, N], and by how much it was scaled since."""
    factor = 1.0
    while (node := value.producer()) is not None and node.op_type in ("Mul", "Transpose"):
        value = node.inputs[0]
        if node.op_type == "Mul":
            if node.inputs[1].const_value is None or node.inputs[1].const_value.size != 1:
                return None, 1.0
            factor *= node.inputs[1].const_value.numpy().item()
    return (node.inputs[0], factor) if node is not None and node.op_type == "Reshape" else (None, 1.0)


def _only_reader(value: Any, kind: str) -> Any | None:
    readers = list(value.consumers())
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None


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
