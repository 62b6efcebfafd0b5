"""Triton: the forward pass, one program per block of queries of one head."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.attention.tiles import LN_2, at_head, load_tile, store_tile, this_head


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
    """Adds one block of keys to the running maximum, sum and weighted values (arXiv 2307.08691, algorithm 1)."""
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
    q_strides,
    k_strides,
    v_strides,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes one block of queries of one head (arXiv 2307.08691, algorithm 1)."""
    start_m = tl.program_id(0) * BLOCK_M
    pair, image, head = this_head(heads)
    q_ptr, q_row = at_head(q_ptr, q_strides, image, head)
    k_ptr, k_row = at_head(k_ptr, k_strides, image, head)
    v_ptr, v_row = at_head(v_ptr, v_strides, image, head)

    q1 = load_tile(q_ptr, start_m, tokens, q_row, BLOCK_M, 0, D1, D, True)
    q2 = load_tile(q_ptr, start_m, tokens, q_row, BLOCK_M, D1, D2, D, True)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc1, acc2, top, total = attend(
            *(acc1, acc2, top, total, q1, q2, k_ptr, v_ptr, k_row, v_row),
            *(start, keys, scale_log2, D, D1, D2, BLOCK_N, False),
        )
    if whole < keys:
        acc1, acc2, top, total = attend(
            *(acc1, acc2, top, total, q1, q2, k_ptr, v_ptr, k_row, v_row),
            *(whole, keys, scale_log2, D, D1, D2, BLOCK_N, True),
        )

    row = start_m + tl.arange(0, BLOCK_M)
    logsumexp = (top + tl.math.log2(total)) * LN_2
    tl.store(logsumexp_ptr + pair * tokens + row, logsumexp, mask=row < tokens)
    out_ptr += (image * tokens * heads + head) * D
    out_row = heads * (D // 8)
    scale = 1.0 / total[:, None]
    store_tile(out_ptr, acc1 * scale, start_m, tokens, out_row, BLOCK_M, 0, D1, D)
    if D > D1:
        store_tile(out_ptr, acc2 * scale, start_m, tokens, out_row, BLOCK_M, D1, D2, D)
