"""Triton: the forward pass."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.group_norm_silu.tiles import (
    activate,
    add_vector,
    group_channels,
    group_offsets,
    load_added,
    load_affine,
    tile_offsets,
)


@triton.jit
def block_lanes(channels, CHANNELS_PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Finds (channels, which of them exist) of a program for GROUPS whole groups."""
    lane = tl.arange(0, BLOCK_C)
    channel = tl.program_id(1) * (GROUPS * CHANNELS_PER_GROUP) + lane
    return channel, (lane < GROUPS * CHANNELS_PER_GROUP) & (channel < channels)


@triton.jit
def members(CHANNELS_PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Makes [BLOCK_G, BLOCK_C]: which lane belongs to which group of the block."""
    return (tl.arange(0, BLOCK_C) // CHANNELS_PER_GROUP)[None, :] == tl.arange(0, BLOCK_G)[:, None]


@triton.jit
def per_group(value, member):
    """Adds up [BLOCK_C] over each group, to [BLOCK_G]."""
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)


@triton.jit
def per_channel(value, member):
    """Hands [BLOCK_G] to each group's channels, [BLOCK_C]."""
    return tl.sum(tl.where(member, value[:, None], 0.0), 0)


@triton.jit
def forward_whole_kernel(
    x_ptr,  # [B, P, C]
    added_ptr,  # [B, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,  # [B, P, C]
    y_ptr,  # [B, P, C]
    mean_ptr,  # [B, G]
    rstd_ptr,  # [B, G]
    added_stride,
    pixels,
    channels,
    eps,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_ADDED: tl.constexpr,
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
    x = add_vector(x, load_added(added_ptr, image, added_stride, channel, in_group, HAS_ADDED), HAS_ADDED)
    count = pixels * CHANNELS_PER_GROUP
    mean = tl.sum(tl.where(inside, x, 0.0)) / count
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / count + eps)
    row = image * tl.num_programs(0) + group
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_group, HAS_SCALE, HAS_SHIFT
    )
    y = activate(centred, (gain * rstd)[None, :], offset[None, :], SILU, INTERPRETED)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def forward_moments_kernel(
    x_ptr,  # [B, P, C]
    added_ptr,  # [B, C]
    partial_ptr,  # [B, 2, chunks, G]: each chunk's mean, and sum of squares about it
    added_stride,
    pixels,
    channels,
    groups,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    GROUPS: tl.constexpr,  # of a program
    TILES: tl.constexpr,  # of BLOCK_P pixels, for one program
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes mean and squares of whole groups over one chunk of pixels, tile after tile.

    Two sets are merged as Chan et al. 1979 do (Updating formulae and a pairwise algorithm for computing sample
    variances, equation 1.5), so that a large mean costs no digits.
    """
    chunk = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel, in_row = block_lanes(channels, CHANNELS_PER_GROUP, GROUPS, BLOCK_C)
    member = members(CHANNELS_PER_GROUP, BLOCK_G, BLOCK_C)
    added = load_added(added_ptr, image, added_stride, channel, in_row, HAS_ADDED)

    mean = tl.zeros([BLOCK_G], tl.float32)
    squares = tl.zeros([BLOCK_G], tl.float32)
    count = 0.0
    for tile in range(TILES):
        first = (chunk * TILES + tile) * BLOCK_P
        offsets, inside = tile_offsets(image, chunk * TILES + tile, channel, in_row, pixels, channels, BLOCK_P)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, add_vector(x, added, HAS_ADDED), 0.0)
        here = tl.minimum(tl.maximum(pixels - first, 0), BLOCK_P).to(tl.float32) * CHANNELS_PER_GROUP
        tile_mean = per_group(tl.sum(x, 0), member) / tl.maximum(here, 1.0)
        centred = tl.where(inside, x - per_channel(tile_mean, member)[None, :], 0.0)
        share = here / tl.maximum(count + here, 1.0)
        apart = tile_mean - mean
        mean += apart * share
        squares += per_group(tl.sum(centred * centred, 0), member) + apart * apart * (count * share)
        count += here

    group = tl.program_id(1) * GROUPS + tl.arange(0, BLOCK_G)
    exists = (tl.arange(0, BLOCK_G) < GROUPS) & (group < groups)
    partial_ptr += (image * 2 * tl.num_programs(0) + chunk) * groups
    tl.store(partial_ptr + group, mean, mask=exists)
    tl.store(partial_ptr + tl.num_programs(0) * groups + group, squares, mask=exists)


@triton.jit
def forward_apply_kernel(
    x_ptr,  # [B, P, C]
    added_ptr,  # [B, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,  # [B, P, C]
    partial_ptr,  # [B, 2, chunks, G]
    y_ptr,  # [B, P, C]
    mean_ptr,  # [B, G]
    rstd_ptr,  # [B, G]
    added_stride,
    pixels,
    channels,
    groups,
    chunks,
    eps,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,  # of the chunks
    CHUNKS_PADDED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges the chunks of whole groups and normalises one tile of them; the images come in reverse.

    So the last that was read is still in L2. The programs of an image's first tile store the statistics.
    """
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    channel, in_row = block_lanes(channels, CHANNELS_PER_GROUP, GROUPS, BLOCK_C)
    member = members(CHANNELS_PER_GROUP, BLOCK_G, BLOCK_C)

    chunk = tl.arange(0, CHUNKS_PADDED)
    group = tl.program_id(1) * GROUPS + tl.arange(0, BLOCK_G)
    group_exists = (tl.arange(0, BLOCK_G) < GROUPS) & (group < groups)
    exists = (chunk < chunks)[:, None] & group_exists[None, :]
    places = (image * 2 * chunks + chunk[:, None]) * groups + group[None, :]
    means = tl.load(partial_ptr + places, mask=exists, other=0.0)
    squares = tl.sum(tl.load(partial_ptr + chunks * groups + places, mask=exists, other=0.0), 0)
    counts = tl.minimum(tl.maximum(pixels - chunk * (TILES * BLOCK_P), 0), TILES * BLOCK_P).to(tl.float32)[:, None]
    mean = tl.sum(counts * means, 0) / pixels
    apart = tl.where(exists, means - mean[None, :], 0.0)
    squares += tl.sum(counts * apart * apart, 0) * CHANNELS_PER_GROUP
    rstd = tl.rsqrt(squares / (pixels * CHANNELS_PER_GROUP) + eps)
    first = group_exists & (tl.program_id(0) == 0)
    tl.store(mean_ptr + image * groups + group, mean, mask=first)
    tl.store(rstd_ptr + image * groups + group, rstd, mask=first)

    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_row, HAS_SCALE, HAS_SHIFT
    )
    gain *= per_channel(rstd, member)
    added = load_added(added_ptr, image, added_stride, channel, in_row, HAS_ADDED)
    offset += (added - per_channel(mean, member)) * gain

    offsets, inside = tile_offsets(image, tl.program_id(0), channel, in_row, pixels, channels, BLOCK_P)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = activate(x, gain[None, :], offset[None, :], SILU, INTERPRETED)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
