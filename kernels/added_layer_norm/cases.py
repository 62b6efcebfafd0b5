"""Lists the shapes of the kernel that count, and launches where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ldmseg_fast.kernels.added_layer_norm import host, reference
from ldmseg_fast.kernels.case import Case, meta, normal

TOKENS = ((64, 320), (32, 640), (16, 1280))  # of Stable Diffusion's UNet: side and channels


def cases() -> Iterator[Case]:
    """Yields the cases of the kernel; they reach every entry of its table."""
    for batch in (1, 16):
        for side, channels in TOKENS:

            def make(device, shape=(batch, side * side, channels)):
                vector = torch.ones(shape[2], device=device)
                return normal(*shape, device=device, dtype=torch.bfloat16), vector, vector, vector, 1e-5

            yield Case(
                "added_layer_norm",
                f"[{batch}, {side * side}, {channels}]",
                torch.bfloat16,
                batch,
                make,
                host.added_layer_norm,
                reference.added_layer_norm,
                bytes_moved=4 * batch * channels * side * side,
                headline=side == 64,
            )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch the kernel on meta tensors whose sizes are all 1."""
    vector = meta(1)
    yield partial(host.added_layer_norm, meta(1, 1), None, vector, vector, 1e-5)
