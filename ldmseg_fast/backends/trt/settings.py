"""Holds what a builder of engines may do, what it returns, and how engines run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildSettings:
    """Says what a builder may do.

    Attributes:
        targets: compute capabilities ("sm89"), or ("current",) for the GPU at hand, ("same",) for others of its compute
            capability too, ("portable",) for Ampere and later.
        level: builder optimisation level, 0 to 5.
        workspace_gib: scratch memory; 0: no limit.
        strip: leave weights out of the engine; they are put in when it is loaded.
        version_compatible: loadable by later TensorRT versions of the same major.
        detailed: keep layer details in the engine.
        user_allocation: TensorRT-RTX may allocate nothing while it runs, which a CUDA graph needs.
    """

    targets: tuple[str, ...] = ("current",)
    level: int = 3
    workspace_gib: float = 0.0
    strip: bool = False
    version_compatible: bool = False
    detailed: bool = False
    user_allocation: bool = False


@dataclass(frozen=True)
class Built:
    """Holds a serialised engine, the timing cache to keep, and (type, name, outputs) of each layer.

    Layers are the engine's, as its inspector tells them, where a GPU is there and details were asked for; otherwise
    those of the network that it was built from.
    """

    engine: bytes | memoryview  # as TensorRT made it: a copy would be another gigabyte
    timing_cache: bytes
    layers: list[tuple[str, str, str]]


SPECIALIZATIONS = ("lazy", "eager", "none")
GRAPH_STRATEGIES = ("disabled", "whole_graph_capture")


@dataclass(frozen=True)
class RunSettings:
    """Says how TensorRT-RTX runs an engine, in its own words; TensorRT leaves no choice.

    https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-dynamic-shapes.html and
    work-with-cuda-graphs.html.

    Attributes:
        kernel_specialization: one of SPECIALIZATIONS: kernels for the shapes at hand are compiled beside the first
            runs, before the first run, or not at all.
        graph_strategy: one of GRAPH_STRATEGIES: whether it captures CUDA graphs itself.
    """

    kernel_specialization: str = "lazy"
    graph_strategy: str = "disabled"
