"""Launches every Triton kernel, so that a check without a GPU can see exactly what would run."""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import Config

UNIT = 8  # strides are passed to kernels in units of 8 elements, so that the compiler sees 16-byte accesses
MAX_GRID = 65535  # programs along the second and third axis


@dataclass(frozen=True)
class Launch:
    """Holds one kernel with the arguments it would have been started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    config: Config
    constants: dict[str, Any]


_recorder: Callable[[Launch], None] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any) -> None:
    """Starts `kernel` on the device of its first tensor, or hands it to `record`; an empty grid starts nothing.

    Args:
        kernel: a @triton.jit function.
        grid: programs along up to three axes.
        arguments: tensors, numbers, and tuples of numbers.
        config: its constants reach the kernel where that has them, its warps and stages always.
        constants: further compile-time constants, which come before those of `config`.

    Raises:
        ValueError: more images (or images times heads, or rows) than one launch may have.
    """
    known = {name: value for name, value in config.constants.items() if name in kernel.arg_names}
    constants = {**known, **constants}
    if _recorder is not None:
        _recorder(Launch(kernel, grid, arguments, config, constants))
        return
    if 0 in grid:
        return
    if max(grid[1:], default=0) > MAX_GRID:
        raise ValueError(f"{kernel.__name__}: a grid of {grid} is more than CUDA starts at once: split the batch")
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        start = partial(kernel[grid], *arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages)
        if constants.get("DESCRIBED"):
            contextvars.copy_context().run(_with_scratch, start)
        else:
            start()


def _with_scratch(start: Callable[[], Any]) -> None:
    """Starts a kernel whose programs keep tensor descriptors in memory; in a context of its own others keep theirs."""
    triton.set_allocator(_scratch)
    start()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Gives a launch `size` bytes of the current device; PyTorch's blocks start on 512, as much as any `alignment`."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collects launches instead of starting them; arguments may be meta tensors."""
    global _recorder
    launches: list[Launch] = []
    before, _recorder = _recorder, launches.append
    try:
        yield launches
    finally:
        _recorder = before


def in_units(tensor: Tensor) -> Tensor:
    """Copies a tensor [..., d] unless kernels can read it where it lies.

    They can where it starts on 16 bytes, its last axis is dense and its strides are multiples of `UNIT`.
    """
    dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    whole = all(stride % UNIT == 0 for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1]) if size > 1)
    aligned = tensor.is_meta or tensor.data_ptr() % 16 == 0
    return tensor if dense and whole and aligned else tensor.clone(memory_format=torch.contiguous_format)
