"""A linear layer with the normalisation before it and the gate, sum and moments after it, for inference."""

from ldmseg_fast.kernels.linear.op import linear

__all__ = ["linear"]
