"""Plain torch: what the kernels must equal. All tensors are [B, N, heads, d], the logsumexp is [B, heads, N]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Computes softmax(q k^T scale) v by whichever of torch's own implementations suits the device.

    Args:
        q: float [B, N, heads, d].
        k, v: [B, M, heads, d] of q's dtype.
        scale: of the scores.

    Returns:
        [B, N, heads, d] of q's dtype.
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Computes `attention` as two matrix products with the whole float32 [N, M] matrix between them.

    For short sequences.
    """
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [B, heads, N, d]
    weights = torch.softmax((q @ k.transpose(-1, -2)).float() * scale, dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Computes `attention`, in float32 or better.

    Returns:
        out [B, N, heads, d] of q's dtype, and the logsumexp of the scores, float32 [B, heads, N] (float64 for float64).
    """
    scores = torch.einsum("bnhd,bmhd->bhnm", at_least_float32(q), at_least_float32(k)) * scale
    logsumexp = scores.logsumexp(-1)  # [B, heads, N]
    out = torch.einsum("bhnm,bmhd->bnhd", (scores - logsumexp[..., None]).exp(), at_least_float32(v))
    return out.to(q.dtype), logsumexp


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v in their shapes and q's dtype (arXiv 2205.14135, appendix B.2).

    Args:
        grad_out: [B, N, heads, d], the gradient of `out`.
        q, k, v, scale: as in `attention`.
        out, logsumexp: from `attention_forward`.
    """
    dtype = q.dtype
    grad_out, q, k, v, out = (at_least_float32(tensor) for tensor in (grad_out, q, k, v, out))
    probabilities = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale - logsumexp[..., None]).exp()
    grad_v = torch.einsum("bhnm,bnhd->bmhd", probabilities, grad_out)
    grad_probabilities = torch.einsum("bnhd,bmhd->bhnm", grad_out, v)
    delta = torch.einsum("bnhd,bnhd->bhn", grad_out, out)
    grad_scores = probabilities * (grad_probabilities - delta[..., None]) * scale
    grad_q = torch.einsum("bhnm,bmhd->bnhd", grad_scores, k)
    grad_k = torch.einsum("bhnm,bnhd->bmhd", grad_scores, q)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Computes `attention` with products of e4m3 numbers, everything else in float32.

    Args:
        q: float16 or bfloat16 [B, N, heads, d]; each head of q, k and v has its own unit, see `quantise`.
        k, v: [B, M, heads, d] of q's dtype.
        scale: of the scores.

    Returns:
        [B, N, heads, d] of q's dtype.
    """
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    (q8, q_unit), (k8, k_unit), (v8, v_unit) = (quantise(tensor) for tensor in (q, k, v))
    factor = (q_unit * k_unit).transpose(1, 2) * (scale * math.log2(math.e))  # [B, heads, 1, 1]
    scores = torch.einsum("bnhd,bmhd->bhnm", q8, k8) * factor
    weights = (scores - scores.amax(-1, keepdim=True).ceil() + 8).exp2()  # the largest is in (2^7, 2^8]
    out = torch.einsum("bhnm,bmhd->bnhd", weights.to(torch.float8_e4m3fn).float(), v8)
    return (out / weights.sum(-1).transpose(1, 2)[..., None] * v_unit).to(q.dtype)


def quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each head of a tensor [B, N, heads, d] to numbers that e4m3 holds, in a unit of its own.

    The largest magnitude of a head lies in [128, 256) units: as far up as one factor of two below the largest number,
    448, and a factor of 2^13 above the least normal one.

    Returns:
        the numbers, float32 [B, N, heads, d], and their units, powers of two, float32 [B, 1, heads, 1].
    """
    magnitude = tensor.float().abs().amax((1, 3), keepdim=True)
    _, exponent = torch.frexp(magnitude)  # magnitude / 2^exponent is in [1/2, 1)
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(-118, 128) - 8)
    return (tensor.float() / unit).to(torch.float8_e4m3fn).float(), unit
