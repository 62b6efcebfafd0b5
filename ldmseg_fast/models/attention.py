"""Attention behind one function, so that the backend is a setting and not a property of the model."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.errors import ArgumentError, BackendError
from ldmseg_fast.kernels.attention import attention as kernel_attention
from ldmseg_fast.kernels.attention import takes_head_size, why_not_fp8

BACKENDS = ("auto", "triton", "sdpa", "xformers", "fp8")


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a backend that cannot run a model of `dtype` on `device`; to be called once the two are known.

    Raises:
        ArgumentError: an unknown backend.
        BackendError: "triton" without a GPU, "xformers" where it is not installed, "fp8" on a GPU without products of
            e4m3 (older than sm_89), without a GPU, or for a model in float32.
    """
    if backend not in BACKENDS:
        raise ArgumentError(f"attention={backend!r}: one of {', '.join(BACKENDS)} expected")
    if backend == "triton" and device.type != "cuda":
        raise BackendError(f"attention=triton needs a GPU, the model is on {device}; use attention=auto or sdpa")
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        raise BackendError("attention=xformers: xformers is not installed; install it, or use attention=auto")
    reason = why_not_fp8(device, dtype) if backend == "fp8" else ""
    if reason:
        raise BackendError(f"attention=fp8 {reason}; use attention=auto")


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Computes softmax(q k^T / sqrt(d)) v, not causal (Vaswani et al., arXiv 1706.03762, equation 1).

    Args:
        q: float [B, N, heads, d], any strides.
        k, v: float [B, M, heads, d] of q's dtype, any strides.
        backend: "auto" is our kernel (on CUDA in Triton, elsewhere in PyTorch), or PyTorch's attention for head sizes
            that the kernel does not take. "triton" is our kernel on CUDA only, "sdpa" is PyTorch's attention,
            "xformers" is xFormers'. "fp8" is our kernel with e4m3 products, for inference; on a CPU it is the
            reference, which rounds in the same places.

    Returns:
        [B, N, heads, d] of q's dtype.

    Raises:
        ArgumentError: an unknown backend, or a head size that "triton" and "fp8" do not take.
        BackendError: "triton" where the tensors are not on a GPU.
        ImportError: "xformers" where it is not installed.
        ValueError: shapes or dtypes that do not fit; "fp8" where a gradient is wanted.
    """
    if backend not in BACKENDS or (backend == "triton" and q.device.type != "cuda"):
        check_backend(backend, q.device, q.dtype)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    fits = takes_head_size(q.shape[-1])
    if backend == "sdpa" or (backend == "auto" and not fits):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    if not fits:
        raise ArgumentError(f"attention={backend} takes no heads of {q.shape[-1]} channels; use attention=auto or sdpa")
    return kernel_attention(q, k, v, fp8=backend == "fp8")
