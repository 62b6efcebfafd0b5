"""Lists the shapes of the kernel that count, and a launch where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ldmseg_fast.kernels.case import Case, meta, normal
from ldmseg_fast.kernels.convolution import host, reference

LEVELS = ((64, 320), (32, 640), (16, 1280), (8, 1280))  # of Stable Diffusion's UNet: side and channels
LATENTS = 12  # channels that the UNet reads
E4M3 = torch.float8_e4m3fn


def cases() -> Iterator[Case]:
    """Yields the UNet's 3x3 convolutions; they reach every entry of the tables."""
    for batch in (1, 16):
        for side, channels in LEVELS:
            made: dict[str, tuple[int, int, dict[str, Any]]] = {  # side and channels of the input, what else
                "conv1": (side, channels, {"added": True, "num_groups": 32}),
                "conv1 of joined features": (side, 2 * channels, {"added": True, "num_groups": 32}),
                "conv2": (side, channels, {"bias": True, "residual": True, "num_groups": 32}),
                "conv2 beside a shortcut": (side, channels, {}),
                "fp8": (side, channels, {"bias": True, "fp8": True}),
                "fp8 with moments": (side, channels, {"bias": True, "fp8": True, "num_groups": 32}),
            }
            if side == 64:
                made["conv_in"] = (side, LATENTS, {"bias": True, "num_groups": 32})
            if side > 8:
                inputs = 640 if side == 32 else channels  # of the level above, doubled, in the up path
                made["downsample"] = (side, channels, {"bias": True, "stride": 2, "num_groups": 32})
                made["upsample"] = (side // 2, inputs, {"bias": True, "upsample": True})
            for name, (input_side, inputs, what) in made.items():
                yield _case(name, batch, input_side, inputs, channels, what)


def _case(name: str, batch: int, side: int, inputs: int, outputs: int, what: dict[str, Any]) -> Case:
    made_side = side * 2 if what.get("upsample") else side // what.get("stride", 1)
    fp8 = what.get("fp8", False)
    read = batch * side**2 * inputs + 9 * inputs * outputs
    written = batch * made_side**2 * outputs * (1 + ("residual" in what))
    return Case(
        "convolution",
        f"{name} [{batch}, {inputs}, {side}, {side}]",
        torch.bfloat16,
        batch,
        partial(make, (batch, inputs, side, side), outputs, what),
        lambda *arguments: host.convolution(*arguments)[0],
        lambda *arguments: reference.convolution(*arguments)[0],
        bytes_moved=read * (1 if fp8 else 2) + 2 * written,
        operations=2 * batch * made_side**2 * outputs * 9 * inputs,
        fp8=fp8,
        headline=name in ("conv2", "fp8") and side == 64 and batch == 1,
    )


def make(shape: tuple[int, int, int, int], outputs: int, what: dict[str, Any], device: torch.device) -> tuple[Any, ...]:
    """Makes the arguments of `host.convolution` for x of `shape`, [B, C, h, w]."""
    batch, inputs, _, _ = shape
    half: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "channels_last": True}
    x, weight = normal(*shape, **half), normal(outputs, inputs, 3, 3, **half)
    stride, upsample, fp8 = what.get("stride", 1), what.get("upsample", False), what.get("fp8", False)
    residual = None
    if "residual" in what:
        residual = normal(*reference.result_shape(x, weight, stride, upsample), **half)
    return (
        *((x.to(E4M3), weight.to(E4M3)) if fp8 else (x, weight)),
        torch.ones(outputs, device=device) if "bias" in what else None,
        torch.ones(batch, outputs, device=device) if "added" in what else None,
        residual,
        *(torch.ones(size, device=device) if fp8 else None for size in (batch, outputs)),
        *(stride, upsample, what.get("num_groups", 0), torch.bfloat16),
    )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch the kernel on meta tensors whose sizes are all 1."""
    x, weight, vector, half = meta(1, 1, 1, 1), meta(1, 1, 3, 3), meta(1), torch.float16
    yield partial(host.convolution, x, weight, None, None, None, None, None, 1, False, 0, half)
    yield partial(host.convolution, x, weight, vector, meta(1, 1), x, None, None, 1, False, 1, half)
    yield partial(host.convolution, x, weight, vector, None, None, None, None, 2, True, 0, half)
    one = meta(1, dtype=torch.float32)
    small = (meta(1, 1, 1, 1, dtype=E4M3), meta(1, 1, 3, 3, dtype=E4M3))
    yield partial(host.convolution, *small, vector, None, None, one, one, 1, False, 1, half)
