"""Lists the shapes of the kernel that count, and a launch where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ldmseg_fast.kernels.case import Case, meta, normal
from ldmseg_fast.kernels.group_norm_silu.reference import find_moments
from ldmseg_fast.kernels.linear import host, reference

TOKENS = ((64, 320), (32, 640), (16, 1280), (8, 1280))  # of Stable Diffusion's UNet: side and channels


def cases() -> Iterator[Case]:
    """Yields the layers of a transformer that are more than a product; they reach every entry of its table."""
    for batch in (1, 16):
        for side, channels in TOKENS:
            pixels, wide = side * side, 4 * channels
            layers: dict[str, tuple[int, int, dict[str, Any]]] = {  # inputs, outputs, what else
                "proj_in": (channels, channels, {"gain": channels, "moments": 32}),
                "qkv": (channels, 3 * channels, {"gain": channels, "bias": False}),
                "to_out": (channels, channels, {"residual": True}),
                "GEGLU": (channels, wide, {"gain": channels, "gated": True}),
                "proj_out": (channels, channels, {"beside": wide, "residual": True, "num_groups": 32}),
            }
            for name, (inputs, outputs, what) in layers.items():
                columns = inputs + what.get("beside", 0)
                rows = outputs * (2 if "gated" in what else 1)
                moved = batch * pixels * (columns + outputs * (1 + ("residual" in what))) + rows * columns
                yield Case(
                    "linear",
                    f"{name} [{batch}, {pixels}, {inputs}]",
                    torch.bfloat16,
                    batch,
                    partial(make, (batch, pixels, inputs), outputs, what),
                    lambda *arguments: host.linear(*arguments)[0],
                    lambda *arguments: reference.linear(*arguments)[0],
                    bytes_moved=2 * moved,
                    operations=2 * batch * pixels * rows * columns,
                    headline=side == 64 and batch == 1,
                )


def make(shape: tuple[int, int, int], outputs: int, what: dict[str, Any], device: torch.device) -> tuple[Any, ...]:
    """Makes the arguments of `host.linear` for x of `shape`, [B, P, K]."""
    batch, pixels, inputs = shape
    half: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x = normal(batch, pixels, inputs, **half)
    rows = outputs * (2 if what.get("gated") else 1)
    weight = normal(rows, inputs + what.get("beside", 0), **half)
    gain = torch.ones(inputs, device=device) if "gain" in what else None
    moments = find_moments(x.transpose(1, 2)[..., None], what["moments"]) if "moments" in what else None
    return (
        *(x, weight, torch.ones(rows, device=device) if what.get("bias", True) else None, gain, gain, 1e-5, moments),
        normal(batch, pixels, what["beside"], **half) if "beside" in what else None,
        normal(batch, pixels, outputs, **half) if "residual" in what else None,
        *(bool(what.get("gated")), what.get("num_groups", 0)),
    )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch the kernel on meta tensors whose sizes are all 1."""
    x, vector, weight = meta(1, 1, 1), meta(1), meta(1, 1)
    moments = meta(1, 2, 1, 1, dtype=torch.float32)
    yield partial(host.linear, x, weight)
    yield partial(host.linear, x, meta(2, 1), meta(2), vector, vector, 1e-5, None, None, x, True)
    yield partial(host.linear, x, meta(1, 2), vector, None, None, 0.0, None, x, x)
    yield partial(host.linear, x, weight, None, vector, vector, 1e-5, moments, None, x, False, 1)
