"""Tells numbers that a network has spoilt: NaN and infinity are an error that names the network, never a map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.errors import NonFiniteError


def all_finite(values: Tensor) -> Tensor:
    """Tells whether all of float [...] are finite: a bool [] on their device, which nothing waits for here.

    Two extremes hold it, because both are NaN where any value is.
    """
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()


def require_finite(finite: Tensor | bool, what: str, info: ModelInfo, dtype: torch.dtype) -> None:
    """Reads what `all_finite` returned, a bool [], which waits for the device.

    Args:
        finite: whether the values are, such as latents float [B, C, h, w].
        what: the network and what it computes, for the error.
        info: of the model.
        dtype: that the network ran in.

    Raises:
        NonFiniteError: they are not.
    """
    if not bool(finite):
        name = str(dtype).removeprefix("torch.")
        wider = (
            "its weights do not fit its configuration, or its training failed: take another checkpoint"
            if dtype == torch.float32
            else "run it in float32, whose range is wider; if that fails too, take another checkpoint"
        )
        raise NonFiniteError(f"{info.folder}: {what} are not finite (NaN or infinity) in {name}; {wider}")


def require_sampled(
    sampled: Tensor | bool,
    encoded: Callable[[], Tensor | bool],
    given: Callable[[], Tensor | bool],
    info: ModelInfo,
    dtype: torch.dtype,
) -> None:
    """Reads whether mask latents are finite, and if not names what made them so.

    Args:
        sampled: what `all_finite` says of mask latents float [B, C, h, w], a bool [].
        encoded, given: what it says of the image latents and of the noise.
        info, dtype: as in `require_finite`.

    Raises:
        NonFiniteError: they are not.
    """
    if not bool(sampled):
        require_finite(encoded(), "image_vae: image latents", info, dtype)
        if not bool(given()):  # noise of seeds is finite
            raise NonFiniteError("latents: the initial noise is not finite (NaN or infinity); give other latents")
        require_finite(False, "unet: sampled latents", info, dtype)
