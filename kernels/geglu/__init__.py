"""The gate of the transformers' feed-forward layer, in one pass."""

from ldmseg_fast.kernels.geglu.op import geglu

__all__ = ["geglu"]
