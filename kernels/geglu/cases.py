"""Lists the shapes of the kernel that count, and a launch where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ldmseg_fast.kernels.case import Case, meta, normal
from ldmseg_fast.kernels.geglu import host, reference


def cases() -> Iterator[Case]:
    """Yields the cases of the kernel; they reach every entry of its table."""
    for batch in (1, 16):
        for side, channels in ((64, 1280), (32, 2560), (16, 5120)):
            shape = (batch, side * side, 2 * channels)
            yield Case(
                "geglu",
                f"[{batch}, {side * side}, {2 * channels}]",
                torch.bfloat16,
                batch,
                lambda device, shape=shape: (normal(*shape, device=device, dtype=torch.bfloat16),),
                host.geglu,
                reference.geglu,
                bytes_moved=6 * batch * side * side * channels,
                headline=side == 64,
            )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields a function that launches the kernel on a meta tensor of one value and one gate."""
    yield partial(host.geglu, meta(1, 2))
