"""Attention behind one function, so that the backend is a setting and not a property of the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.kernels.attention import attention as kernel_attention
from ldmseg_fast.kernels.attention.op import MAX_HEAD_SIZE

BACKENDS = ("auto", "triton", "sdpa", "xformers")

MAX_PRODUCT = 256 * 256  # up to here, training on a CPU in bfloat16 is faster with the whole matrix in memory


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v, not causal.

    Args:
        q, k, v: [B, N, heads, d], any strides; `k` and `v` may have another N.
        backend: "auto" (our kernel on CUDA, PyTorch's elsewhere), "triton", "sdpa" or "xformers".

    Returns:
        [B, N, heads, d].

    Raises:
        ArgumentError: an unknown backend; "triton" where the tensors are not on a GPU.
        ImportError: "xformers" where it is not installed.
    """
    if backend == "auto":
        backend = "kernel" if q.shape[-1] % 8 == 0 and q.shape[-1] <= MAX_HEAD_SIZE else "sdpa"
    if backend == "kernel":
        if q.device.type == "cpu" and q.requires_grad and q.dtype != torch.float32:
            if q.shape[1] * k.shape[1] <= MAX_PRODUCT:
                return attention_by_products(q, k, v)
            # on CPUs the backward pass of PyTorch's attention takes three times longer in bfloat16 than in float32
            return kernel_attention(q.float(), k.float(), v.float()).to(q.dtype)
        return kernel_attention(q, k, v)
    if backend == "triton":
        if q.device.type != "cuda":
            raise ArgumentError(f"attention=triton needs a GPU, the tensors are on {q.device}; use auto or sdpa")
        return kernel_attention(q, k, v)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    raise ArgumentError(f"attention={backend!r}: one of {', '.join(BACKENDS)} expected")


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` as two matrix products with the whole [N, M] matrix between them: for short sequences."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [B, heads, N, d]
    weights = torch.softmax((q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5, dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)
