"""Runs Triton on CUDA and the reference elsewhere; opaque to torch.compile, differentiable."""

from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import (
    in_format,
    require,
    require_floats,
    require_groups,
    require_same_device,
    runs_reference,
)
from ldmseg_fast.kernels.group_norm_silu import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
    added: Tensor | None = None,
) -> Tensor:
    """Computes silu(group_norm(x + added) (1 + scale) + shift) + residual (Wu and He, arXiv 1803.08494).

    Args:
        x: [B, C, H, W] float16, bfloat16 or float32. The kernel works in channels_last and copies another layout first.
        weight, bias: [C], any float dtype.
        num_groups: G, a divisor of C.
        eps: added to the variance.
        scale, shift: [B, C] from the time embedding, or None.
        residual: [B, C, H, W] of x's dtype, or None.
        silu: False leaves the activation out.
        added: [B, C], a time embedding or a convolution's bias, added before the statistics in the same pass, or None.

    Returns:
        [B, C, H, W] of x's dtype, channels_last on CUDA; statistics in float32.

    Raises:
        ValueError: wrong shape, dtype or device, C not divisible by G.
    """
    args = (x, weight, bias, num_groups, eps, scale, shift, residual, silu, added)
    if runs_reference("group_norm_silu", x) or x.dtype not in FLOATS:
        check(*args)
        return reference.group_norm_silu(*args)
    return group_norm_silu_op(*args)[0]


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    added: Tensor | None = None,
) -> None:
    """Refuses what the op does not take: x is float [B, C, H, W], arguments as in `group_norm_silu`.

    Raises:
        ValueError: wrong shape, dtype or device, C not divisible by G; the message starts with the argument's name.
    """
    require(x.ndim == 4, "x: expected [B, C, H, W], got shape {}", x.shape)
    require_floats(x=x, weight=weight, bias=bias, scale=scale, shift=shift, added=added)
    channels = x.shape[1]
    require_groups(num_groups, channels)
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(tensor.shape == (channels,), "{}: expected [{}], got shape {}", name, channels, tensor.shape)
    for name, optional in (("scale", scale), ("shift", shift), ("added", added)):
        if optional is not None:
            require(
                optional.ndim == 2 and optional.shape == x.shape[:2],
                "{}: shape {} does not fit x's {}",
                name,
                optional.shape,
                x.shape,
            )
    if residual is not None:
        require(residual.shape == x.shape, "residual: shape {} differs from x's {}", residual.shape, x.shape)
        require(residual.dtype == x.dtype, "residual: dtype {} differs from x's {}", residual.dtype, x.dtype)
    require_same_device(x, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual, added=added)


@torch.library.custom_op("ldmseg_fast::group_norm_silu", mutates_args=())
def group_norm_silu_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `group_norm_silu`, with its arguments, and keeps what the backward pass needs; differentiable.

    Returns:
        y [B, C, H, W] of x's dtype in channels_last, and per group mean and 1 / standard deviation, float32 [B, G]
        (float64 for float64).

    Raises:
        ValueError: see `check`.
    """
    args = (x, weight, bias, num_groups, eps, scale, shift, residual, silu, added)
    check(*args)
    y, mean, rstd = reference.group_norm_silu_forward(*args)
    return in_format(y, torch.channels_last), mean, rstd


@group_norm_silu_op.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ldmseg_fast.kernels.group_norm_silu import host  # Triton is imported on CUDA only

    check(*args)
    return host.group_norm_silu_forward(*args)


@group_norm_silu_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, weight, bias, num_groups, eps, scale, shift, residual, silu, added)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    statistics = (x.shape[0], num_groups)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, x.new_empty(statistics, dtype=dtype), x.new_empty(statistics, dtype=dtype)


@torch.library.custom_op("ldmseg_fast::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward_op(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the backward pass; the residual's gradient is `grad_y` itself.

    Args:
        grad_y: [B, C, H, W], the gradient of `y`.
        x, weight, bias, scale, shift, silu, added: as in `group_norm_silu`.
        mean, rstd: [B, G], what `group_norm_silu_op` returned.

    Returns:
        the gradients of x [B, C, H, W] (x's dtype, channels_last), weight and bias [C], scale and shift [B, C]; all
        but the first in the dtype of `mean`.
    """
    grad_x, *others = reference.group_norm_silu_backward(grad_y, x, mean, rstd, weight, bias, scale, shift, silu, added)
    return in_format(grad_x, torch.channels_last), others[0], others[1], others[2], others[3]


@group_norm_silu_backward_op.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ldmseg_fast.kernels.group_norm_silu import host

    return host.group_norm_silu_backward(*args)


@group_norm_silu_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    per_channel, per_image = (x.shape[1],), x.shape[:2]
    return (
        grad_x,
        mean.new_empty(per_channel),
        mean.new_empty(per_channel),
        mean.new_empty(per_image),
        mean.new_empty(per_image),
    )


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _num_groups, _eps, scale, shift, residual, ctx.silu, added = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, added)
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, grad_y: Tensor, _grad_mean: Tensor | None, _grad_rstd: Tensor | None):
    x, mean, rstd, weight, bias, scale, shift, added = ctx.saved_tensors
    grads = group_norm_silu_backward_op(grad_y, x, mean, rstd, weight, bias, scale, shift, ctx.silu, added)
    grad_x, grad_weight, grad_bias, grad_scale, grad_shift = grads
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
        None,
        None,
        None if scale is None else grad_scale.to(scale.dtype),
        None if shift is None else grad_shift.to(shift.dtype),
        grad_y if ctx.has_residual else None,
        None,
        None if added is None else grad_x.sum((2, 3), dtype=mean.dtype).to(added.dtype),
    )


group_norm_silu_op.register_autograd(_backward, setup_context=_save)
