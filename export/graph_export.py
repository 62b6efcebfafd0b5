"""Exports one module as one checked ONNX file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmseg_fast.backends.graphs.manifest import GraphFile, hash_files
from ldmseg_fast.backends.graphs.specs import GraphSpec, TensorSpec, sample_inputs
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.onnx_backend import ONNX_TYPES
from ldmseg_fast.export.output_folder import ExportError

OPSETS = range(18, 24)
EMBEDDED_BYTES = 64 * 2**20  # larger weights go into a file of their own


def export_graph(
    spec: GraphSpec,
    module: nn.Module,
    info: ModelInfo,
    folder: Path,
    opset: int,
    metadata: dict[str, str],
    edits: Sequence[Callable[[Any], None]] = (),
) -> GraphFile:
    """Traces, translates, simplifies, saves and checks one graph.

    Args:
        spec: names, dtypes and axes that the file must have.
        module: what it computes, see `backends.graphs`.
        folder: gets NAME.onnx, and NAME.onnx.data where the weights are large.
        metadata: written into the file.
        edits: change the `onnx_ir.Model` before it is saved, one after the other.

    Raises:
        ExportError: a graph whose inputs or outputs are not the spec's.
    """
    sizes = example_sizes(spec, info)
    inputs = sample_inputs(spec, info, sizes)
    file = f"{spec.name}.onnx"
    with quiet("torch.onnx"), torch.no_grad():
        program: Any = torch.onnx.export(
            module,
            (),
            kwargs=inputs,
            dynamo=True,
            opset_version=opset,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes={tensor.name: _dynamic_axes(tensor) for tensor in spec.inputs},
            verbose=False,
        )
    _name_axes(program.model, spec)
    for edit in edits:
        edit(program.model)
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of source code, by their paths here
    program.model.metadata_props.update(metadata)
    weight_bytes = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    external = weight_bytes > EMBEDDED_BYTES
    program.save(str(folder / file), external_data=external)
    weights = f"{file}.data" if external else None
    check_graph(folder / file, spec)
    return GraphFile(spec, file, weights, hash_files(folder, file, weights))


def example_sizes(spec: GraphSpec, info: ModelInfo) -> dict[str, int]:
    """Returns sizes to trace with: 2 where a dynamic batch must not be taken for a constant."""
    side = info.latent_shape[1]
    multiple = info.size_multiple // info.mask_vae.downsampling
    sizes = {"batch": 2, "latent_height": max(side, 2 * multiple), "latent_width": max(side, 2 * multiple) + multiple}
    return {axis: sizes[axis] for axis in spec.axes}


def _dynamic_axes(tensor: TensorSpec) -> dict[int, Any]:
    return {index: torch.export.Dim.DYNAMIC for index, axis in enumerate(tensor.shape) if isinstance(axis, str)}


def _name_axes(model: Any, spec: GraphSpec) -> None:
    """Gives the axes that the exporter numbered the spec's names."""
    names: dict[str, str] = {}
    for value, tensor in zip((*model.graph.inputs, *model.graph.outputs), (*spec.inputs, *spec.outputs)):
        for found, axis in zip(value.shape or (), tensor.shape):
            if isinstance(axis, str) and "*" not in axis and not isinstance(found, int):
                names[str(found)] = axis
    for value in (*model.graph.inputs, *model.graph.outputs):
        for index, found in enumerate(value.shape or ()):
            if not isinstance(found, int) and str(found) in names:
                value.shape[index] = names[str(found)]


def check_graph(path: Path, spec: GraphSpec) -> None:
    """Runs ONNX's own checker with shape inference, then compares names, dtypes and ranks with the spec.

    Raises:
        ExportError: says what differs.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: no valid ONNX ({str(error)[:400]})") from None
    graph = onnx.load(str(path), load_external_data=False).graph
    for kind, values, tensors in (("inputs", graph.input, spec.inputs), ("outputs", graph.output, spec.outputs)):
        found = [_signature(value) for value in values]
        expected = [(tensor.name, ONNX_TYPES[tensor.dtype], _axis_kinds(tensor)) for tensor in tensors]
        if found != expected:
            raise ExportError(f"{path}: {kind} are {found}, the spec says {expected}")


def _signature(value: Any) -> tuple[str, int, list[int | None]]:
    tensor = value.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    return value.name, tensor.elem_type, sizes


def _axis_kinds(tensor: TensorSpec) -> list[int | None]:
    return [axis if isinstance(axis, int) else None for axis in tensor.shape]


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Silences warnings, and all but the errors of a logger, inside a `with` block."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
