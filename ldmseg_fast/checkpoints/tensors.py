"""Reads and writes safetensors files, and puts weights into modules with one error that says what does not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldmseg_fast.errors import CheckpointError

WEIGHTS = "model.safetensors"


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Writes tensors of any shape, dtype, layout and device as a safetensors file, which is on disk when this returns.

    `safetensors.torch.save_file` takes contiguous tensors only. A stage in training has them in channels_last, or on a
    GPU,
    so all of them would have to be copied first: the whole model a second time in main memory. This writer copies one
    tensor at a time.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {}
    end = 0
    # widest elements first, so that every tensor starts at a multiple of its element's size
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))
    for name in names:
        tensor = state[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if state[name].numel():
                data = state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(data.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, any shape and dtype; int8 tensors come back as float32 (see `expand_int8`).

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; model folders hold their weights in {WEIGHTS}")
    try:
        return expand_int8(load_file(path))
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:  # the last two: int8 without fitting scales
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); copy or save it again") from None


INT8_SCALE = ".int8_scale"  # after a tensor's name: its scales


def expand_int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Makes float32 of tensors stored as int8 [O, ...] beside scales [O] (see `ship.to_int8`).

    Other tensors stay as they are; the scales are left out.
    """
    scales = {name.removesuffix(INT8_SCALE): state[name] for name in state if name.endswith(INT8_SCALE)}
    expanded = {name: value for name, value in state.items() if not name.endswith(INT8_SCALE)}
    for name, scale in scales.items():
        expanded[name] = state[name].float() * scale.float().view(-1, *[1] * (state[name].ndim - 1))
    return expanded


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads tensors, any shape and dtype, into a module; `source` names where they come from.

    A module on the meta device takes the tensors themselves, in float32, instead of copying them.

    Raises:
        CheckpointError: listing what is missing, extra, or of another shape.
    """
    check_state(module.state_dict(), state, source)
    if any(parameter.is_meta for parameter in module.parameters()):
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        module.load_state_dict(state, assign=True)
    else:
        module.load_state_dict(state)


def check_state(own: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Compares names and shapes of tensors, any shape and dtype, with those that a module has of its own.

    Raises:
        CheckpointError: listing what `state` lacks, has too much, or has in another shape than `own`.
    """
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    problems = [
        f"{len(items)} {kind}: {', '.join(items[:5])}{', ...' if len(items) > 5 else ''}"
        for kind, items in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        if items
    ]
    if problems:
        raise CheckpointError(f"{source}: weights of another architecture; " + "; ".join(problems))
