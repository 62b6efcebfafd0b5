"""Triton: FlashAttention-2 (Dao, arXiv 2307.08691), with the head size split into two powers of two.

A head of 40 is one product of 32 columns and one of 16 (8 of them padding), 80 is 64 + 16, 160 is 128 + 32, so the
padding costs 20 %, 0 % and 0 % where rounding up to a power of two would cost 60 %. Rows of q, k, v are read where they
lie, with strides in units of 8 elements: the compiler then knows that every row starts on 16 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import UNIT, in_units, launch

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    matrix_ptr,  # [N, D]
    row,  # first row of the tile
    rows,  # N
    stride,  # between rows, in units of 8 elements
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,  # column
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """[ROWS, COLUMNS], zero outside the matrix"""
    local = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, COLUMNS)
    base = matrix_ptr + tl.cast(row, tl.int64) * (stride * 8)
    pointers = base + local[:, None] * (stride * 8) + column[None, :]
    inside = (row + local < rows)[:, None]
    if FIRST + COLUMNS > D:
        if MASK_ROWS:
            return tl.load(pointers, mask=inside & (column < D)[None, :], other=0.0)
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(
    matrix_ptr,
    value,
    row,
    rows,
    stride,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    local = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = matrix_ptr + tl.cast(row, tl.int64) * (stride * 8) + local[:, None] * (stride * 8) + column[None, :]
    inside = (row + local < rows)[:, None] & (column < D)[None, :]
    tl.store(pointers, value.to(matrix_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attend(
    acc1,  # [BLOCK_M, D1] float32
    acc2,  # [BLOCK_M, D2] float32
    top,  # [BLOCK_M] largest score so far, times scale_log2
    total,  # [BLOCK_M] sum of exponentials
    q1,
    q2,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    start,
    keys,
    scale_log2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys"""
    k1 = load_tile(k_ptr, start, keys, k_row, BLOCK_N, 0, D1, D, MASKED)
    scores = tl.dot(q1, tl.trans(k1))  # [BLOCK_M, BLOCK_N]
    if D > D1:
        k2 = load_tile(k_ptr, start, keys, k_row, BLOCK_N, D1, D2, D, MASKED)
        scores = tl.dot(q2, tl.trans(k2), scores)
    if MASKED:
        scores = tl.where((start + tl.arange(0, BLOCK_N) < keys)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.math.exp2(scores * scale_log2 - new_top[:, None])
    decay = tl.math.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    v1 = load_tile(v_ptr, start, keys, v_row, BLOCK_N, 0, D1, D, MASKED)
    weights = weights.to(v1.dtype)
    acc1 = tl.dot(weights, v1, acc1 * decay[:, None])
    if D > D1:
        v2 = load_tile(v_ptr, start, keys, v_row, BLOCK_N, D1, D2, D, MASKED)
        acc2 = tl.dot(weights, v2, acc2 * decay[:, None])
    return acc1, acc2, new_top, total


@triton.jit
def attention_forward_kernel(
    q_ptr,  # [B, N, heads, D]
    k_ptr,  # [B, M, heads, D]
    v_ptr,  # [B, M, heads, D]
    out_ptr,  # [B, N, heads, D]
    logsumexp_ptr,  # [B, heads, N] float32
    scale_log2,
    tokens,  # N
    keys,  # M
    heads,
    q_image,
    q_row,
    q_head,
    k_image,
    k_row,
    k_head,
    v_image,
    v_row,
    v_head,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start_m = tl.program_id(0) * BLOCK_M
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    q_ptr += (image * q_image + head * q_head) * 8
    k_ptr += (image * k_image + head * k_head) * 8
    v_ptr += (image * v_image + head * v_head) * 8

    q1 = load_tile(q_ptr, start_m, tokens, q_row, BLOCK_M, 0, D1, D, True)
    q2 = load_tile(q_ptr, start_m, tokens, q_row, BLOCK_M, D1, D2, D, True)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc1, acc2, top, total = attend(
            acc1,
            acc2,
            top,
            total,
            q1,
            q2,
            k_ptr,
            v_ptr,
            k_row,
            v_row,
            start,
            keys,
            scale_log2,
            D,
            D1,
            D2,
            BLOCK_N,
            False,
        )
    if whole < keys:
        acc1, acc2, top, total = attend(
            acc1,
            acc2,
            top,
            total,
            q1,
            q2,
            k_ptr,
            v_ptr,
            k_row,
            v_row,
            whole,
            keys,
            scale_log2,
            D,
            D1,
            D2,
            BLOCK_N,
            True,
        )

    row = start_m + tl.arange(0, BLOCK_M)
    logsumexp = (top + tl.math.log2(total)) * LN_2
    tl.store(logsumexp_ptr + tl.program_id(1).to(tl.int64) * tokens + row, logsumexp, mask=row < tokens)
    out_ptr += (image * tokens * heads + head) * D
    out_row = heads * (D // 8)
    scale = 1.0 / total[:, None]
    store_tile(out_ptr, acc1 * scale, start_m, tokens, out_row, BLOCK_M, 0, D1, D)
    if D > D1:
        store_tile(out_ptr, acc2 * scale, start_m, tokens, out_row, BLOCK_M, D1, D2, D)


def split_head(head_size: int) -> tuple[int, int]:
    """(D1, D2), powers of two from 16 on: D1 alone covers the head, or D1 + D2 do with less padding.

    D2 is at least a quarter of D1: a narrower strip beside 128 columns makes the compiler spill on sm_80.
    """
    whole = max(16, triton.next_power_of_2(head_size))
    first = whole // 2
    second = max(16, first // 4, triton.next_power_of_2(max(head_size - first, 1)))
    return (first, second) if first >= 16 and first + second < whole else (whole, 16)


def shape_class(head_size: int) -> str:
    return next(f"d{most}" for most in (48, 96, 128, 160) if head_size <= most)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    image, row, head, _ = tensor.stride()
    return image // UNIT, row // UNIT, head // UNIT


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_size = q.shape
    q, k, v = in_units(q), in_units(k), in_units(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    config = find_config("attention_forward", shape_class(head_size))
    first, second = split_head(head_size)
    launch(
        attention_forward_kernel,
        (triton.cdiv(tokens, config.constants["BLOCK_M"]), batch * heads),
        *(q, k, v, out, logsumexp, scale * LOG2_E.value, tokens, k.shape[1], heads),
        *(*_strides(q), *_strides(k), *_strides(v)),
        config=config,
        D=head_size,
        D1=first,
        D2=second,
    )
    return out, logsumexp


@triton.jit
def attention_delta_kernel(
    grad_out_ptr,  # [B, N, heads, D]
    out_ptr,  # [B, N, heads, D]
    delta_ptr,  # [B, heads, N] float32
    tokens,
    heads,
    grad_image,
    grad_row,
    grad_head,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sum of grad_out * out over the head: what the softmax's backward subtracts."""
    start = tl.program_id(0) * BLOCK_M
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    grad_out_ptr += (image * grad_image + head * grad_head) * 8
    out_ptr += (image * tokens * heads + head) * D
    grad = load_tile(grad_out_ptr, start, tokens, grad_row, BLOCK_M, 0, D_PADDED, D, True)
    out = load_tile(out_ptr, start, tokens, heads * (D // 8), BLOCK_M, 0, D_PADDED, D, True)
    row = start + tl.arange(0, BLOCK_M)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * tokens + row, delta, mask=row < tokens)


@triton.jit
def attend_transposed(
    grad_k1,
    grad_k2,
    grad_v1,
    grad_v2,
    k1,
    k2,
    v1,
    v2,
    q_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    q_row,
    grad_row,
    start,
    tokens,
    scale_log2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of queries, added to the gradients of one block of keys and values"""
    row = start + tl.arange(0, BLOCK_M)
    if MASKED:  # rows of q and grad_out beyond the end are zero and add nothing
        logsumexp = tl.load(logsumexp_ptr + row, mask=row < tokens, other=0.0)
        delta = tl.load(delta_ptr + row, mask=row < tokens, other=0.0)
    else:
        logsumexp = tl.load(logsumexp_ptr + row)
        delta = tl.load(delta_ptr + row)
    q1 = load_tile(q_ptr, start, tokens, q_row, BLOCK_M, 0, D1, D, MASKED)
    scores = tl.dot(k1, tl.trans(q1))  # [BLOCK_N, BLOCK_M]
    if D > D1:
        q2 = load_tile(q_ptr, start, tokens, q_row, BLOCK_M, D1, D2, D, MASKED)
        scores = tl.dot(k2, tl.trans(q2), scores)
    weights = tl.math.exp2(scores * scale_log2 - (logsumexp * LOG2_E)[None, :])
    grad_out1 = load_tile(grad_out_ptr, start, tokens, grad_row, BLOCK_M, 0, D1, D, MASKED)
    grad_weights = tl.dot(v1, tl.trans(grad_out1))
    grad_v1 = tl.dot(weights.to(q1.dtype), grad_out1, grad_v1)
    if D > D1:
        grad_out2 = load_tile(grad_out_ptr, start, tokens, grad_row, BLOCK_M, D1, D2, D, MASKED)
        grad_weights = tl.dot(v2, tl.trans(grad_out2), grad_weights)
        grad_v2 = tl.dot(weights.to(q1.dtype), grad_out2, grad_v2)
    grad_scores = (weights * (grad_weights - delta[None, :])).to(q1.dtype)
    grad_k1 = tl.dot(grad_scores, q1, grad_k1)
    if D > D1:
        grad_k2 = tl.dot(grad_scores, q2, grad_k2)
    return grad_k1, grad_k2, grad_v1, grad_v2


@triton.jit
def attention_backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    grad_k_ptr,  # [B, M, heads, D]
    grad_v_ptr,  # [B, M, heads, D]
    scale,
    scale_log2,
    tokens,
    keys,
    heads,
    q_image,
    q_row,
    q_head,
    k_image,
    k_row,
    k_head,
    v_image,
    v_row,
    v_head,
    grad_image,
    grad_row,
    grad_head,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start_n = tl.program_id(0) * BLOCK_N
    pair = tl.program_id(1).to(tl.int64)
    image = pair // heads
    head = pair % heads
    q_ptr += (image * q_image + head * q_head) * 8
    k_ptr += (image * k_image + head * k_head) * 8
    v_ptr += (image * v_image + head * v_head) * 8
    grad_out_ptr += (image * grad_image + head * grad_head) * 8
    logsumexp_ptr += pair * tokens
    delta_ptr += pair * tokens

    k1 = load_tile(k_ptr, start_n, keys, k_row, BLOCK_N, 0, D1, D, True)
    k2 = load_tile(k_ptr, start_n, keys, k_row, BLOCK_N, D1, D2, D, True)
    v1 = load_tile(v_ptr, start_n, keys, v_row, BLOCK_N, 0, D1, D, True)
    v2 = load_tile(v_ptr, start_n, keys, v_row, BLOCK_N, D1, D2, D, True)
    grad_k1 = tl.zeros([BLOCK_N, D1], tl.float32)
    grad_k2 = tl.zeros([BLOCK_N, D2], tl.float32)
    grad_v1 = tl.zeros([BLOCK_N, D1], tl.float32)
    grad_v2 = tl.zeros([BLOCK_N, D2], tl.float32)

    whole = tokens // BLOCK_M * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        grad_k1, grad_k2, grad_v1, grad_v2 = attend_transposed(
            *(grad_k1, grad_k2, grad_v1, grad_v2, k1, k2, v1, v2, q_ptr, grad_out_ptr, logsumexp_ptr, delta_ptr),
            *(q_row, grad_row, start, tokens, scale_log2, D, D1, D2, BLOCK_M, False),
        )
    if whole < tokens:
        grad_k1, grad_k2, grad_v1, grad_v2 = attend_transposed(
            *(grad_k1, grad_k2, grad_v1, grad_v2, k1, k2, v1, v2, q_ptr, grad_out_ptr, logsumexp_ptr, delta_ptr),
            *(q_row, grad_row, whole, tokens, scale_log2, D, D1, D2, BLOCK_M, True),
        )

    offset = (image * keys * heads + head) * D
    out_row = heads * (D // 8)
    store_tile(grad_k_ptr + offset, grad_k1 * scale, start_n, keys, out_row, BLOCK_N, 0, D1, D)
    store_tile(grad_v_ptr + offset, grad_v1, start_n, keys, out_row, BLOCK_N, 0, D1, D)
    if D > D1:
        store_tile(grad_k_ptr + offset, grad_k2 * scale, start_n, keys, out_row, BLOCK_N, D1, D2, D)
        store_tile(grad_v_ptr + offset, grad_v2, start_n, keys, out_row, BLOCK_N, D1, D2, D)


@triton.jit
def attend_backward(
    grad_q1,
    grad_q2,
    q1,
    q2,
    grad_out1,
    grad_out2,
    logsumexp,  # [BLOCK_M], times log2(e)
    delta,  # [BLOCK_M]
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    start,
    keys,
    scale_log2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys, added to the gradient of one block of queries; keys beyond the end are zero and add nothing"""
    k1 = load_tile(k_ptr, start, keys, k_row, BLOCK_N, 0, D1, D, MASKED)
    v1 = load_tile(v_ptr, start, keys, v_row, BLOCK_N, 0, D1, D, MASKED)
    scores = tl.dot(q1, tl.trans(k1))  # [BLOCK_M, BLOCK_N]
    grad_weights = tl.dot(grad_out1, tl.trans(v1))
    if D > D1:
        k2 = load_tile(k_ptr, start, keys, k_row, BLOCK_N, D1, D2, D, MASKED)
        v2 = load_tile(v_ptr, start, keys, v_row, BLOCK_N, D1, D2, D, MASKED)
        scores = tl.dot(q2, tl.trans(k2), scores)
        grad_weights = tl.dot(grad_out2, tl.trans(v2), grad_weights)
    weights = tl.math.exp2(scores * scale_log2 - logsumexp[:, None])
    grad_scores = (weights * (grad_weights - delta[:, None])).to(k1.dtype)
    grad_q1 = tl.dot(grad_scores, k1, grad_q1)
    if D > D1:
        grad_q2 = tl.dot(grad_scores, k2, grad_q2)
    return grad_q1, grad_q2


@triton.jit
def attention_backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    grad_q_ptr,  # [B, N, heads, D]
    scale,
    scale_log2,
    tokens,
    keys,
    heads,
    q_image,
    q_row,
    q_head,
    k_image,
    k_row,
    k_head,
    v_image,
    v_row,
    v_head,
    grad_image,
    grad_row,
    grad_head,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start_m = tl.program_id(0) * BLOCK_M
    pair = tl.program_id(1).to(tl.int64)
    image = pair // heads
    head = pair % heads
    q_ptr += (image * q_image + head * q_head) * 8
    k_ptr += (image * k_image + head * k_head) * 8
    v_ptr += (image * v_image + head * v_head) * 8
    grad_out_ptr += (image * grad_image + head * grad_head) * 8

    row = start_m + tl.arange(0, BLOCK_M)
    logsumexp = tl.load(logsumexp_ptr + pair * tokens + row, mask=row < tokens, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + pair * tokens + row, mask=row < tokens, other=0.0)
    q1 = load_tile(q_ptr, start_m, tokens, q_row, BLOCK_M, 0, D1, D, True)
    q2 = load_tile(q_ptr, start_m, tokens, q_row, BLOCK_M, D1, D2, D, True)
    grad_out1 = load_tile(grad_out_ptr, start_m, tokens, grad_row, BLOCK_M, 0, D1, D, True)
    grad_out2 = load_tile(grad_out_ptr, start_m, tokens, grad_row, BLOCK_M, D1, D2, D, True)
    grad_q1 = tl.zeros([BLOCK_M, D1], tl.float32)
    grad_q2 = tl.zeros([BLOCK_M, D2], tl.float32)

    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        grad_q1, grad_q2 = attend_backward(
            *(grad_q1, grad_q2, q1, q2, grad_out1, grad_out2, logsumexp, delta, k_ptr, v_ptr, k_row, v_row),
            *(start, keys, scale_log2, D, D1, D2, BLOCK_N, False),
        )
    if whole < keys:
        grad_q1, grad_q2 = attend_backward(
            *(grad_q1, grad_q2, q1, q2, grad_out1, grad_out2, logsumexp, delta, k_ptr, v_ptr, k_row, v_row),
            *(whole, keys, scale_log2, D, D1, D2, BLOCK_N, True),
        )

    grad_q_ptr += (image * tokens * heads + head) * D
    out_row = heads * (D // 8)
    store_tile(grad_q_ptr, grad_q1 * scale, start_m, tokens, out_row, BLOCK_M, 0, D1, D)
    if D > D1:
        store_tile(grad_q_ptr, grad_q2 * scale, start_m, tokens, out_row, BLOCK_M, D1, D2, D)


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, head_size = q.shape
    keys = k.shape[1]
    grad_out, q, k, v, out = in_units(grad_out), in_units(q), in_units(k), in_units(v), out.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    delta = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)

    delta_config = find_config("attention_delta", shape_class(head_size))
    launch(
        attention_delta_kernel,
        (triton.cdiv(tokens, delta_config.constants["BLOCK_M"]), batch * heads),
        *(grad_out, out, delta, tokens, heads, *_strides(grad_out)),
        config=delta_config,
        D=head_size,
        D_PADDED=triton.next_power_of_2(head_size),
    )
    first, second = split_head(head_size)
    split = {"D": head_size, "D1": first, "D2": second}
    inputs = (q, k, v, grad_out, logsumexp, delta)
    sizes = (scale, scale * LOG2_E.value, tokens, keys, heads)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(grad_out))
    config = find_config("attention_backward_kv", shape_class(head_size))
    grid = (triton.cdiv(keys, config.constants["BLOCK_N"]), batch * heads)
    launch(attention_backward_kv_kernel, grid, *inputs, grad_k, grad_v, *sizes, *strides, config=config, **split)
    config = find_config("attention_backward_q", shape_class(head_size))
    grid = (triton.cdiv(tokens, config.constants["BLOCK_M"]), batch * heads)
    launch(attention_backward_q_kernel, grid, *inputs, grad_q, *sizes, *strides, config=config, **split)
    return grad_q, grad_k, grad_v
