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
def columns_of(split, inputs, more, SPLITS: tl.constexpr, HAS_BESIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Returns where a split's columns of x start and end, and where those that stand beside them do."""
    if SPLITS == 1:
        start = 0
        end = inputs
        start_beside = 0
        end_beside = more
    else:
        blocks = tl.cdiv(inputs, BLOCK_K)
        whole = blocks
        if HAS_BESIDE:
            whole += tl.cdiv(more, BLOCK_K)
        first = whole * split // SPLITS
        last = whole * (split + 1) // SPLITS
        start = first * BLOCK_K
        end = tl.minimum(last * BLOCK_K, inputs)
        start_beside = tl.maximum(first - blocks, 0) * BLOCK_K
        end_beside = tl.minimum((last - blocks) * BLOCK_K, more)
    return start, end, start_beside, end_beside


@triton.jit
def sum_splits(
    acc,  # [BLOCK_M, BLOCK_N]
    gate,
    partial_ptr,  # [tiles, SPLITS, 1 or 2, BLOCK_M, BLOCK_N]
    arrived_ptr,  # [tiles], zeros
    tile,
    split,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Leaves a split's part of a tile; the program that comes last adds them up, always in the same order."""
    size = BLOCK_M * BLOCK_N
    step = 2 * size if GATED else size
    place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    parts = partial_ptr + tile * (SPLITS * step) + place
    tl.store(parts + split * step, acc)
    if GATED:
        tl.store(parts + split * step + size, gate)
    tl.debug_barrier()  # every thread has stored before one of them counts the program
    is_last = tl.atomic_add(arrived_ptr + tile, 1) == SPLITS - 1
    if is_last:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for each in range(SPLITS):
            acc += tl.load(parts + each * step, cache_modifier=".cg")  # other SMs wrote them: past the L1 cache
            if GATED:
                gate += tl.load(parts + each * step + size, cache_modifier=".cg")
    return acc, gate, is_last


@triton.jit
def outputs_of_tile(outputs, CHANNELS_OUT: tl.constexpr, GROUPS_OUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns a tile's outputs and which of them exist; where moments are wanted they are whole groups."""
    lane = tl.arange(0, BLOCK_N)
    if GROUPS_OUT > 0:
        output = tl.program_id(1) * (GROUPS_OUT * CHANNELS_OUT) + lane
        exists = (lane < GROUPS_OUT * CHANNELS_OUT) & (output < outputs)
    else:
        output = tl.program_id(1) * BLOCK_N + lane
        exists = output < outputs
    return output, exists


@triton.jit
def leave_moments(
    moments_ptr,  # [B, 2, chunks, N / CHANNELS_OUT]
    stored,  # [BLOCK_M, BLOCK_N]
    inside,
    image,
    block,
    blocks,
    pixels,
    outputs,
    CHANNELS_OUT: tl.constexpr,  # of a group
    GROUPS_OUT: tl.constexpr,  # of a program; 0 where no moments are wanted
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Leaves the moments of a tile that is stored, whose rows are one chunk of them."""
    if GROUPS_OUT > 0:
        member = members(CHANNELS_OUT, BLOCK_G, BLOCK_N)
        here = tl.minimum(pixels - block * BLOCK_M, BLOCK_M).to(tl.float32) * CHANNELS_OUT
        mean, squares = tile_moments(tl.where(inside, stored.to(tl.float32), 0.0), inside, here, member)
        slot = tl.arange(0, BLOCK_G)
        own = tl.program_id(1) * GROUPS_OUT + slot
        groups = outputs // CHANNELS_OUT
        exists = (slot < GROUPS_OUT) & (own < groups)
        store_moments(moments_ptr, image, block, blocks, own, exists, groups, mean, squares)


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
    parts_ptr,  # see `sum_splits`
    arrived_ptr,
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
    SPLITS: tl.constexpr,  # of the inner dimension
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one tile of an image's rows and the layer's outputs, or its share of the product."""
    image = tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0) // SPLITS
    block = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = local < pixels
    row = image * pixels + local
    output, in_outputs = outputs_of_tile(outputs, CHANNELS_OUT, GROUPS_OUT, BLOCK_N)

    if NORM == OF_ROWS:
        row_mean, row_rstd = row_moments(x_ptr, row, in_rows, inputs, inputs, eps, BLOCK_M, BLOCK_K)
    elif NORM == OF_GROUPS:
        group = tl.arange(0, GROUPS_IN)
        group_mean, group_rstd = merge_chunks(
            *(partial_ptr, image, group, group < groups, groups, chunks, pixels, eps, CHANNELS_IN, ROWS),
            CHUNKS_PADDED,
        )

    first, end, first_beside, end_beside = columns_of(split, inputs, more, SPLITS, HAS_BESIDE, BLOCK_K)
    width = inputs + more
    weight_row = weight_ptr + output.to(tl.int64) * width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_K):
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
        for start in range(first_beside, end_beside, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            exists = column < more
            inside = in_rows[:, None] & exists[None, :]
            x = tl.load(beside_ptr + row[:, None] * more + column[None, :], mask=inside, other=0.0)
            inside = in_outputs[:, None] & exists[None, :]
            weight = tl.load(weight_row[:, None] + inputs + column[None, :], mask=inside, other=0.0)
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")

    if SPLITS > 1:
        tile = (image * tl.num_programs(1) + tl.program_id(1)) * blocks + block
        acc, gate, is_last = sum_splits(
            *(acc, gate, parts_ptr, arrived_ptr, tile, split), SPLITS, GATED, BLOCK_M, BLOCK_N
        )
        if not is_last:
            return

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

    leave_moments(
        *(moments_ptr, stored, inside, image, block, blocks, pixels, outputs),
        *(CHANNELS_OUT, GROUPS_OUT, BLOCK_G, BLOCK_M, BLOCK_N),
    )
