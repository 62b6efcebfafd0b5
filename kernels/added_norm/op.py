"""Runs Triton on CUDA and the reference elsewhere; opaque to torch.compile. There is no gradient."""

import torch
from torch import Tensor

from ldmseg_fast.kernels.added_norm import reference
from ldmseg_fast.kernels.backend import in_format, require, require_groups, require_same_device, runs_reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def added_group_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """Computes group_norm(x + added) (Wu and He, arXiv 1803.08494), and SiLU of it if asked. For inference.

    The vector, a convolution's bias and a time embedding, is added before the statistics, in the same pass.

    Args:
        x: [B, C, H, W] float16, bfloat16 or float32. The kernel works in channels_last and copies another layout first.
        added: float [B, C], or None.
        weight, bias: [C], any float dtype.
        num_groups: G, a divisor of C.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        [B, C, H, W] of x's dtype, channels_last on CUDA; arithmetic in float32.

    Raises:
        ValueError: wrong shape, dtype or device, C not divisible by G, or a gradient is wanted.
    """
    _refuse_gradients(x, added, weight, bias)
    args = (x, added, weight, bias, num_groups, eps, silu)
    if runs_reference("added_norm", x) or x.dtype not in FLOATS:
        check_group(*args)
        return reference.added_group_norm(*args)
    return added_group_norm_op(*args)


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
    _refuse_gradients(x, added, weight, bias)
    args = (x, added, weight, bias, eps)
    if runs_reference("added_norm", x) or x.dtype not in FLOATS:
        check_layer(*args)
        return reference.added_layer_norm(*args)
    return added_layer_norm_op(*args)


def _refuse_gradients(x: Tensor, *vectors: Tensor | None) -> None:
    wanted = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *vectors))
    require(not wanted, "x: a gradient is wanted, and this is for inference; call it under torch.no_grad()")


def check_group(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> None:
    """Refuses what `added_group_norm` does not take: x is float [B, C, H, W].

    Raises:
        ValueError: wrong shape, dtype or device, C not divisible by G; the message starts with the argument's name.
    """
    require(x.ndim == 4, "x: expected [B, C, H, W], got shape {}", x.shape)
    channels = x.shape[1]
    require_groups(num_groups, channels)
    if added is not None:
        require(added.shape == x.shape[:2], "added: shape {} does not fit x's {}", added.shape, x.shape)
    _check_vectors(x, channels, added, weight, bias)


def check_layer(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Refuses what `added_layer_norm` does not take: x is float [..., C].

    Raises:
        ValueError: wrong shape, dtype or device; the message starts with the argument's name.
    """
    require(x.ndim > 0, "x: expected [..., C], got shape {}", x.shape)
    if added is not None:
        require(added.shape == x.shape[-1:], "added: shape {} does not fit x's {}", added.shape, x.shape)
    _check_vectors(x, x.shape[-1], added, weight, bias)


def _check_vectors(x: Tensor, channels: int, added: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    require(x.is_floating_point(), "x: expected a float tensor, got {}", x.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(tensor.shape == (channels,), "{}: expected [{}], got shape {}", name, channels, tensor.shape)
    require_same_device(x, added=added, weight=weight, bias=bias)


@torch.library.custom_op("ldmseg_fast::added_group_norm", mutates_args=())
def added_group_norm_op(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """Runs `added_group_norm`, with its arguments.

    Returns:
        [B, C, H, W] of x's dtype in channels_last.

    Raises:
        ValueError: see `check_group`.
    """
    check_group(x, added, weight, bias, num_groups, eps, silu)
    y = reference.added_group_norm(x, added, weight, bias, num_groups, eps, silu)
    return in_format(y, torch.channels_last)


@added_group_norm_op.register_kernel("cuda")
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    from ldmseg_fast.kernels.added_norm import host  # Triton is imported on CUDA only

    check_group(x, added, weight, bias, num_groups, eps, silu)
    return host.added_group_norm(x, added, weight, bias, num_groups, eps, silu)


@added_group_norm_op.register_fake
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    check_group(x, added, weight, bias, num_groups, eps, silu)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("ldmseg_fast::added_layer_norm", mutates_args=())
def added_layer_norm_op(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Runs `added_layer_norm`, with its arguments.

    Returns:
        [..., C] of x's dtype, contiguous.

    Raises:
        ValueError: see `check_layer`.
    """
    check_layer(x, added, weight, bias, eps)
    return reference.added_layer_norm(x, added, weight, bias, eps).contiguous()


@added_layer_norm_op.register_kernel("cuda")
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from ldmseg_fast.kernels.added_norm import host

    check_layer(x, added, weight, bias, eps)
    return host.added_layer_norm(x, added, weight, bias, eps)


@added_layer_norm_op.register_fake
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    check_layer(x, added, weight, bias, eps)
    return x.new_empty(x.shape)
