"""Normalisation of what a bias or a time embedding is still to be added to, for inference."""

from ldmseg_fast.kernels.added_norm.op import added_group_norm, added_layer_norm

__all__ = ["added_group_norm", "added_layer_norm"]
