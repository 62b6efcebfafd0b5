"""Gathers the shapes that count: what is compiled ahead of time, what the roofline prints and what benchmarks time.

Every kernel's `cases.py` holds its own. Bytes are what must cross the memory bus at least once, operations those of
matrix products, exponentials those of the method; padding and recomputation are not counted, so a floor is a floor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import KERNELS

Function = Callable[..., Any]
SLOTS = 128


@dataclass(frozen=True)
class Case:
    """Describes one kernel at one shape."""

    kernel: str  # its folder
    name: str
    dtype: torch.dtype
    batch: int
    make: Callable[[torch.device], tuple[Any, ...]]
    triton: Function  # of what `make` returns; with `leaves`, the forward and the gradients of ones
    torch: Function  # the forward in plain torch
    bytes_moved: int
    operations: int = 0
    exponentials: int = 0
    fp8: bool = False  # products of e4m3 operands: for sm_89 and newer
    leaves: tuple[int, ...] = ()  # arguments to differentiate by: the case is forward and backward
    headline: bool = False  # measured first, and against torch.compile


def all_cases() -> list[Case]:
    """Gathers the cases of every kernel; together they reach every shipped configuration at least once."""
    return [case for kernel in KERNELS for case in _own_cases(kernel).cases()]


def edge_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields (kernel folder, a function that launches its kernels on meta tensors whose sizes are 1).

    The compiler turns such sizes into constants, which must build as well.
    """
    for kernel in KERNELS:
        for run in _own_cases(kernel).edge_cases():
            yield kernel, run


def _own_cases(kernel: str) -> Any:
    return import_module(f"ldmseg_fast.kernels.{kernel}.cases")


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Makes a tensor of any shape and dtype without memory, for recorded launches."""
    return torch.empty(shape, dtype=dtype, device="meta")


def normal(*shape: int, device: torch.device, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """Draws normal numbers of any shape and of `dtype`, in channels_last if asked."""
    tensor = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def random_ids(batch: int, size: int, device: torch.device) -> Tensor:
    """Draws uint8 [B, size, size] of blobs, as maps have them, not noise."""
    coarse = torch.randint(0, SLOTS, (batch, size // 32, size // 32), device=device, dtype=torch.uint8)
    return coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)


def blob_logits(batch: int, slots: int, size: int, device: torch.device, dtype: torch.dtype, last: bool) -> Tensor:
    """Draws logits [B, slots, size, size] of `dtype`, as of a confident decoder.

    They are noise, and one slot that stands out per region.
    """
    ids = random_ids(batch, size, device).long() % slots
    logits = normal(batch, slots, size, size, device=device, dtype=dtype)
    logits.scatter_add_(1, ids[:, None], torch.full_like(logits[:, :1], 12.0))
    return logits.contiguous(memory_format=torch.channels_last) if last else logits
