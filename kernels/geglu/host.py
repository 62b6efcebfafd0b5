"""Launches the gate of the feed-forward layer (Shazeer, arXiv 2002.05202, equation 6) in Triton."""

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.geglu.forward import geglu_kernel
from ldmseg_fast.kernels.launch import launch


def geglu(x: Tensor) -> Tensor:
    """Launches the kernel, a program for a block of channels of a row.

    Args:
        x: float16, bfloat16 or float32 [..., 2 C].

    Returns:
        [..., C] of x's dtype, contiguous.
    """
    x = x.contiguous()
    channels = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], channels), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    config = find_config("geglu", "all")
    grid = (y.numel() // channels, triton.cdiv(channels, config.constants["BLOCK"]))
    launch(geglu_kernel, grid, x, y, channels, config=config)
    return y
