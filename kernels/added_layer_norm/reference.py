"""Plain torch: what the kernel must equal."""

import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32


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
