"""Triton: a product of rows, normalised as they are read, with what follows on the tile that is in registers."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.group_norm_silu.forward import (
    members,
    merge_chunks,
    per_channel,
    store_moments,
    tile_moments,
)
from ldmseg_fast.kernels.group_norm_silu.tiles import merge_sets

# what comes before the product
NOTHING = tl.constexpr(0)
OF_ROWS = tl.constexpr(1)
OF_GROUPS = tl.constexpr(2)


@triton.jit
def row_moments(x_ptr, row, exists, columns, stride, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Computes mean and 1 / standard deviation of rows, a block of columns after the other."""
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    count = 0.0
    for start in range(0, columns, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = exists[:, None] & (column < columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        here = tl.minimum(columns - start, BLOCK_K).to(tl.float32)
        block_mean = tl.sum(x, 1) / here
        centred = tl.where(inside, x - block_mean[:, None], 0.0)
        mean, squares, count = merge_sets(mean, squares, count, block_mean, tl.sum(centred * centred, 1), here)
    return mean, tl.rsqrt(squares / columns + eps)


@triton.jit
def linear_kernel(
    x_ptr,  # [B, P, K]
    beside_ptr,  # [B, P, L]
    weight_ptr,  # [N, K + L], gated [2 N, K + L]
    bias_ptr,  # [N], gated [2 N]
    gain_ptr,  # [K]
    offset_ptr,  # [K]
    partial_ptr,  # [B, 2, chunks, groups], moments of x
    residual_ptr,  # [B, P, N]
    out_ptr,  # [B, P, N]
    moments_ptr,  # [B, 2, chunks, N / CHANNELS_OUT]
    pixels,
    inputs,  # K
    more,  # L
    outputs,  # N
    groups,
    chunks,
    eps,
    NORM: tl.constexpr,
    HAS_BESIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    CHANNELS_IN: tl.constexpr,  # of a group of x
    GROUPS_IN: tl.constexpr,  # padded
    CHUNKS_PADDED: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,  # of a group of the result
    GROUPS_OUT: tl.constexpr,  # of a program; 0 where no moments are wanted
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,  # of a chunk of moments
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one tile of an image's rows and the layer's outputs."""
    image = tl.program_id(2).to(tl.int64)
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = local < pixels
    row = image * pixels + local
    lane = tl.arange(0, BLOCK_N)
    if GROUPS_OUT > 0:
        output = tl.program_id(1) * (GROUPS_OUT * CHANNELS_OUT) + lane
        in_outputs = (lane < GROUPS_OUT * CHANNELS_OUT) & (output < outputs)
    else:
        output = tl.program_id(1) * BLOCK_N + lane
        in_outputs = output < outputs

    if NORM == OF_ROWS:
        row_mean, row_rstd = row_moments(x_ptr, row, in_rows, inputs, inputs, eps, BLOCK_M, BLOCK_K)
    elif NORM == OF_GROUPS:
        group = tl.arange(0, GROUPS_IN)
        group_mean, group_rstd = merge_chunks(
            *(partial_ptr, image, group, group < groups, groups, chunks, pixels, eps, CHANNELS_IN, ROWS),
            CHUNKS_PADDED,
        )

    width = inputs + more
    weight_row = weight_ptr + output.to(tl.int64) * width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        exists = column < inputs
        inside = in_rows[:, None] & exists[None, :]
        x = tl.load(x_ptr + row[:, None] * inputs + column[None, :], mask=inside, other=0.0)
        if NORM != NOTHING:
            gain = tl.load(gain_ptr + column, mask=exists, other=0.0).to(tl.float32)
            offset = tl.load(offset_ptr + column, mask=exists, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            if NORM == OF_ROWS:
                wide = (wide - row_mean[:, None]) * row_rstd[:, None]
            else:
                member = (column // CHANNELS_IN)[None, :] == group[:, None]
                gain *= per_channel(group_rstd, member)
                wide -= per_channel(group_mean, member)[None, :]
            x = (wide * gain[None, :] + offset[None, :]).to(x.dtype)
        inside = in_outputs[:, None] & exists[None, :]
        weight = tl.load(weight_row[:, None] + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        if GATED:
            below = weight_row[:, None] + tl.cast(outputs, tl.int64) * width
            weight = tl.load(below + column[None, :], mask=inside, other=0.0)
            gate = tl.dot(x, tl.trans(weight), gate, input_precision="ieee")
    if HAS_BESIDE:
        for start in range(0, more, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            exists = column < more
            inside = in_rows[:, None] & exists[None, :]
            x = tl.load(beside_ptr + row[:, None] * more + column[None, :], mask=inside, other=0.0)
            inside = in_outputs[:, None] & exists[None, :]
            weight = tl.load(weight_row[:, None] + inputs + column[None, :], mask=inside, other=0.0)
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(bias_ptr + output, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            gate += tl.load(bias_ptr + outputs + output, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
        acc *= 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    inside = in_rows[:, None] & in_outputs[None, :]
    places = row[:, None] * outputs + output[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
    stored = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, stored, mask=inside)

    if GROUPS_OUT > 0:
        member = members(CHANNELS_OUT, BLOCK_G, BLOCK_N)
        here = tl.minimum(pixels - tl.program_id(0) * BLOCK_M, BLOCK_M).to(tl.float32) * CHANNELS_OUT
        mean, squares = tile_moments(tl.where(inside, stored.to(tl.float32), 0.0), inside, here, member)
        slot = tl.arange(0, BLOCK_G)
        own = tl.program_id(1) * GROUPS_OUT + slot
        exists = (slot < GROUPS_OUT) & (own < outputs // CHANNELS_OUT)
        store_moments(moments_ptr, image, own, exists, outputs // CHANNELS_OUT, mean, squares)
