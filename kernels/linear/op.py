"""Runs Triton on CUDA in half precision and the reference elsewhere; opaque to torch.compile. There is no gradient."""

from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import (
    require,
    require_floats,
    require_groups,
    require_no_gradient,
    require_same_device,
    runs_reference,
)
from ldmseg_fast.kernels.group_norm_silu.moments import check_moments
from ldmseg_fast.kernels.group_norm_silu.reference import count_chunks
from ldmseg_fast.kernels.linear import reference

HALVES = (torch.float16, torch.bfloat16)
Norm = tuple[Tensor, Tensor, float]  # weight [K], bias [K], eps


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    moments: Tensor | None = None,
    beside: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    num_groups: int = 0,
) -> tuple[Tensor, Tensor]:
    """Computes [norm(x), beside] weight^T + bias, gated where asked for, + residual, and its moments. For inference.

    Args:
        x: float [B, P, K]; another dtype than float16 and bfloat16 always goes to torch's own operations.
        weight: of x's dtype [N, K + L], gated [2 N, K + L].
        bias: float [N], gated [2 N], or None.
        norm: weight, bias and eps of a normalisation: of each row (Ba et al., arXiv 1607.06450), or with `moments` of
            groups of columns over all rows of an image (Wu and He, arXiv 1803.08494).
        moments: float32 [B, 2, chunks, G] of x, see `group_norm_silu.moments`.
        beside: of x's dtype [B, P, L], or None; not in a gated layer.
        residual: of x's dtype [B, P, N], or None.
        gated: value * gelu(gate) (Shazeer, arXiv 2002.05202, equation 6) of the product's halves.
        num_groups: of the result, whose moments are wanted; 0: none.

    Returns:
        [B, P, N] of x's dtype, and float32 moments [B, 2, chunks, num_groups], an empty tensor where none are wanted.

    Raises:
        ValueError: wrong shape, dtype or device, or a gradient is wanted.
    """
    gain, offset, eps = (None, None, 0.0) if norm is None else norm
    require_no_gradient(x=x, weight=weight, bias=bias, gain=gain, offset=offset)
    require_no_gradient(moments=moments, beside=beside, residual=residual)
    args = (x, weight, bias, gain, offset, eps, moments, beside, residual, gated, num_groups)
    if runs_reference("linear", x) or x.dtype not in HALVES:
        check(*args)
        return reference.linear(*args)
    return linear_op(*args)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    eps: float,
    moments: Tensor | None,
    beside: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    num_groups: int,
) -> None:
    """Refuses what `linear_op` does not take: x is float [B, P, K], arguments as in `linear`.

    Raises:
        ValueError: wrong shape, dtype or device; the message starts with the argument's name.
    """
    require(x.ndim == 3, "x: expected [B, P, K], got shape {}", x.shape)
    require_floats(x=x, bias=bias, gain=gain, offset=offset, moments=moments)
    _, pixels, inputs = x.shape
    if beside is not None:
        fits = beside.ndim == 3 and beside.shape[:2] == x.shape[:2]
        require(fits and beside.dtype == x.dtype, "beside: {} does not fit x's {}", beside.shape, x.shape)
        require(not gated, "beside: not in a gated layer")
    width = inputs + (0 if beside is None else beside.shape[2])
    fits = weight.ndim == 2 and weight.shape[1] == width and not (gated and weight.shape[0] % 2)
    require(fits, "weight: expected [N, {}], N even where it is gated, got shape {}", width, weight.shape)
    require(weight.dtype == x.dtype, "weight: dtype {} differs from x's {}", weight.dtype, x.dtype)
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if bias is not None:
        require(bias.shape == weight.shape[:1], "bias: expected [{}], got shape {}", weight.shape[0], bias.shape)
    for name, tensor in (("gain", gain), ("offset", offset)):
        if tensor is not None:
            require(tensor.shape == x.shape[2:], "{}: expected [{}], got shape {}", name, inputs, tensor.shape)
    require((gain is None) == (offset is None), "offset: comes with a gain")
    if moments is not None:
        require(gain is not None, "moments: come with a norm")
        check_moments(moments, x, pixels, inputs)
    if residual is not None:
        fits = residual.ndim == 3 and residual.shape[:2] == x.shape[:2] and residual.shape[2] == outputs
        require(fits and residual.dtype == x.dtype, "residual: {} is not [B, P, {}]", residual.shape, outputs)
    if num_groups:
        require_groups(num_groups, outputs)
    others: dict[str, Any] = {"weight": weight, "bias": bias, "gain": gain, "offset": offset}
    require_same_device(x, **others, moments=moments, beside=beside, residual=residual)


@torch.library.custom_op("ldmseg_fast::linear", mutates_args=())
def linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    eps: float,
    moments: Tensor | None,
    beside: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    num_groups: int,
) -> tuple[Tensor, Tensor]:
    """Runs `linear`: gain, offset and eps are its norm; x is float [B, P, K], the results those of `linear`.

    Raises:
        ValueError: see `check`.
    """
    args = (x, weight, bias, gain, offset, eps, moments, beside, residual, gated, num_groups)
    check(*args)
    out, made = reference.linear(*args)
    return out.contiguous(), made


@linear_op.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from ldmseg_fast.kernels.linear import host  # Triton is imported on CUDA only

    check(*args)
    return host.linear(*args)


@linear_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    check(*args)
    x, weight, gated, num_groups = args[0], args[1], args[9], args[10]
    batch, pixels, _ = x.shape
    out = x.new_empty((batch, pixels, weight.shape[0] // 2 if gated else weight.shape[0]))
    shape = (batch, 2, count_chunks(pixels), num_groups) if num_groups else (0,)
    return out, x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
