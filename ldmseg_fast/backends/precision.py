"""Chooses what the torch backends compute in, and says what they do instead where the device cannot."""

from __future__ import annotations

import torch

from ldmseg_fast.config.precision import DTYPES
from ldmseg_fast.errors import ArgumentError

PRECISIONS = tuple(DTYPES)


def choose_dtype(precision: str | None, dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Returns the networks' dtype.

    Args:
        precision: one of PRECISIONS, or None.
        dtype: the same as a torch dtype, or None.
        device: where both are None it decides: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ArgumentError: an unknown precision, or both `precision` and `dtype`.
    """
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision is None:
        return dtype or default
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision={precision!r}: one of {', '.join(PRECISIONS)} expected")
    if dtype is not None:
        raise ArgumentError(f"precision={precision} and dtype={dtype}: give one of them")
    return DTYPES[precision]  # type: ignore[index]
