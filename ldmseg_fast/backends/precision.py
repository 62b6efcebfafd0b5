"""Chooses what the torch backends compute in, and says what they do instead where the device cannot."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from ldmseg_fast.config.precision import DTYPES, NAMES
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.kernels.attention import why_not_fp8
from ldmseg_fast.kernels.configs import current_architecture
from ldmseg_fast.models.attention import check_backend
from ldmseg_fast.models.fp8_layers import why_not_fp8_products

PRECISIONS = (*DTYPES, "tf32", "fp8", "fp8-emulated")
COMPUTED = (*DTYPES.values(), torch.float64)


class Precision(NamedTuple):
    """Says what networks compute in: a dtype, and whether products are of e4m3 numbers or of float32 cut to TF32."""

    dtype: torch.dtype
    fp8: bool = False
    tf32: bool = False


def choose_precision(precision: str | None, dtype: torch.dtype | None, device: torch.device) -> Precision:
    """Chooses what networks compute in.

    Args:
        precision: one of PRECISIONS, or None. With "fp8" the UNet multiplies e4m3 numbers, see `models.fp8_layers`;
            where the device has no such products it is the default, with a warning. "fp8-emulated" computes the same
            numbers anywhere, slowly. "tf32" is float32 whose products a GPU rounds; elsewhere "fp32", with a warning.
        dtype: the same as a torch dtype, or None.
        device: where both are None it decides: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ArgumentError: an unknown precision, a dtype that is none of COMPUTED, or both.
    """
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in COMPUTED):
        raise ArgumentError(f"dtype={dtype!r}: one of {', '.join(map(str, COMPUTED))} expected")
    if precision is None:
        return Precision(dtype or default)
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision={precision!r}: one of {', '.join(PRECISIONS)} expected")
    if dtype is not None:
        raise ArgumentError(f"precision={precision} and dtype={dtype}: give one of them")
    if precision == "fp8" and (reason := why_not_fp8_products(device)):
        text = f"precision=fp8: it {reason}; {NAMES[default]} is computed instead, as without the option"
        warnings.warn(text, stacklevel=4)
        return Precision(default)
    if precision == "tf32":
        sm = current_architecture() if device.type == "cuda" else 0
        if sm < 80:
            found = f"sm_{sm}" if sm else device.type
            text = f"precision=tf32: it needs a GPU of sm_80 or newer, not {found}; fp32 is computed instead"
            warnings.warn(text, stacklevel=4)
        return Precision(torch.float32, tf32=True)
    return Precision(DTYPES[precision]) if precision in DTYPES else Precision(default, fp8=True)


def choose_attention(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the attention of a model: with a warning "auto" in the place of an "fp8" that cannot run.

    Args:
        attention: one of `models.attention.BACKENDS`.
        device, dtype: of the model.

    Raises:
        ArgumentError, BackendError: see `models.attention.check_backend`.
    """
    if attention == "fp8" and (reason := why_not_fp8(device, dtype)):
        text = f"attention=fp8: it {reason}; attention=auto is computed instead, as without the option"
        warnings.warn(text, stacklevel=4)
        return "auto"
    check_backend(attention, device, dtype)
    return attention
