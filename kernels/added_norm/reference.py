"""Plain torch: what the kernels must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32


def added_group_norm(
    x: Tensor,  # [B, C, H, W]
    added: Tensor | None,  # [B, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Computes group_norm(x + added) (Wu and He, arXiv 1803.08494), and SiLU of it if asked, in float32 or better.

    Arguments and result as in `op.added_group_norm`: x is [B, C, H, W], the result of its dtype.
    """
    wide = at_least_float32(x)
    if added is not None:
        wide = wide + added.to(wide.dtype)[:, :, None, None]
    y = torch.group_norm(wide, num_groups, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return (F.silu(y) if silu else y).to(x.dtype)


def added_layer_norm(
    x: Tensor,  # [..., C]
    added: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> Tensor:
    """Computes layer_norm(x + added) (Ba et al., arXiv 1607.06450) in float32 or better.

    Arguments and result as in `op.added_layer_norm`: x is [..., C], the result of its dtype.
    """
    wide = at_least_float32(x)
    if added is not None:
        wide = wide + added.to(wide.dtype)
    return F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)
