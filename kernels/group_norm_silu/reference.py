"""Plain torch: what the kernels must equal."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32

CHUNK = 64  # pixels, in their order, that moments are of


def group_norm_silu(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    num_groups: int,
    eps: float,
    scale: Tensor | None = None,  # [B, C]
    shift: Tensor | None = None,  # [B, C]
    residual: Tensor | None = None,  # [B, C, H, W]
    silu: bool = True,
    added: Tensor | None = None,  # [B, C]
) -> Tensor:
    """Computes silu(group_norm(x + added) (1 + scale) + shift) + residual by torch's ops (Wu and He, arXiv 1803.08494).

    Arguments and result as in `op.group_norm_silu`: x is [B, C, H, W], and everything is in x's dtype.
    """
    if added is not None:
        x = x + added.to(x.dtype)[:, :, None, None]
    y = torch.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        y = y * (1 + scale.to(x.dtype)[:, :, None, None])
    if shift is not None:
        y = y + shift.to(x.dtype)[:, :, None, None]
    if silu:
        y = F.silu(y)
    return y if residual is None else y + residual


def group_norm_silu_forward(
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
    """Computes `group_norm_silu`, all arithmetic in float32 or better.

    Returns:
        y [B, C, H, W] of x's dtype, and per group mean and 1 / standard deviation, float32 [B, G] (float64 for
        float64).
    """
    if x.numel() == 0:
        mean = at_least_float32(x).new_zeros((x.shape[0], num_groups))
        return torch.empty_like(x), mean, mean.clone()
    groups = _add(x, added).reshape(x.shape[0], num_groups, -1)  # [B, G, C/G * H * W]
    variance, mean = torch.var_mean(groups, 2, correction=0)
    rstd = (variance + eps).rsqrt()
    normalised = ((groups - mean[..., None]) * rstd[..., None]).view(x.shape)
    gain, offset = _fold(weight, bias, scale, shift)  # [B or 1, C]
    y = normalised * gain[:, :, None, None] + offset[:, :, None, None]
    if silu:
        y = F.silu(y)
    if residual is not None:
        y = y + residual
    return y.to(x.dtype), mean, rstd


def group_norm_silu_backward(
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
    """Computes the gradients; the residual's is `grad_y` itself.

    With n the normalised input and u = n gain + offset, everything but the first follows from the two sums over pixels
    of du and du n.

    Args:
        grad_y: float [B, C, H, W].
        x, weight, bias, scale, shift, silu, added: as in `group_norm_silu`.
        mean, rstd: [B, G] from `group_norm_silu_forward`.

    Returns:
        the gradients of x [B, C, H, W] (x's dtype; its sum over pixels is that of the added vector), and in the dtype
        of `mean` of weight and bias [C], scale and shift [B, C].
    """
    batch, num_groups = mean.shape
    if x.numel() == 0:
        zeros = (mean.new_zeros(shape) for shape in (x.shape[1:2], x.shape[1:2], x.shape[:2], x.shape[:2]))
        return torch.empty_like(x), *zeros
    n = (_add(x, added).reshape(batch, num_groups, -1) - mean[..., None]) * rstd[..., None]
    n = n.reshape(batch, x.shape[1], -1)  # [B, C, H W]
    gain, offset = _fold(weight, bias, scale, shift)
    du = at_least_float32(grad_y).reshape(n.shape)
    if silu:
        u = n * gain[..., None] + offset[..., None]
        sigmoid = u.sigmoid()
        du = du * sigmoid * (1 + u * (1 - sigmoid))
    sum_du, sum_du_n = du.sum(2), (du * n).sum(2)  # [B, C]

    per_group = (batch, num_groups, -1)
    count = n.numel() // max(batch * num_groups, 1)
    mean_dn = (gain * sum_du).reshape(per_group).sum(2) / count  # [B, G]
    mean_dn_n = (gain * sum_du_n).reshape(per_group).sum(2) / count
    dn, n_grouped = (du * gain[..., None]).reshape(per_group), n.reshape(per_group)
    grad_x = rstd[..., None] * (dn - mean_dn[..., None] - n_grouped * mean_dn_n[..., None])

    one_plus_scale = 1.0 if scale is None else 1 + at_least_float32(scale)
    grad_weight = (one_plus_scale * sum_du_n).sum(0)
    grad_bias = (one_plus_scale * sum_du).sum(0)
    grad_scale = at_least_float32(weight) * sum_du_n + at_least_float32(bias) * sum_du
    return grad_x.view(x.shape).to(x.dtype), grad_weight, grad_bias, grad_scale, sum_du


def _add(x: Tensor, added: Tensor | None) -> Tensor:
    """x + added, in float32 or better"""
    x = at_least_float32(x)
    return x if added is None else x + added.to(x.dtype)[:, :, None, None]


def _fold(weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """(n weight + bias) (1 + scale) + shift = n gain + offset"""
    gain, offset = at_least_float32(weight)[None], at_least_float32(bias)[None]
    if scale is not None:
        gain, offset = gain * (1 + scale), offset * (1 + scale)
    if shift is not None:
        offset = offset + shift
    return gain, offset


def count_chunks(pixels: int) -> int:
    """Counts the chunks of so many pixels, at least one."""
    return max(-(-pixels // CHUNK), 1)


def find_moments(x: Tensor, num_groups: int) -> Tensor:
    """Computes the moments of features float [B, C, H, W], in float32 or better.

    Returns:
        [B, 2, chunks, G]: mean, and sum of squares about it, of each group in each `CHUNK` of pixels.
    """
    batch, channels = x.shape[:2]
    if x.numel() == 0:
        return at_least_float32(x).new_zeros((batch, 2, count_chunks(x.shape[2] * x.shape[3]), num_groups))
    pixels = at_least_float32(x).reshape(batch, num_groups, channels // num_groups, -1)
    whole = pixels.shape[3] // CHUNK * CHUNK
    made = []
    for part in (pixels[..., :whole].unflatten(3, (-1, CHUNK)), pixels[..., None, whole:]):  # [B, G, C / G, chunks, .]
        if part.numel():
            variance, mean = torch.var_mean(part, (2, 4), correction=0)
            made.append(torch.stack([mean, variance * (part.shape[2] * part.shape[4])], 1))
    return torch.cat(made, 3).transpose(2, 3).contiguous()


def gather_moments(
    x: Tensor, other: Tensor, join: bool, num_groups: int, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes x + other + added, or [x, other] + added, and its moments.

    Args:
        x, other, join, num_groups, added: as in `moments.gather_moments`; x is float [B, C, H, W].

    Returns:
        the result, of x's dtype, and `find_moments` of it.
    """
    gathered = torch.cat([x, other], 1) if join else at_least_float32(x) + other
    gathered = _add(gathered, added).to(x.dtype)
    return gathered, find_moments(gathered, num_groups)


def merge_moments(moments: Tensor, pixels: int, channels: int) -> tuple[Tensor, Tensor]:
    """Computes mean and variance, float32 [B, G], from the moments [B, 2, chunks, G] of so many pixels and channels."""
    chunks, num_groups = moments.shape[2:]
    counts = torch.full((chunks, 1), float(CHUNK), dtype=moments.dtype, device=moments.device)
    counts[-1] = pixels - (chunks - 1) * CHUNK
    means, squares = moments.unbind(1)  # [B, chunks, G]
    mean = (counts * means).sum(1) / pixels
    squares = squares.sum(1) + (counts * (means - mean[:, None]) ** 2).sum(1) * (channels // num_groups)
    return mean, squares / (pixels * (channels // num_groups))


def normalise(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Computes group_norm(x), and SiLU where asked for, from x's moments; all arithmetic in float32 or better.

    Arguments and result as in `moments.normalise`: x is [B, C, H, W], the result of its dtype.
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    batch, channels, *size = x.shape
    mean, variance = merge_moments(moments, math.prod(size), channels)
    grouped = at_least_float32(x).reshape(batch, moments.shape[3], -1)
    normalised = ((grouped - mean[..., None]) * (variance + eps).rsqrt()[..., None]).view(x.shape)
    y = normalised * weight.to(normalised.dtype)[:, None, None] + bias.to(normalised.dtype)[:, None, None]
    return (F.silu(y) if silu else y).to(x.dtype)
