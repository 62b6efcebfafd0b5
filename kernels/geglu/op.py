"""Runs Triton on CUDA and the reference elsewhere; opaque to torch.compile. There is no gradient."""

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import require, require_no_gradient, runs_reference
from ldmseg_fast.kernels.geglu import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def geglu(x: Tensor) -> Tensor:
    """Computes value * gelu(gate) of x = [value, gate] (Shazeer, arXiv 2002.05202, equation 6). For inference.

    Args:
        x: [..., 2 C] float16, bfloat16 or float32.

    Returns:
        [..., C] of x's dtype; arithmetic in float32.

    Raises:
        ValueError: an odd number of channels, no float tensor, or a gradient is wanted.
    """
    require_no_gradient(x=x)
    if runs_reference("geglu", x) or x.dtype not in FLOATS:
        check(x)
        return reference.geglu(x)
    return geglu_op(x)


def check(x: Tensor) -> None:
    """Refuses what `geglu` does not take: x is float [..., 2 * C].

    Raises:
        ValueError: an odd number of channels, or no float tensor; the message starts with the argument's name.
    """
    require(x.ndim > 0 and x.shape[-1] % 2 == 0, "x: expected [..., 2 C], got shape {}", x.shape)
    require(x.is_floating_point(), "x: expected a float tensor, got {}", x.dtype)


@torch.library.custom_op("ldmseg_fast::geglu", mutates_args=())
def geglu_op(x: Tensor) -> Tensor:
    """Runs `geglu`: [..., 2 C] to [..., C] of x's dtype, contiguous.

    Raises:
        ValueError: see `check`.
    """
    check(x)
    return reference.geglu(x).contiguous()


@geglu_op.register_kernel("cuda")
def _(x: Tensor) -> Tensor:
    from ldmseg_fast.kernels.geglu import host  # Triton is imported on CUDA only

    check(x)
    return host.geglu(x)


@geglu_op.register_fake
def _(x: Tensor) -> Tensor:
    check(x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
