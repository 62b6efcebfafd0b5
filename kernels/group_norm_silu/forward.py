"""Triton: the forward pass."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.group_norm_silu.tiles import (
    activate,
    group_channels,
    group_offsets,
    load_affine,
    reduce_partials,
    row_channels,
    store_partials,
    tile_offsets,
)


@triton.jit
def forward_whole_kernel(
    x_ptr,  # [B, P, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,  # [B, P, C]
    y_ptr,  # [B, P, C]
    mean_ptr,  # [B, G]
    rstd_ptr,  # [B, G]
    pixels,
    channels,
    eps,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes one group of one image, held in registers."""
    image, group, channel, in_group = group_channels(CHANNELS_PER_GROUP, BLOCK_C)
    offsets, inside = group_offsets(image, channel, in_group, pixels, channels, BLOCK_P)

    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    count = pixels * CHANNELS_PER_GROUP
    mean = tl.sum(x) / count
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / count + eps)
    row = image * tl.num_programs(0) + group
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_group, HAS_SCALE, HAS_SHIFT
    )
    y = activate(centred * rstd, gain[None, :], offset[None, :], SILU, INTERPRETED)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def forward_partial_kernel(
    x_ptr,  # [B, P, C]
    partial_ptr,  # [B, 2, chunks, C] sums of x - x0 and (x - x0)^2
    pixels,
    channels,
    TILES: tl.constexpr,  # of BLOCK_P pixels, for one program
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums one chunk of pixels of a block of channels, about the channel's value at pixel 0."""
    chunk = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel, in_row = row_channels(channels, BLOCK_C)
    origin = tl.load(x_ptr + image * pixels * channels + channel, mask=in_row, other=0.0).to(tl.float32)

    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(TILES):
        offsets, inside = tile_offsets(image, chunk * TILES + tile, channel, in_row, pixels, channels, BLOCK_P)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - origin[None, :], 0.0)
        total += x
        square += x * x
    store_partials(partial_ptr, image, channel, in_row, channels, tl.sum(total, 0), tl.sum(square, 0))


@triton.jit
def forward_reduce_kernel(
    x_ptr,  # [B, P, C]
    partial_ptr,  # [B, 2, chunks, C]
    mean_ptr,  # [B, G]
    rstd_ptr,  # [B, G]
    pixels,
    channels,
    chunks,
    eps,
    CHANNELS_PER_GROUP: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reduces the chunks of one group to its mean and 1 / standard deviation."""
    image, group, channel, in_group = group_channels(CHANNELS_PER_GROUP, BLOCK_C)
    total, square = reduce_partials(partial_ptr, image, channel, in_group, channels, chunks, CHUNKS_PADDED)
    origin = tl.load(x_ptr + image * pixels * channels + channel, mask=in_group, other=0.0).to(tl.float32)
    channel_mean = origin + total / pixels
    mean = tl.sum(tl.where(in_group, channel_mean, 0.0)) / CHANNELS_PER_GROUP
    deviation = tl.where(in_group, channel_mean - mean, 0.0)
    within = square - total * total / pixels  # sum of squares about the channel's own mean
    variance = tl.sum(within / pixels + deviation * deviation) / CHANNELS_PER_GROUP
    row = image * tl.num_programs(0) + group
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, tl.rsqrt(variance + eps))


@triton.jit
def forward_apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    channels,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalises one tile; the images come in reverse, so that the last that was read is still in L2."""
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    channel, in_row = row_channels(channels, BLOCK_C)
    offsets, inside = tile_offsets(image, tl.program_id(0), channel, in_row, pixels, channels, BLOCK_P)

    row = image * (channels // CHANNELS_PER_GROUP) + channel // CHANNELS_PER_GROUP
    mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_row, HAS_SCALE, HAS_SHIFT
    )
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = activate((x - mean[None, :]) * rstd[None, :], gain[None, :], offset[None, :], SILU, INTERPRETED)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
