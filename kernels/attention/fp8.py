"""Triton: the forward pass with operands in e4m3, for GPUs of sm_89 and newer.

Two short launches prepare it: the largest magnitudes of each head's q, k and v, then copies in e4m3 whose unit is a
power of two, so that scaling itself rounds nothing. The copies lie as the tensor cores want them, with the reduced axis
innermost and padded with zeros: q and k as rows, v transposed. Their reduction advances by 32 columns, so a head of 40
costs 64 columns in the first product (as two steps, where half precision takes three at twice the price), 80 costs 96
and 160 costs 160; in the second product the head is split as in half precision.

The running maximum is rounded up to an integer (in units of log2), so that rescaling by it is exact and quantised
weights do not depend on the order of the blocks. They reach up to 2^8, which puts the range of e4m3 to use.
"""

import triton
import triton.language as tl

from ldmseg_fast.kernels.attention.tiles import at_head, load_tile, store_tile, this_head

WEIGHT_LOG2 = tl.constexpr(8.0)  # the largest weight is 2^8
LEAST_NORMAL = tl.constexpr(2.0**-6)
SUBNORMAL_ROUNDER = tl.constexpr(1.5 * 2.0**14)  # float32 has steps of 2^-9 there, as e4m3 below its normal numbers


@triton.jit
def to_e4m3(value, EMULATE: tl.constexpr):
    """Rounds float32 of magnitudes up to 256 to e4m3, to nearest even."""
    if EMULATE:  # Triton's interpreter truncates: hand it numbers that e4m3 holds
        bits = value.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (value + SUBNORMAL_ROUNDER) - SUBNORMAL_ROUNDER
        value = tl.where(tl.abs(value) < LEAST_NORMAL, small, normal)
    return value.to(tl.float8e4nv)


@triton.jit
def load_source(
    q_ptr,
    k_ptr,
    v_ptr,
    tokens,
    keys,
    heads,
    q_strides,
    k_strides,
    v_strides,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loads this program's block of one head of one tensor (0 q, 1 k, 2 v), float32 [ROWS, COLUMNS], zero outside."""
    _, image, head = this_head(heads)
    tensor = tl.program_id(2)
    q_ptr, q_row = at_head(q_ptr, q_strides, image, head)
    k_ptr, k_row = at_head(k_ptr, k_strides, image, head)
    v_ptr, v_row = at_head(v_ptr, v_strides, image, head)
    source_ptr = tl.where(tensor == 0, q_ptr, tl.where(tensor == 1, k_ptr, v_ptr))
    stride = tl.where(tensor == 0, q_row, tl.where(tensor == 1, k_row, v_row))
    rows = tl.where(tensor == 0, tokens, keys)
    return load_tile(source_ptr, tl.program_id(0) * ROWS, rows, stride, ROWS, 0, COLUMNS, D, True).to(tl.float32)


@triton.jit
def fp8_magnitude_kernel(
    q_ptr,  # [B, N, heads, D]
    k_ptr,  # [B, M, heads, D]
    v_ptr,  # [B, M, heads, D]
    magnitude_ptr,  # [B heads, 3, blocks] float32, the largest of each block of rows
    tokens,
    keys,
    heads,
    q_strides,
    k_strides,
    v_strides,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes the largest magnitude of one block of rows."""
    value = load_source(q_ptr, k_ptr, v_ptr, tokens, keys, heads, q_strides, k_strides, v_strides, D, COLUMNS, ROWS)
    row = (tl.program_id(1).to(tl.int64) * 3 + tl.program_id(2)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(magnitude_ptr + row, tl.max(tl.max(tl.abs(value), 1), 0))


@triton.jit
def fp8_quantise_kernel(
    q_ptr,  # [B, N, heads, D]
    k_ptr,  # [B, M, heads, D]
    v_ptr,  # [B, M, heads, D]
    magnitude_ptr,  # [B heads, 3, blocks]
    q8_ptr,  # [B heads, N padded, DQ]
    k8_ptr,  # [B heads, M padded, DQ]
    v8_ptr,  # [B heads, D, M padded]
    unit_ptr,  # [B heads, 3] float32: what a 1 in e4m3 stands for
    tokens,
    keys,
    heads,
    tokens_padded,
    keys_padded,
    q_strides,
    k_strides,
    v_strides,
    D: tl.constexpr,
    DQ: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two from the number of blocks on
    EMULATE: tl.constexpr,
):
    """Writes one block of rows in e4m3, and the head's unit."""
    pair = tl.program_id(1).to(tl.int64)
    tensor = tl.program_id(2)
    block = tl.arange(0, BLOCKS)
    blocks = tl.num_programs(0)
    magnitudes = tl.load(magnitude_ptr + (pair * 3 + tensor) * blocks + block, mask=block < blocks, other=0.0)
    exponent = tl.max(magnitudes, 0).to(tl.int32, bitcast=True) >> 23  # biased by 127
    exponent = tl.minimum(tl.maximum(exponent, 8), 254)
    # the largest magnitude comes to lie in [128, 256)
    factor = ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(unit_ptr + pair * 3 + tensor, ((exponent - 7) << 23).to(tl.float32, bitcast=True))

    value = load_source(q_ptr, k_ptr, v_ptr, tokens, keys, heads, q_strides, k_strides, v_strides, D, COLUMNS, ROWS)
    value = to_e4m3(value * factor, EMULATE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    if tensor == 2:
        transposed_ptr = v8_ptr + (pair * D + column[:, None]) * keys_padded + row[None, :]
        tl.store(transposed_ptr, tl.trans(value), mask=(column < D)[:, None] & (row < keys_padded)[None, :])
    else:
        rows = tl.where(tensor == 0, tokens_padded, keys_padded)
        rows_ptr = tl.where(tensor == 0, q8_ptr, k8_ptr) + pair * rows * DQ
        rows_ptr = rows_ptr + row.to(tl.int64)[:, None] * DQ + column[None, :]
        tl.store(rows_ptr, value, mask=(row < rows)[:, None] & (column < DQ)[None, :])


@triton.jit
def load_rows(matrix_ptr, row, stride, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads [ROWS, COLUMNS] of a padded matrix."""
    base = matrix_ptr + tl.cast(row, tl.int64) * stride
    return tl.load(base + tl.arange(0, ROWS)[:, None] * stride + (FIRST + tl.arange(0, COLUMNS))[None, :])


@triton.jit
def load_columns(
    matrix_ptr,
    column,
    stride,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    """Loads [ROWS, COLUMNS] from row FIRST on of v transposed, zero beyond row D."""
    row = FIRST + tl.arange(0, ROWS)
    pointers = matrix_ptr + column + row.to(tl.int64)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    if FIRST + ROWS > D:
        return tl.load(pointers, mask=(row < D)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def attend_fp8(
    acc1,  # [BLOCK_M, V1] float32
    acc2,  # [BLOCK_M, V2] float32
    top,  # [BLOCK_M] the exponent that weights are relative to
    total,  # [BLOCK_M] sum of weights
    q1,
    q2,
    k_ptr,
    v_ptr,
    start,
    keys,
    keys_padded,
    factor,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DQ: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Adds one block of keys, as `forward.attend`; the maximum is rounded up to an integer."""
    scores = tl.dot(q1, tl.trans(load_rows(k_ptr, start, DQ, BLOCK_N, 0, D1)))  # [BLOCK_M, BLOCK_N]
    if D > D1:
        scores = tl.dot(q2, tl.trans(load_rows(k_ptr, start, DQ, BLOCK_N, D1, D2)), scores)
    if MASKED:
        scores = tl.where((start + tl.arange(0, BLOCK_N) < keys)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.ceil(tl.max(scores, 1) * factor) - WEIGHT_LOG2)
    weights = tl.math.exp2(scores * factor - new_top[:, None])
    decay = tl.math.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    weights = to_e4m3(weights, EMULATE)
    # on sm_90 sums inside an e4m3 product keep fewer bits than float32: each block's are its own, added in registers
    v1 = tl.trans(load_columns(v_ptr, start, keys_padded, 0, V1, BLOCK_N, D))
    acc1 = acc1 * decay[:, None] + tl.dot(weights, v1)
    if D > V1:
        v2 = tl.trans(load_columns(v_ptr, start, keys_padded, V1, V2, BLOCK_N, D))
        acc2 = acc2 * decay[:, None] + tl.dot(weights, v2)
    return acc1, acc2, new_top, total


@triton.jit
def attention_fp8_kernel(
    q_ptr,  # [B heads, N padded, DQ] e4m3
    k_ptr,  # [B heads, M padded, DQ] e4m3
    v_ptr,  # [B heads, D, M padded] e4m3
    unit_ptr,  # [B heads, 3] float32
    out_ptr,  # [B, N, heads, D]
    scale_log2,
    tokens,
    keys,
    heads,
    tokens_padded,
    keys_padded,
    D: tl.constexpr,
    D1: tl.constexpr,  # q and k
    D2: tl.constexpr,
    DQ: tl.constexpr,  # D1 + D2, or D1 where that covers the head
    V1: tl.constexpr,  # v
    V2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Computes one block of queries of one head from the copies in e4m3."""
    start_m = tl.program_id(0) * BLOCK_M
    pair = tl.program_id(1).to(tl.int64)
    q_ptr += pair * tokens_padded * DQ
    k_ptr += pair * keys_padded * DQ
    v_ptr += pair * keys_padded * D
    factor = scale_log2 * (tl.load(unit_ptr + pair * 3) * tl.load(unit_ptr + pair * 3 + 1))

    q1 = load_rows(q_ptr, start_m, DQ, BLOCK_M, 0, D1)
    q2 = q1
    if D > D1:
        q2 = load_rows(q_ptr, start_m, DQ, BLOCK_M, D1, D2)
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, V2], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc1, acc2, top, total = attend_fp8(
            *(acc1, acc2, top, total, q1, q2, k_ptr, v_ptr, start, keys, keys_padded, factor),
            *(D, D1, D2, DQ, V1, V2, BLOCK_N, False, EMULATE),
        )
    if whole < keys:
        acc1, acc2, top, total = attend_fp8(
            *(acc1, acc2, top, total, q1, q2, k_ptr, v_ptr, whole, keys, keys_padded, factor),
            *(D, D1, D2, DQ, V1, V2, BLOCK_N, True, EMULATE),
        )

    scale = (tl.load(unit_ptr + pair * 3 + 2) / total)[:, None]
    out_ptr += ((pair // heads) * tokens * heads + pair % heads) * D
    out_row = heads * (D // 8)
    store_tile(out_ptr, acc1 * scale, start_m, tokens, out_row, BLOCK_M, 0, V1, D)
    if D > V1:
        store_tile(out_ptr, acc2 * scale, start_m, tokens, out_row, BLOCK_M, V1, V2, D)
