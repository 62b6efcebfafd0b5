"""Layer normalisation of what a bias is still to be added to, for inference."""

from ldmseg_fast.kernels.added_layer_norm.op import added_layer_norm

__all__ = ["added_layer_norm"]
