"""Plain torch: what the kernel must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32
from ldmseg_fast.kernels.group_norm_silu.reference import find_moments, merge_moments


def linear(
    x: Tensor,  # [B, P, K]
    weight: Tensor,  # [N, K + L], gated [2 N, K + L]
    bias: Tensor | None = None,  # [N], gated [2 N]
    gain: Tensor | None = None,  # [K]
    offset: Tensor | None = None,  # [K]
    eps: float = 0.0,
    moments: Tensor | None = None,  # [B, 2, chunks, G]
    beside: Tensor | None = None,  # [B, P, L]
    residual: Tensor | None = None,  # [B, P, N]
    gated: bool = False,
    num_groups: int = 0,
) -> tuple[Tensor, Tensor]:
    """Computes the layer in float32 or better, but for the normalised rows, which are rounded to x's dtype.

    Arguments and results as in `op.linear_op`: x is [B, P, K], the result [B, P, N] of its dtype.
    """
    rows = at_least_float32(x)
    if gain is not None and offset is not None:
        rows = (_normalise(rows, eps, moments) * gain + offset).to(x.dtype).to(rows.dtype)
    if beside is not None:
        rows = torch.cat([rows, beside.to(rows.dtype)], -1)
    out = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
    if gated:
        value, gate = out.chunk(2, dim=-1)
        out = value * F.gelu(gate)
    if residual is not None:
        out = out + residual
    out = out.to(x.dtype)
    features = out.transpose(1, 2)[..., None]  # [B, N, P, 1]
    return out, find_moments(features, num_groups) if num_groups else rows.new_empty(0)


def _normalise(rows: Tensor, eps: float, moments: Tensor | None) -> Tensor:
    """Normalises each row of [B, P, K], or the groups of columns whose moments are given."""
    if moments is None:
        return F.layer_norm(rows, rows.shape[-1:], eps=eps)
    batch, pixels, columns = rows.shape
    mean, variance = merge_moments(moments, max(pixels, 1), columns)  # [B, G]
    grouped = rows.reshape(batch, pixels, moments.shape[3], -1)
    return ((grouped - mean[:, None, :, None]) * (variance + eps).rsqrt()[:, None, :, None]).view(rows.shape)
