"""Runs Triton on CUDA for float16 and bfloat16, and torch's own attention otherwise."""

from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.kernels.attention import reference
from ldmseg_fast.kernels.backend import exporting, get_backend, require, require_same_device, runs_reference
from ldmseg_fast.kernels.configs import current_architecture

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 160
MAX_PRODUCT = 256 * 256  # up to here, training on a CPU in bfloat16 is faster with the whole matrix in memory
FP8_ARCHITECTURE = 89  # the first with products of e4m3


def takes_head_size(head_size: int) -> bool:
    """Says whether the kernel takes heads of so many channels."""
    return head_size % 8 == 0 and 8 <= head_size <= MAX_HEAD_SIZE


def why_not_fp8(device: torch.device, dtype: torch.dtype) -> str:
    """Says why products of e4m3 are of no use for tensors of `dtype` on `device`; empty where they are."""
    if device.type != "cuda":
        return f"needs a GPU of sm_{FP8_ARCHITECTURE} or newer, not {device.type}"
    sm = current_architecture()
    if sm < FP8_ARCHITECTURE:
        return f"needs a GPU of sm_{FP8_ARCHITECTURE} or newer, this is sm_{sm}"
    return "" if dtype in HALVES else f"takes float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, fp8: bool = False) -> Tensor:
    """Computes softmax(q k^T scale) v over all tokens, accumulated in float32 (FlashAttention-2, arXiv 2307.08691).

    Args:
        q: float [B, N, heads, d], d a multiple of 8 up to 160. Slices of one fused projection are read in place.
        k, v: [B, M, heads, d] of q's dtype.
        scale: positive; 1 / sqrt(d) by default.
        fp8: products of e4m3 numbers, accumulated in float32: inference only, float16 or bfloat16 inputs, GPUs of sm_89
            or newer (on a CPU the reference, which rounds in the same places). Each head of q, k and v is scaled by a
            power of two of its own. `python -m ldmseg_fast.kernels.fp8_error` prints the error.

    Returns:
        [B, N, heads, d] of q's dtype. float32 and float64 always go to torch's own attention.

    Raises:
        ValueError: wrong shape, dtype, device, head size or scale; with `fp8`, also where a gradient is wanted, in an
            exported graph, and on a GPU without it.
    """
    if scale is None:
        scale = max(q.shape[-1], 1) ** -0.5
    if fp8:
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        require(not needs_grad, "fp8: has no gradient; call it under torch.no_grad() or leave fp8=False")
        require(not exporting(), "fp8: not in an exported graph; choose the precision of the engine instead")
        return attention_fp8_op(q, k, v, scale)
    if runs_reference("attention", q) or q.dtype not in HALVES:
        check(q, k, v, scale)
        if q.device.type == "cpu" and q.requires_grad and q.dtype in HALVES:
            return _train_on_cpu(q, k, v, scale)
        return reference.attention(q, k, v, scale)
    return attention_forward_op(q, k, v, scale)[0]


def _train_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.shape[1] * k.shape[1] <= MAX_PRODUCT:
        return reference.attention_by_products(q, k, v, scale)
    # on CPUs the backward pass of PyTorch's attention takes three times longer in bfloat16 than in float32
    return reference.attention(q.float(), k.float(), v.float(), scale).to(q.dtype)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Refuses what the ops do not take: q, k and v are float [B, N, heads, d], arguments as in `attention`.

    Raises:
        ValueError: wrong shape, dtype, device, head size or scale; the message starts with the argument's name.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require(tensor.ndim == 4, "{}: expected [B, N, heads, d], got shape {}", name, tensor.shape)
        require(tensor.dtype in FLOATS, "{}: expected a float tensor, got {}", name, tensor.dtype)
        require(tensor.dtype == q.dtype, "{}: dtype {} differs from q's {}", name, tensor.dtype, q.dtype)
        require(
            tensor.shape[0] == q.shape[0] and tensor.shape[2:] == q.shape[2:],
            "{}: shape {} does not fit q's {} in B, heads and d",
            name,
            tensor.shape,
            q.shape,
        )
    require(k.shape == v.shape, "v: shape {} differs from k's {}", v.shape, k.shape)
    require(k.shape[1] > 0, "k: no tokens to attend to")
    require(
        takes_head_size(q.shape[-1]),
        "q: head size {} is not a multiple of 8 up to {}",
        q.shape[-1],
        MAX_HEAD_SIZE,
    )
    require(scale > 0, "scale: expected a positive number, got {}", scale)
    require_same_device(q, k=k, v=v)


def check_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Refuses what `attention_fp8_op` does not take: q, k and v are half precision [B, N, heads, d].

    Raises:
        ValueError: as `check`; float32 or float64 tensors, or a GPU without products of e4m3.
    """
    check(q, k, v, scale)
    require(q.dtype in HALVES, "fp8: takes float16 or bfloat16, not {}", q.dtype)
    reason = why_not_fp8(q.device, q.dtype) if q.device.type == "cuda" else ""
    require(not reason, "fp8: {}", reason)


@torch.library.custom_op("ldmseg_fast::attention_fp8", mutates_args=())
def attention_fp8_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Runs `attention` with e4m3 products: the kernel on CUDA, elsewhere the reference. There is no gradient.

    Args:
        q: float16 or bfloat16 [B, N, heads, d].
        k, v: [B, M, heads, d] of q's dtype.
        scale: positive.

    Returns:
        [B, N, heads, d] of q's dtype, contiguous.

    Raises:
        ValueError: see `check_fp8`.
    """
    check_fp8(q, k, v, scale)
    if q.is_cuda and get_backend("attention") != "torch":
        from ldmseg_fast.kernels.attention import host  # Triton is imported on CUDA only

        return host.attention_fp8(q, k, v, scale)
    return reference.attention_fp8(q, k, v, scale).contiguous()


@attention_fp8_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    check_fp8(q, k, v, scale)
    return q.new_empty(q.shape)


@torch.library.custom_op("ldmseg_fast::attention_forward", mutates_args=())
def attention_forward_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Runs the forward pass and keeps what the backward pass needs; differentiable in q, k and v.

    Args:
        q: float [B, N, heads, d]; float16 or bfloat16 on CUDA.
        k, v: [B, M, heads, d] of q's dtype.
        scale: positive.

    Returns:
        out [B, N, heads, d] of q's dtype, contiguous, and the logsumexp of the scores, float32 [B, heads, N] (float64
        for float64).

    Raises:
        ValueError: see `check`.
    """
    check(q, k, v, scale)
    out, logsumexp = reference.attention_forward(q, k, v, scale)
    return out.contiguous(), logsumexp


@attention_forward_op.register_kernel("cuda")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from ldmseg_fast.kernels.attention import host  # Triton is imported on CUDA only

    check(q, k, v, scale)
    return host.attention_forward(q, k, v, scale)


@attention_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check(q, k, v, scale)
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=_logsumexp_dtype(q))


@torch.library.custom_op("ldmseg_fast::attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the backward pass (FlashAttention, arXiv 2205.14135, appendix B.2).

    Args:
        grad_out: [B, N, heads, d], the gradient of `out`.
        q, k, v, scale: as in `attention_forward_op`.
        out, logsumexp: what that returned.

    Returns:
        the gradients of q [B, N, heads, d], k and v [B, M, heads, d], of q's dtype, contiguous.
    """
    grads = reference.attention_backward(grad_out, q, k, v, out, logsumexp, scale)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@attention_backward_op.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ldmseg_fast.kernels.attention import host

    return host.attention_backward(*args)


@attention_backward_op.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _logsumexp_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs
    out, logsumexp = output
    ctx.save_for_backward(q, k, v, out, logsumexp)
    ctx.mark_non_differentiable(logsumexp)


def _backward(ctx, grad_out: Tensor, _grad_logsumexp: Tensor | None):
    return *attention_backward_op(grad_out, *ctx.saved_tensors, ctx.scale), None


attention_forward_op.register_autograd(_backward, setup_context=_save)
