"""Group normalisation in two halves, so that what makes features also makes their moments. For inference.

Moments are float32 [B, 2, chunks, G]: mean, and sum of squares about it, of each group of channels in each `CHUNK` of
pixels, in their order. Triton runs on CUDA and the reference elsewhere; opaque to torch.compile. There is no gradient.
"""

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import (
    in_format,
    require,
    require_groups,
    require_no_gradient,
    require_same_device,
    runs_reference,
)
from ldmseg_fast.kernels.group_norm_silu import reference
from ldmseg_fast.kernels.group_norm_silu.op import FLOATS
from ldmseg_fast.kernels.group_norm_silu.reference import count_chunks


def gather_moments(
    x: Tensor, other: Tensor, join: bool, num_groups: int, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes x + other + added, or [x, other] + added, and the moments of what is stored.

    Args:
        x: [B, C, H, W] float16, bfloat16 or float32.
        other: of x's dtype, [B, C, H, W], or [B, D, H, W] to join.
        join: put the channels beside each other.
        num_groups: G, a divisor of the result's channels.
        added: float [B, C] (joined, [B, C + D]), or None.

    Returns:
        the result, of x's dtype, and its moments, float32 [B, 2, chunks, G].

    Raises:
        ValueError: wrong shape, dtype or device, channels not divisible by G, or a gradient is wanted.
    """
    require_no_gradient(x=x, other=other, added=added)
    args = (x, other, join, num_groups, added)
    if runs_reference("group_norm_silu", x) or x.dtype not in FLOATS:
        check_gather(*args)
        return reference.gather_moments(*args)
    return gather_moments_op(*args)


def normalise(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool = True) -> Tensor:
    """Computes silu(group_norm(x)) from the moments of x (Wu and He, arXiv 1803.08494).

    Args:
        x: [B, C, H, W] float16, bfloat16 or float32.
        moments: float32 [B, 2, chunks, G].
        weight, bias: [C], any float dtype.
        eps: added to the variance.
        silu: False leaves the activation out.

    Returns:
        [B, C, H, W] of x's dtype.

    Raises:
        ValueError: wrong shape, dtype or device, or a gradient is wanted.
    """
    require_no_gradient(x=x, moments=moments, weight=weight, bias=bias)
    args = (x, moments, weight, bias, eps, silu)
    if runs_reference("group_norm_silu", x) or x.dtype not in FLOATS:
        check_normalise(*args)
        return reference.normalise(*args)
    return normalise_op(*args)


def check_gather(x: Tensor, other: Tensor, join: bool, num_groups: int, added: Tensor | None = None) -> None:
    """Refuses what `gather_moments` does not take: x is float [B, C, H, W].

    Raises:
        ValueError: wrong shape, dtype or device; the message starts with the argument's name.
    """
    require(x.ndim == 4, "x: expected [B, C, H, W], got shape {}", x.shape)
    require(x.is_floating_point(), "x: expected a float tensor, got {}", x.dtype)
    require(other.dtype == x.dtype, "other: dtype {} differs from x's {}", other.dtype, x.dtype)
    fits = other.ndim == 4 and other.shape[0] == x.shape[0] and other.shape[2:] == x.shape[2:]
    fits = fits and (join or other.shape[1] == x.shape[1])
    require(fits, "other: shape {} does not fit x's {}", other.shape, x.shape)
    channels = x.shape[1] + (other.shape[1] if join else 0)
    require_groups(num_groups, channels)
    if added is not None:
        fits = added.ndim == 2 and added.shape[0] == x.shape[0] and added.shape[1] == channels
        require(fits, "added: shape {} does not fit {} channels of x's {}", added.shape, channels, x.shape)
    require_same_device(x, other=other, added=added)


def check_moments(moments: Tensor, x: Tensor, pixels: int, channels: int) -> None:
    """Refuses moments, float32 [B, 2, chunks, G], that are not of x, B images of so many pixels and channels.

    Raises:
        ValueError: another shape or dtype.
    """
    batch, chunks = x.shape[0], count_chunks(pixels)
    fits = moments.ndim == 4 and moments.shape[0] == batch and moments.shape[1] == 2 and moments.shape[2] == chunks
    require(fits, "moments: expected [{}, 2, {}, G], got shape {}", batch, chunks, moments.shape)
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    require(moments.dtype == wanted, "moments: expected {}, got {}", wanted, moments.dtype)
    require_groups(moments.shape[3], channels)


def check_normalise(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> None:
    """Refuses what `normalise` does not take: x is float [B, C, H, W].

    Raises:
        ValueError: wrong shape, dtype or device; the message starts with the argument's name.
    """
    require(x.ndim == 4, "x: expected [B, C, H, W], got shape {}", x.shape)
    require(x.is_floating_point(), "x: expected a float tensor, got {}", x.dtype)
    check_moments(moments, x, x.shape[2] * x.shape[3], x.shape[1])
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(tensor.shape == x.shape[1:2], "{}: expected [{}], got shape {}", name, x.shape[1], tensor.shape)
    require_same_device(x, moments=moments, weight=weight, bias=bias)


@torch.library.custom_op("ldmseg_fast::gather_moments", mutates_args=())
def gather_moments_op(
    x: Tensor, other: Tensor, join: bool, num_groups: int, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs `gather_moments`, with its arguments; the float result [B, C, H, W] is channels_last.

    Raises:
        ValueError: see `check_gather`.
    """
    check_gather(x, other, join, num_groups, added)
    gathered, moments = reference.gather_moments(x, other, join, num_groups, added)
    return in_format(gathered, torch.channels_last), moments


@gather_moments_op.register_kernel("cuda")
def _(x: Tensor, other: Tensor, join: bool, num_groups: int, added: Tensor | None) -> tuple[Tensor, Tensor]:
    from ldmseg_fast.kernels.group_norm_silu import host  # Triton is imported on CUDA only

    check_gather(x, other, join, num_groups, added)
    return host.gather_moments(x, other, join, num_groups, added)


@gather_moments_op.register_fake
def _(x: Tensor, other: Tensor, join: bool, num_groups: int, added: Tensor | None) -> tuple[Tensor, Tensor]:
    check_gather(x, other, join, num_groups, added)
    batch, channels, height, width = x.shape
    shape = (batch, channels + other.shape[1] if join else channels, height, width)
    gathered = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    moments = (batch, 2, count_chunks(height * width), num_groups)
    return gathered, x.new_empty(moments, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.library.custom_op("ldmseg_fast::normalise", mutates_args=())
def normalise_op(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Runs `normalise`, with its arguments; the float result [B, C, H, W] is channels_last.

    Raises:
        ValueError: see `check_normalise`.
    """
    check_normalise(x, moments, weight, bias, eps, silu)
    return in_format(reference.normalise(x, moments, weight, bias, eps, silu), torch.channels_last)


@normalise_op.register_kernel("cuda")
def _(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    from ldmseg_fast.kernels.group_norm_silu import host

    check_normalise(x, moments, weight, bias, eps, silu)
    return host.normalise(x, moments, weight, bias, eps, silu)


@normalise_op.register_fake
def _(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    check_normalise(x, moments, weight, bias, eps, silu)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
