"""Launches layer normalisation with a vector added first, for inference."""

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.added_layer_norm.layer import layer_kernel
from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import launch


def added_layer_norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Launches layer normalisation (Ba et al., arXiv 1607.06450), a few rows a program.

    Args:
        x: float16, bfloat16 or float32 [..., C].
        added, weight, bias: float [C], the first or None.
        eps: added to the variance.

    Returns:
        [..., C] of x's dtype, contiguous.
    """
    x = x.contiguous()
    y, channels = torch.empty_like(x), x.shape[-1]
    if y.numel() == 0:
        return y
    config = find_config("added_layer_norm", "all")
    block_c, rows = triton.next_power_of_2(channels), x.numel() // channels
    block_n = max(config.constants["ELEMENTS"] // block_c, 1)
    vectors = ((weight if added is None else added).contiguous(), weight.contiguous(), bias.contiguous())
    launch(
        layer_kernel,
        (triton.cdiv(rows, block_n),),
        *(x, *vectors, y, rows, channels, eps),
        config=config,
        HAS_ADDED=added is not None,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
    )
    return y
