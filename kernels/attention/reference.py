"""Plain torch: what the kernels must equal. All tensors are [B, N, heads, d], the logsumexp is [B, heads, N]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v, by whichever of torch's own implementations suits the device."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bnhd,bmhd->bhnm", at_least_float32(q), at_least_float32(k)) * scale
    logsumexp = scores.logsumexp(-1)  # [B, heads, N]
    out = torch.einsum("bhnm,bmhd->bnhd", (scores - logsumexp[..., None]).exp(), at_least_float32(v))
    return out.to(q.dtype), logsumexp


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Dao et al., "FlashAttention", arXiv 2205.14135, appendix B.2."""
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
