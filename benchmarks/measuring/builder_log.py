"""Counts what TensorRT-RTX fused in an engine, by the list of layers that its builder logs; no GPU is needed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmseg_fast.backends.trt.api import TrtApi
from ldmseg_fast.backends.trt.settings import BuildSettings

LAYER = re.compile(r"Name: (.*?), LayerType: (\w+), Inputs: (.*?), Constants: (.*?), Outputs: (?:.*Metadata: (.*))?")
TENSOR = re.compile(r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
EIGHT_BITS = ("Int8", "FP8")


@dataclass(frozen=True)
class EngineLayer:
    """Describes one layer of an engine, most often one kernel.

    Attributes:
        kind: in the builder's own words: "correlation" (a convolution), "gemm", "kgen" (a kernel made for the place).
        inputs: their types, as "Half" or "Int8".
        weights: how many elements of each type it holds.
        nodes: names of the graph's nodes that it computes, or a part of.
    """

    kind: str
    inputs: tuple[str, ...]
    weights: Mapping[str, int]
    nodes: frozenset[str]


def engine_layers(messages: Iterable[str]) -> list[EngineLayer]:
    """Reads the list of layers from a builder's messages, which must be detailed."""
    found = []
    for line in "\n".join(messages).splitlines():
        if match := LAYER.search(line):
            _, kind, inputs, constants, nodes = match.groups()
            weights: Counter[str] = Counter()
            for sizes, dtype in TENSOR.findall(constants):
                weights[dtype] += math.prod(int(size) for size in sizes.split(",") if size)
            types = tuple(dtype for _, dtype in TENSOR.findall(inputs))
            found.append(EngineLayer(kind, types, weights, frozenset(NODE.findall(nodes or ""))))
    return found


def fusions(layers: list[EngineLayer], operators: Mapping[str, str]) -> dict[str, tuple[float, str]]:
    """Counts by what becomes of a graph's nodes.

    Args:
        layers: of the engine.
        operators: of the graph, by the names of its nodes.

    Returns:
        (value, unit) by name.
    """

    def of(*kinds: str) -> list[list[EngineLayer]]:
        """The layers of each node of a kind."""
        names = [name for name, kind in operators.items() if kind in kinds]
        return [[layer for layer in layers if name in layer.nodes] for name in names]

    def eight(found: list[list[EngineLayer]]) -> int:
        return sum(any(each in layer.inputs for each in EIGHT_BITS for layer in one) for one in found)

    norms, products = of("GroupNormalization", "LayerNormalization"), of("MatMul", "Gemm")
    attentions, convolutions = of("Softmax"), of("Conv")
    fused = sum(
        len(one) == 1 and sum(operators.get(name) == "MatMul" for name in one[0].nodes) == 2 for one in attentions
    )
    weights: Counter[str] = Counter()
    for layer in layers:
        weights.update(layer.weights)
    stored = sum(weights[each] for each in EIGHT_BITS) / max(sum(weights.values()), 1)
    return {
        "layers of the engine": (len(layers), "layers"),
        "attentions in one layer": (fused, f"of {len(attentions)}"),
        "layers of norms": (sum(len(one) for one in norms), f"for {len(norms)}"),
        "convolutions of 8 bits": (eight(convolutions), f"of {len(convolutions)}"),
        "products of 8 bits": (eight(products), f"of {len(products)}"),
        "weights of 8 bits": (100 * stored, "%"),
    }


def build_logged(api: TrtApi, path: Path, shapes: Any, target: str) -> tuple[list[EngineLayer], int]:
    """Builds a graph for a target, as "sm89", and returns the engine's layers and its bytes.

    Raises:
        BackendError: a graph that does not build.
    """
    trt = api.trt
    messages: list[str] = []

    class Log(type(api.log)):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            super().log(severity, message)
            if severity == trt.ILogger.VERBOSE:
                messages.append(message)

    before, api.log = api.log, Log()
    try:
        built = api.build(path, [shapes], BuildSettings((target,), detailed=True, user_allocation=True))
    finally:
        api.log = before
    return engine_layers(messages), len(built.engine)
