"""Mask logits -> segment map at the image's own size, without ever writing full-size logits."""

from ldmseg_fast.kernels.panoptic_head.op import panoptic_head

__all__ = ["panoptic_head"]
