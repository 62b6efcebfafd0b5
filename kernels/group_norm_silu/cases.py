"""Lists the shapes of the kernel that count, and launches where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.kernels.case import Case, meta, normal
from ldmseg_fast.kernels.group_norm_silu import host, reference


def cases() -> Iterator[Case]:
    """Yields the cases of the kernel; they reach every entry of its table."""
    shapes = [(1, 320, 64), (16, 320, 64), (16, 640, 32), (16, 1280, 16), (16, 1280, 8), (1, 128, 512)]

    def forward_backward(x, weight, bias, groups, eps, *rest):
        y, mean, rstd = host.group_norm_silu_forward(x, weight, bias, groups, eps, *rest)
        scale, shift, _, silu = rest[:4]
        grad_y = torch.ones_like(y)
        grads = host.group_norm_silu_backward(grad_y, x, mean, rstd, weight, bias, scale, shift, silu, *rest[4:])
        return y, *grads[:3]

    for batch, channels, size in shapes:
        for dtype in (torch.float16, torch.float32) if (batch, channels) == (16, 320) else (torch.bfloat16,):
            elements = batch * channels * size * size * dtype.itemsize
            name = f"[{batch}, {channels}, {size}, {size}]"

            def make(device, batch=batch, channels=channels, size=size, dtype=dtype):
                x = normal(batch, channels, size, size, device=device, dtype=dtype, channels_last=True)
                weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
                return x, weight, bias, 32, 1e-5, None, None, None, True

            def make_full(device, make=make):
                x, weight, bias, *_ = make(device)
                scale = normal(*x.shape[:2], device=device, dtype=x.dtype)
                return x, weight, bias, 32, 1e-5, scale, scale, torch.randn_like(x), True

            def make_added(device, make=make):
                inputs = make(device)
                return *inputs, torch.ones(inputs[0].shape[:2], device=device)

            about: dict[str, Any] = {"dtype": dtype, "batch": batch, "torch": reference.group_norm_silu}
            headline = dtype == torch.float16
            yield Case(
                "group_norm_silu",
                f"forward {name}",
                make=make,
                triton=lambda *arguments: host.group_norm_silu_forward(*arguments)[0],
                bytes_moved=2 * elements,
                headline=headline,
                **about,
            )
            yield Case(
                "group_norm_silu",
                f"forward, added {name}",  # time embedding
                make=make_added,
                triton=lambda *arguments: host.group_norm_silu_forward(*arguments)[0],
                bytes_moved=2 * elements,
                **about,
            )
            if headline or size in (16, 8):
                yield Case(
                    "group_norm_silu",
                    f"forward, all {name}",  # time embedding and residual
                    make=make_full,
                    triton=lambda *arguments: host.group_norm_silu_forward(*arguments)[0],
                    bytes_moved=3 * elements,
                    **about,
                )
            yield Case(
                "group_norm_silu",
                f"forward, backward {name}",
                make=make,
                triton=forward_backward,
                bytes_moved=5 * elements,
                leaves=(0, 1, 2),
                headline=headline,
                **about,
            )
            yield Case(
                "group_norm_silu",
                f"forward, backward, added {name}",
                make=make_added,
                triton=forward_backward,
                bytes_moved=6 * elements,
                leaves=(0, 1, 2, 9),
                **about,
            )

    halves = ((1, 320, 320, 64), (16, 640, 320, 64), (16, 1280, 640, 32), (1, 320, 320, 128))
    for batch, channels, other, size in halves:
        elements = batch * (channels + other) * size * size * 2
        for join in (True, False):
            what = f"[x, {other}] and its norm" if join else "x + other and its norm"
            yield Case(
                "group_norm_silu",
                f"{what} [{batch}, {channels}, {size}, {size}]",
                torch.bfloat16,
                batch,
                partial(make_halves, (batch, channels, size, size), other if join else channels, join),
                partial(gather_and_normalise, host),
                partial(gather_and_normalise, reference),
                bytes_moved=4 * elements if join else 10 * batch * channels * size * size,
            )


def make_halves(shape: tuple[int, int, int, int], other: int, join: bool, device: torch.device) -> tuple[Any, ...]:
    """Makes the arguments of `gather_and_normalise` for x of `shape`, [B, C, H, W]."""
    batch, channels, *size = shape
    about: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "channels_last": True}
    vector = torch.ones(channels + other if join else channels, device=device)
    return normal(*shape, **about), normal(batch, other, *size, **about), join, vector


def gather_and_normalise(where: Any, x: Tensor, other: Tensor, join: bool, vector: Tensor) -> Tensor:
    """Runs both halves: x is float [B, C, H, W], vector [C] of what is gathered (Wu and He, arXiv 1803.08494).

    `where` is the host or the reference.
    """
    gathered, moments = where.gather_moments(x, other, join, 32, vector.expand(x.shape[0], -1))
    return where.normalise(gathered, moments, vector, vector, 1e-5, True)


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch each kernel on meta tensors of one image and one channel."""

    def run(x: Tensor, scale: Tensor) -> None:
        weight = scale[0]
        for added in (None, scale):
            y, mean, rstd = host.group_norm_silu_forward(x, weight, weight, 1, 1e-5, scale, scale, x, True, added)
            host.group_norm_silu_backward(y, x, mean, rstd, weight, weight, scale, scale, True, added)

    def halves(x: Tensor, scale: Tensor) -> None:
        for join in (False, True):
            gathered, moments = host.gather_moments(x, x, join, 1)
            vector = meta(gathered.shape[1])
            host.normalise(gathered, moments, vector, vector, 1e-5, join)

    yield partial(halves, meta(1, 1, 1, 1), meta(1, 1))
    for size in (1, 256):  # a group at once, and in tiles
        yield partial(run, meta(1, 1, size, size), meta(1, 1))
