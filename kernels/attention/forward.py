"""Triton: the forward pass, one program per block of queries of one head."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.attention.tiles import LN_2, at_head, load_tile, store_tile, this_head, tiles_of

# 2^f on [-1/2, 1/2] by Remez's algorithm, relative error 7.5e-5; rounding to float16 costs 4.9e-4
C0 = tl.constexpr(0.99992807)
C1 = tl.constexpr(0.69326099)
C2 = tl.constexpr(0.24261112)
C3 = tl.constexpr(0.05517167)


@triton.jit
def exp2_by_fma(x):
    """Computes 2^x of x <= 0 without the special-function unit: 2^n by its bits, 2^(x - n) by a polynomial.

    So do Cody and Waite 1980, and FlashAttention-4 (Zadouri et al.). What lies below 2^-125 becomes that.
    """
    x = tl.maximum(x, -125.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + 12582912.0  # 1.5 2^23: its last bits are n, the nearest whole number
    f = x - (shifted - 12582912.0)
    p = ((f * C3 + C2) * f + C1) * f + C0
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # 2^n
    return p * power  # a product, so that NaN stays NaN


@triton.jit
def exp2_shared(x, QUARTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes 2^x of [ROWS, COLUMNS], the first QUARTERS / 4 of the columns by `exp2_by_fma`.

    Halves of the columns lie in registers of the same thread, so that parting and joining them moves nothing.
    """
    tl.static_assert(QUARTERS <= 2, "QUARTERS: 0, 1 or 2 expected")
    if QUARTERS == 0:
        return tl.math.exp2(x)
    first, second = tl.split(x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
    if QUARTERS == 1:
        least, more = tl.split(first.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1))
        first = tl.join(exp2_by_fma(least), tl.math.exp2(more)).permute(0, 2, 1).reshape(ROWS, COLUMNS // 2)
    else:
        first = exp2_by_fma(first)
    return tl.join(first, tl.math.exp2(second)).permute(0, 2, 1).reshape(ROWS, COLUMNS)


@triton.jit
def score(
    q1,
    q2,
    k1_ptr,  # of columns 0 to D1
    k2_ptr,  # of D2 more
    k_row,
    start,
    keys,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Computes the scores [BLOCK_M, BLOCK_N] of one block of keys, -inf where there is none."""
    k1 = load_tile(k1_ptr, start, keys, k_row, BLOCK_N, 0, D1, D, MASKED, DESCRIBED)
    scores = tl.dot(q1, tl.trans(k1))
    if D > D1:
        k2 = load_tile(k2_ptr, start, keys, k_row, BLOCK_N, D1, D2, D, MASKED, DESCRIBED)
        scores = tl.dot(q2, tl.trans(k2), scores)
    if MASKED:
        scores = tl.where((start + tl.arange(0, BLOCK_N) < keys)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def weigh(scores, top, total, scale_log2, QUARTERS: tl.constexpr):
    """Computes a block's weights, and brings the running maximum and sum up to date.

    Returns:
        weights [BLOCK_M, BLOCK_N] float32, what the sums so far are to be multiplied by, the maximum and the sum.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = exp2_shared(scores * scale_log2 - new_top[:, None], QUARTERS, scores.shape[0], scores.shape[1])
    decay = tl.math.exp2(top - new_top)
    return weights, decay, new_top, total * decay + tl.sum(weights, 1)


@triton.jit
def add_values(
    acc1,  # [BLOCK_M, D1] float32
    acc2,  # [BLOCK_M, D2] float32
    weights,
    decay,
    v1_ptr,  # of columns 0 to D1
    v2_ptr,  # of D2 more
    v_row,
    start,
    keys,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds one block of weighted values."""
    v1 = load_tile(v1_ptr, start, keys, v_row, BLOCK_N, 0, D1, D, MASKED, DESCRIBED)
    weights = weights.to(v1.dtype)
    acc1 = tl.dot(weights, v1, acc1 * decay[:, None])
    if D > D1:
        v2 = load_tile(v2_ptr, start, keys, v_row, BLOCK_N, D1, D2, D, MASKED, DESCRIBED)
        acc2 = tl.dot(weights, v2, acc2 * decay[:, None])
    return acc1, acc2


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
    DELAYED: tl.constexpr,
    QUARTERS: tl.constexpr,  # of the exponentials that `exp2_by_fma` computes: 0, 1 or 2
    DESCRIBED: tl.constexpr,  # keys and values are copied by tensor descriptors
):
    """Computes one block of queries of one head (arXiv 2307.08691, algorithm 1)."""
    start_m = tl.program_id(0) * BLOCK_M
    pair, image, head = this_head(heads)
    q_ptr, q_row = at_head(q_ptr, q_strides, image, head)
    k_ptr, k_row = at_head(k_ptr, k_strides, image, head)
    v_ptr, v_row = at_head(v_ptr, v_strides, image, head)
    k1_ptr = tiles_of(k_ptr, keys, k_row, BLOCK_N, D1, D, DESCRIBED)
    v1_ptr = tiles_of(v_ptr, keys, v_row, BLOCK_N, D1, D, DESCRIBED)
    k2_ptr, v2_ptr = k1_ptr, v1_ptr
    if D > D1:
        k2_ptr = tiles_of(k_ptr, keys, k_row, BLOCK_N, D2, D, DESCRIBED)
        v2_ptr = tiles_of(v_ptr, keys, v_row, BLOCK_N, D2, D, DESCRIBED)

    q1 = load_tile(q_ptr, start_m, tokens, q_row, BLOCK_M, 0, D1, D, True)
    q2 = load_tile(q_ptr, start_m, tokens, q_row, BLOCK_M, D1, D2, D, True)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    whole = keys // BLOCK_N * BLOCK_N
    if DELAYED:  # a block's values are multiplied while the next block's weights are computed
        weights = tl.zeros([BLOCK_M, BLOCK_N], q1.dtype)
        decay = tl.full([BLOCK_M], 1.0, tl.float32)
        for start in range(0, whole, BLOCK_N):
            scores = score(*(q1, q2, k1_ptr, k2_ptr, k_row, start, keys, D, D1, D2, BLOCK_N, DESCRIBED, False))
            before = tl.maximum(start - BLOCK_N, 0)
            acc1, acc2 = add_values(
                *(acc1, acc2, weights, decay, v1_ptr, v2_ptr, v_row, before, keys, D, D1, D2, BLOCK_N, DESCRIBED, False)
            )
            new_weights, decay, top, total = weigh(scores, top, total, scale_log2, QUARTERS)
            weights = new_weights.to(q1.dtype)
        before = tl.maximum(whole - BLOCK_N, 0)
        acc1, acc2 = add_values(
            *(acc1, acc2, weights, decay, v1_ptr, v2_ptr, v_row, before, keys, D, D1, D2, BLOCK_N, DESCRIBED, True)
        )
    else:
        for start in range(0, whole, BLOCK_N):
            scores = score(*(q1, q2, k1_ptr, k2_ptr, k_row, start, keys, D, D1, D2, BLOCK_N, DESCRIBED, False))
            weights, decay, top, total = weigh(scores, top, total, scale_log2, QUARTERS)
            acc1, acc2 = add_values(
                *(acc1, acc2, weights, decay, v1_ptr, v2_ptr, v_row, start, keys, D, D1, D2, BLOCK_N, DESCRIBED, False)
            )
    if whole < keys:
        scores = score(*(q1, q2, k1_ptr, k2_ptr, k_row, whole, keys, D, D1, D2, BLOCK_N, DESCRIBED, True))
        rest, decay, top, total = weigh(scores, top, total, scale_log2, QUARTERS)
        acc1, acc2 = add_values(
            *(acc1, acc2, rest, decay, v1_ptr, v2_ptr, v_row, whole, keys, D, D1, D2, BLOCK_N, DESCRIBED, True)
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
