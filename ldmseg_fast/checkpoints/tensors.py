"""Reads and writes safetensors files, and puts weights into modules with one error that says what does not fit."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldmseg_fast.errors import CheckpointError, UserError
from ldmseg_fast.files import open_file

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
    GPU, so all of them would have to be copied first: the whole model a second time in main memory. This writer copies
    one tensor at a time.

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


def load_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Reads a safetensors file, any shape and dtype; int8 tensors come back as float32 (see `expand_int8`).

    Names lose what wrappers of PyTorch put into them (see `plain_names`).

    Args:
        path: the file.
        prefix: of the names of what is read, which they lose.

    Raises:
        CheckpointError: the file is missing, is something else, or is damaged.
    """
    with opened_weights(path) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
        state = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return expand_int8(plain_names(state, str(path)), str(path))


@contextmanager
def opened_weights(path: Path) -> Iterator[Any]:
    """Opens a safetensors file, as `safetensors.safe_open` does, for a `with` block that reads from it.

    Raises:
        CheckpointError: the file is missing, is something else, or is damaged.
    """
    check_weights_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:  # the last two: unknown types
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: damaged safetensors file ({reason}); copy or save it again") from None


def check_weights_file(path: Path) -> None:
    """Checks by its first bytes that a file may be a safetensors file.

    Raises:
        CheckpointError: it is missing, no plain file, empty, a pointer of Git LFS, or a pickle.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; model folders hold their weights in {WEIGHTS}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise CheckpointError(f"{path}: {kind} where a safetensors file is expected")
    with open_file(path, CheckpointError, "safetensors file") as file:  # which names a pointer of Git LFS
        first = file.read(9)
    if not first:
        raise CheckpointError(f"{path}: damaged safetensors file (it is empty); copy or save it again")
    # the length of a safetensors file's header, in its first 8 bytes, may look like the start of a pickle
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")) and first[8:] != b"{":
        raise CheckpointError(f"{path}: a pickle under the name of a safetensors file; nothing in it was run")


WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_names(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Takes out of names what `torch.compile`, data parallelism and checkpointing put into them, wherever it stands.

    Args:
        state: tensors of any shape and dtype.
        source: names the file, for errors.

    Raises:
        CheckpointError: two tensors that would have one name.
    """
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        own = ".".join(part for part in name.split(".") if part not in WRAPPERS) or name
        if own in plain:
            raise CheckpointError(f"{source}: {own} is there twice, once as {name}; save the weights of one model")
        plain[own] = value
    return plain


INT8_SCALE = ".int8_scale"  # after a tensor's name: its scales


def expand_int8(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Makes float32 of tensors stored as int8 [O, ...] beside scales [O] (see `ship.to_int8`).

    Other tensors stay as they are; the scales are left out.

    Args:
        state: by name.
        source: names the file, for errors.

    Raises:
        CheckpointError: scales without their tensor, or of another length, which would make a larger one of it.
    """
    scales = {name.removesuffix(INT8_SCALE): state[name] for name in state if name.endswith(INT8_SCALE)}
    expanded = {name: value for name, value in state.items() if not name.endswith(INT8_SCALE)}
    for name, scale in scales.items():
        value = state.get(name)
        fits = scale.is_floating_point() and scale.ndim == 1
        if not fits or value is None or value.dtype != torch.int8 or scale.shape != value.shape[:1]:
            raise CheckpointError(
                f"{source}: {name}{INT8_SCALE} does not fit its tensor, so the file is damaged; copy or save it again"
            )
        expanded[name] = value.float() * scale.float().view(-1, *[1] * (value.ndim - 1))
    return expanded


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads tensors, any shape and dtype, into a module; `source` names where they come from.

    A module on the meta device takes the tensors themselves, in float32, instead of copying them.

    Raises:
        CheckpointError: listing what is missing, extra, of another shape or type, or not finite.
    """
    check_state(module.state_dict(), state, source)
    if any(parameter.is_meta for parameter in module.parameters()):
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        module.load_state_dict(state, assign=True)
    else:
        module.load_state_dict(state)


def check_state(own: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Compares names, shapes and types of tensors with those that a module has of its own, and looks for NaN.

    One pass over the values finds NaN and infinity; tensors on the meta device have none.

    Args:
        own: the module's, any shape and dtype.
        state: those that are to be loaded; float16, bfloat16, float32 or float64 where the module's are floats.
        source: names the file, for errors.

    Raises:
        CheckpointError: listing what `state` lacks, has too much, or has in another shape or type than `own`; or what
            is not finite.
    """
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    types = [
        f"{key} {value.dtype}"
        for key, value in state.items()
        if key in own and value.dtype not in (FLOATS if own[key].is_floating_point() else (own[key].dtype,))
    ]
    problems = [
        f"{len(items)} {kind}: {', '.join(items[:5])}{', ...' if len(items) > 5 else ''}"
        for kind, items in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", shapes),
            ("of another type", types),
        )
        if items
    ]
    if problems:
        raise CheckpointError(f"{source}: weights of another architecture; " + "; ".join(problems))
    check_finite(state, source)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_finite(state: dict[str, Tensor], source: str, dtype: torch.dtype | None = None) -> None:
    """Checks that every float is finite, and stays finite in `dtype`; one pass over the values.

    Args:
        state: tensors of any shape and dtype; those on the meta device and integers are passed over.
        source: names the file, for errors.
        dtype: that they are going to have; None: their own, at most float32.

    Raises:
        CheckpointError: names the tensors.
    """
    wrong = []
    for name, value in state.items():
        if value.is_meta or not value.is_floating_point() or not value.numel():
            continue
        most = torch.finfo(dtype or (torch.float32 if value.dtype == torch.float64 else value.dtype)).max
        low, high = (float(limit) for limit in torch.aminmax(value.detach()))
        if not (-most <= low and high <= most):  # NaN is in no range
            wrong.append((name, low, high))
    if not wrong:
        return
    names = ", ".join(name for name, _, _ in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
    large = [max(-low, high) for _, low, high in wrong]
    if dtype is not None and all(size <= torch.finfo(torch.float32).max for size in large):
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors have values up to {max(large):.3g}, which {dtype} does not hold: {names}; "
            f"use bfloat16 or float32"
        )
    raise CheckpointError(
        f"{source}: {len(wrong)} tensors are not finite (NaN or infinity): {names}; the file is damaged or its "
        f"training failed: take an older checkpoint, or copy it again"
    )


@contextmanager
def at_most(state: dict[str, Tensor], source: str) -> Iterator[None]:
    """Ends the building of a network inside the block once it has far more parameters than `state` has tensors.

    A configuration of 10^9 layers would else build modules without end, although none of them holds memory on the meta
    device. Other threads may build what they like meanwhile.

    Args:
        state: tensors of any shape and dtype.
        source: names their file, for errors.

    Raises:
        CheckpointError: too many, or sizes that PyTorch refuses.
    """
    limit, found, thread = 2 * len(state) + 100, 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal found
        if threading.get_ident() == thread:
            found += 1
            if found > limit:
                raise CheckpointError(
                    f"{source}: weights of another architecture; the configuration beside it describes over {limit} "
                    f"tensors, and {len(state)} are there"
                )

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or not _is_of_torch(error):
            raise
        # of widths that groups or heads do not divide
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: no network can be built from the configuration beside it: {reason}") from None
    finally:
        hook.remove()


def _is_of_torch(error: Exception) -> bool:
    """Whether PyTorch's own code raised an error, rather than ours."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(str(Path(torch.__file__).parent))
