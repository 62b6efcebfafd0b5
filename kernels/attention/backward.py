"""Triton: the backward pass: delta, then one kernel for the keys and values and one for the queries.

Scores are computed again from the saved logsumexp, so nothing of size N x M is kept (Dao et al., arXiv 2205.14135).
"""

import triton
import triton.language as tl

from ldmseg_fast.kernels.attention.tiles import LOG2_E, at_head, load_tile, store_tile, this_head


@triton.jit
def attention_delta_kernel(
    grad_out_ptr,  # [B, N, heads, D]
    out_ptr,  # [B, N, heads, D]
    delta_ptr,  # [B, heads, N] float32
    tokens,
    heads,
    grad_strides,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums grad_out * out over the head: what the softmax's backward subtracts."""
    start = tl.program_id(0) * BLOCK_M
    pair, image, head = this_head(heads)
    grad_out_ptr, grad_row = at_head(grad_out_ptr, grad_strides, image, head)
    out_ptr += (image * tokens * heads + head) * D
    grad = load_tile(grad_out_ptr, start, tokens, grad_row, BLOCK_M, 0, D_PADDED, D, True)
    out = load_tile(out_ptr, start, tokens, heads * (D // 8), BLOCK_M, 0, D_PADDED, D, True)
    row = start + tl.arange(0, BLOCK_M)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + pair * tokens + row, delta, mask=row < tokens)


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
    """Adds one block of queries to the gradients of one block of keys and values."""
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
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes the gradients of one block of keys and values of one head (arXiv 2307.08691, algorithm 2)."""
    start_n = tl.program_id(0) * BLOCK_N
    pair, image, head = this_head(heads)
    q_ptr, q_row = at_head(q_ptr, q_strides, image, head)
    k_ptr, k_row = at_head(k_ptr, k_strides, image, head)
    v_ptr, v_row = at_head(v_ptr, v_strides, image, head)
    grad_out_ptr, grad_row = at_head(grad_out_ptr, grad_strides, image, head)
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
    """Adds one block of keys to the gradient of one block of queries."""
    k1 = load_tile(k_ptr, start, keys, k_row, BLOCK_N, 0, D1, D, MASKED)
    v1 = load_tile(v_ptr, start, keys, v_row, BLOCK_N, 0, D1, D, MASKED)
    scores = tl.dot(q1, tl.trans(k1))  # [BLOCK_M, BLOCK_N]
    grad_weights = tl.dot(grad_out1, tl.trans(v1))
    if D > D1:
        k2 = load_tile(k_ptr, start, keys, k_row, BLOCK_N, D1, D2, D, MASKED)
        v2 = load_tile(v_ptr, start, keys, v_row, BLOCK_N, D1, D2, D, MASKED)
        scores = tl.dot(q2, tl.trans(k2), scores)
        grad_weights = tl.dot(grad_out2, tl.trans(v2), grad_weights)
    if MASKED:  # a score of 0 may be far above every key's, and its weight infinite
        scores = tl.where((start + tl.arange(0, BLOCK_N) < keys)[None, :], scores, float("-inf"))
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
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes the gradient of one block of queries of one head."""
    start_m = tl.program_id(0) * BLOCK_M
    pair, image, head = this_head(heads)
    q_ptr, q_row = at_head(q_ptr, q_strides, image, head)
    k_ptr, k_row = at_head(k_ptr, k_strides, image, head)
    v_ptr, v_row = at_head(v_ptr, v_strides, image, head)
    grad_out_ptr, grad_row = at_head(grad_out_ptr, grad_strides, image, head)

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
