"""Softmax attention for the UNet's head sizes (40, 80, 160), without paying for padding to a power of two."""

from ldmseg_fast.kernels.attention.op import attention, takes_head_size, why_not_fp8

__all__ = ["attention", "takes_head_size", "why_not_fp8"]
