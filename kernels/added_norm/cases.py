"""Lists the shapes of the kernels that count, and launches where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ldmseg_fast.kernels.added_norm import host, reference
from ldmseg_fast.kernels.case import Case, meta, normal

# of Stable Diffusion's UNet: side and channels before its group normalisations, and of its tokens
GROUPS = ((64, 320), (64, 640), (64, 960), (32, 320), (32, 640), (32, 1920), (16, 1280), (16, 2560), (8, 1280))
TOKENS = ((64, 320), (32, 640), (16, 1280))


def cases() -> Iterator[Case]:
    """Yields the cases of the kernels; they reach every entry of their table."""
    for batch in (1, 16):
        for side, channels in GROUPS:
            headline = (side, channels) == (64, 320)

            def make(device, shape=(batch, channels, side, side)):
                x = normal(*shape, device=device, dtype=torch.bfloat16, channels_last=True)
                vector = torch.ones(shape[1], device=device)
                return x, torch.ones(shape[:2], device=device), vector, vector, 32, 1e-5, True

            yield Case(
                "added_norm",
                f"group [{batch}, {channels}, {side}, {side}]",
                torch.bfloat16,
                batch,
                make,
                host.added_group_norm,
                reference.added_group_norm,
                bytes_moved=4 * batch * channels * side * side,
                headline=headline,
            )
        for side, channels in TOKENS:

            def make_tokens(device, shape=(batch, side * side, channels)):
                vector = torch.ones(shape[2], device=device)
                return normal(*shape, device=device, dtype=torch.bfloat16), vector, vector, vector, 1e-5

            yield Case(
                "added_norm",
                f"layer [{batch}, {side * side}, {channels}]",
                torch.bfloat16,
                batch,
                make_tokens,
                host.added_layer_norm,
                reference.added_layer_norm,
                bytes_moved=4 * batch * channels * side * side,
                headline=side == 64,
            )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch each kernel on meta tensors of one image and one channel."""
    vector = meta(1)
    for size in (1, 256):  # a group at once, and in tiles
        for added in (None, meta(1, 1)):
            yield partial(host.added_group_norm, meta(1, 1, size, size), added, vector, vector, 1, 1e-5, True)
    yield partial(host.added_layer_norm, meta(1, 1), None, vector, vector, 1e-5)
