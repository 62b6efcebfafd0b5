"""Plain torch: what the kernel must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32
from ldmseg_fast.kernels.group_norm_silu.reference import find_moments


def result_shape(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> tuple[int, int, int, int]:
    """Computes (B, N, h', w') of the convolution of x, [B, C, h, w], by a weight [N, C, 3, 3]; any dtypes."""
    height, width = ((side * (2 if upsample else 1) - 1) // stride + 1 for side in x.shape[2:])
    return x.shape[0], weight.shape[0], height, width


def convolution(
    x: Tensor,  # [B, C, h, w]
    weight: Tensor,  # [N, C, 3, 3]
    bias: Tensor | None,  # [N]
    added: Tensor | None,  # [B, N]
    residual: Tensor | None,  # [B, N, h', w']
    scale: Tensor | None,  # [B]
    weight_scale: Tensor | None,  # [N]
    stride: int,
    upsample: bool,
    num_groups: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Computes the convolution in float32 or better.

    Arguments and results as in `op.convolution_op`: x is [B, C, h, w], the result [B, N, h', w'] of `dtype`.
    """
    wide = at_least_float32(x)
    shape = result_shape(x, weight, stride, upsample)
    if 0 in shape:
        out = wide.new_zeros(shape)
    else:
        wide = F.interpolate(wide, scale_factor=2.0, mode="nearest") if upsample else wide
        out = F.conv2d(wide, weight.to(wide.dtype), stride=stride, padding=1)
    if scale is not None and weight_scale is not None:
        out = out * (scale[:, None] * weight_scale)[..., None, None]
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    if added is not None:
        out = out + added.to(out.dtype)[..., None, None]
    if residual is not None:
        out = out + residual
    out = out.to(dtype)
    return out, find_moments(out, num_groups) if num_groups else wide.new_empty(0)
