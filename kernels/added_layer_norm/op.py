"""Runs Triton on CUDA and the reference elsewhere; opaque to torch.compile. There is no gradient."""

import torch
from torch import Tensor

from ldmseg_fast.kernels.added_layer_norm import reference
from ldmseg_fast.kernels.backend import (
    require,
    require_floats,
    require_no_gradient,
    require_same_device,
    runs_reference,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def added_layer_norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Computes layer_norm(x + added) (Ba et al., arXiv 1607.06450). For inference.

    Args:
        x: [..., C] float16, bfloat16 or float32.
        added: float [C], or None.
        weight, bias: [C], any float dtype.
        eps: added to the variance.

    Returns:
        [..., C] of x's dtype; arithmetic in float32.

    Raises:
        ValueError: wrong shape, dtype or device, or a gradient is wanted.
    """
    require_no_gradient(x=x, added=added, weight=weight, bias=bias)
    args = (x, added, weight, bias, eps)
    if runs_reference("added_layer_norm", x) or x.dtype not in FLOATS:
        check(*args)
        return reference.added_layer_norm(*args)
    return added_layer_norm_op(*args)


def check(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Refuses what `added_layer_norm` does not take: x is float [..., C].

    Raises:
        ValueError: wrong shape, dtype or device; the message starts with the argument's name.
    """
    require(x.ndim > 0, "x: expected [..., C], got shape {}", x.shape)
    if added is not None:
        require(added.shape == x.shape[-1:], "added: shape {} does not fit x's {}", added.shape, x.shape)
    require_floats(x=x, added=added, weight=weight, bias=bias)
    channels = x.shape[-1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(tensor.shape == (channels,), "{}: expected [{}], got shape {}", name, channels, tensor.shape)
    require_same_device(x, added=added, weight=weight, bias=bias)


@torch.library.custom_op("ldmseg_fast::added_layer_norm", mutates_args=())
def added_layer_norm_op(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Runs `added_layer_norm`, with its arguments.

    Returns:
        [..., C] of x's dtype, contiguous.

    Raises:
        ValueError: see `check`.
    """
    check(x, added, weight, bias, eps)
    return reference.added_layer_norm(x, added, weight, bias, eps).contiguous()


@added_layer_norm_op.register_kernel("cuda")
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from ldmseg_fast.kernels.added_layer_norm import host  # Triton is imported on CUDA only

    check(x, added, weight, bias, eps)
    return host.added_layer_norm(x, added, weight, bias, eps)


@added_layer_norm_op.register_fake
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    check(x, added, weight, bias, eps)
    return x.new_empty(x.shape)
