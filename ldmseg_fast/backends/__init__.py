"""What runs the networks. Every backend has the same three calls; see `Backend`."""

from ldmseg_fast.backends.base import BACKENDS, Backend, ModelInfo, load_backend

__all__ = ["BACKENDS", "Backend", "ModelInfo", "load_backend"]
