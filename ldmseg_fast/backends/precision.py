"""Chooses what the torch backends compute in, and says what they do instead where the device cannot."""

from __future__ import annotations

import warnings

import torch

from ldmseg_fast.config.precision import DTYPES, NAMES
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.kernels.attention import why_not_fp8
from ldmseg_fast.models.attention import check_backend
from ldmseg_fast.models.fp8_layers import why_not_fp8_products

PRECISIONS = (*DTYPES, "fp8", "fp8-emulated")


def choose_precision(
    precision: str | None, dtype: torch.dtype | None, device: torch.device
) -> tuple[torch.dtype, bool]:
    """Returns the networks' dtype, and whether the UNet multiplies e4m3 numbers; see `models.fp8_layers`.

    Args:
        precision: one of PRECISIONS, or None. "fp8" is the default where the device has no such products, with a
            warning; "fp8-emulated" computes the same numbers anywhere, slowly.
        dtype: the same as a torch dtype, or None.
        device: where both are None it decides: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ArgumentError: an unknown precision, or both `precision` and `dtype`.
    """
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision is None:
        return dtype or default, False
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision={precision!r}: one of {', '.join(PRECISIONS)} expected")
    if dtype is not None:
        raise ArgumentError(f"precision={precision} and dtype={dtype}: give one of them")
    if precision == "fp8" and (reason := why_not_fp8_products(device)):
        text = f"precision=fp8: it {reason}; {NAMES[default]} is computed instead, as without the option"
        warnings.warn(text, stacklevel=4)
        return default, False
    return (DTYPES[precision], False) if precision in DTYPES else (default, True)  # type: ignore[index]


def choose_attention(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the attention of a model of `dtype` on `device`; with a warning "auto" for an "fp8" that cannot run there.

    Args:
        attention: one of `models.attention.BACKENDS`.

    Raises:
        ArgumentError, BackendError: see `models.attention.check_backend`.
    """
    if attention == "fp8" and (reason := why_not_fp8(device, dtype)):
        text = f"attention=fp8: it {reason}; attention=auto is computed instead, as without the option"
        warnings.warn(text, stacklevel=4)
        return "auto"
    check_backend(attention, device, dtype)
    return attention
