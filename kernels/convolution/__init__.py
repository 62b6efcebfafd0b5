"""A 3x3 convolution with the upsampling before it and the sums and moments after it, for inference."""

from ldmseg_fast.kernels.convolution.op import convolution

__all__ = ["convolution"]
