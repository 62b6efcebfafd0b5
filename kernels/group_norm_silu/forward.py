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
    merge_sets,
    tile_offsets,
)

# where `forward_moments_kernel` finds its numbers
ALONE = tl.constexpr(0)
SUM = tl.constexpr(1)
JOIN = tl.constexpr(2)
CHUNKS_AT_ONCE = tl.constexpr(64)  # of which a program merges the moments: those of 64x64 pixels


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
def tile_moments(x, inside, count, member):
    """Computes mean and squares about it of each group in a tile [BLOCK_P, BLOCK_C] of `count` numbers a group.

    What is not inside must be 0.
    """
    mean = per_group(tl.sum(x, 0), member) / tl.maximum(count, 1.0)
    centred = tl.where(inside, x - per_channel(mean, member)[None, :], 0.0)
    return mean, per_group(tl.sum(centred * centred, 0), member)


@triton.jit
def load_source(
    x_ptr,
    other_ptr,
    gathered_ptr,  # [B, P, C]
    added,
    image,
    tile,
    channel,
    in_row,
    pixels,
    channels,
    first,  # channels of x; JOIN reads the rest from the other
    SOURCE: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Loads a tile of x + added, and which of it exists.

    With a SOURCE it is the tile of (x + other) + added or [x, other] + added, which is stored, and returned as stored.
    """
    offsets, inside = tile_offsets(image, tile, channel, in_row, pixels, channels, BLOCK_P)
    if SOURCE == JOIN:
        own = inside & (channel < first)[None, :]
        places, _ = tile_offsets(image, tile, channel, in_row, pixels, first, BLOCK_P)
        x = tl.load(x_ptr + places, mask=own, other=0.0).to(tl.float32)
        places, _ = tile_offsets(image, tile, channel - first, in_row, pixels, channels - first, BLOCK_P)
        x += tl.load(other_ptr + places, mask=inside & (channel >= first)[None, :], other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if SOURCE == SUM:
            x += tl.load(other_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, add_vector(x, added, HAS_ADDED), 0.0)
    if SOURCE != ALONE:
        stored = x.to(gathered_ptr.dtype.element_ty)
        tl.store(gathered_ptr + offsets, stored, mask=inside)
        x = stored.to(tl.float32)
    return x, inside


@triton.jit
def forward_moments_kernel(
    x_ptr,  # [B, P, C]
    other_ptr,  # see `load_source`
    gathered_ptr,
    added_ptr,  # [B, C]
    partial_ptr,  # [B, 2, chunks, G]: each chunk's mean, and sum of squares about it
    first,
    added_stride,
    pixels,
    channels,
    groups,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    SOURCE: tl.constexpr,
    GROUPS: tl.constexpr,  # of a program
    TILES: tl.constexpr,  # of BLOCK_P pixels, for one program
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes mean and squares of whole groups over one chunk of pixels, tile after tile."""
    chunk = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel, in_row = block_lanes(channels, CHANNELS_PER_GROUP, GROUPS, BLOCK_C)
    member = members(CHANNELS_PER_GROUP, BLOCK_G, BLOCK_C)
    added = load_added(added_ptr, image, added_stride, channel, in_row, HAS_ADDED)

    mean = tl.zeros([BLOCK_G], tl.float32)
    squares = tl.zeros([BLOCK_G], tl.float32)
    count = 0.0
    for index in range(TILES):
        tile = chunk * TILES + index
        x, inside = load_source(
            *(x_ptr, other_ptr, gathered_ptr, added, image, tile, channel, in_row, pixels, channels, first),
            *(SOURCE, HAS_ADDED, BLOCK_P),
        )
        here = tl.minimum(tl.maximum(pixels - tile * BLOCK_P, 0), BLOCK_P).to(tl.float32) * CHANNELS_PER_GROUP
        tile_mean, tile_squares = tile_moments(x, inside, here, member)
        mean, squares, count = merge_sets(mean, squares, count, tile_mean, tile_squares, here)

    group = tl.program_id(1) * GROUPS + tl.arange(0, BLOCK_G)
    exists = (tl.arange(0, BLOCK_G) < GROUPS) & (group < groups)
    store_moments(partial_ptr, image, tl.program_id(0), tl.num_programs(0), group, exists, groups, mean, squares)


@triton.jit
def store_moments(partial_ptr, image, chunk, chunks, group, exists, groups, mean, squares):
    """Stores mean and squares of this program's groups over its chunk of pixels, to [B, 2, chunks, G]."""
    partial_ptr += (image * 2 * chunks + chunk) * groups
    tl.store(partial_ptr + group, mean, mask=exists)
    tl.store(partial_ptr + chunks * groups + group, squares, mask=exists)


@triton.jit
def load_chunks(
    partial_ptr,  # [B, 2, chunks, G]
    image,
    start,
    group,
    group_exists,
    groups,
    chunks,
    pixels,
    CHANNELS_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges a block of chunks, from `start` on: mean, squares about it and size of each group."""
    chunk = start + tl.arange(0, BLOCK)
    exists = (chunk < chunks)[:, None] & group_exists[None, :]
    places = (image * 2 * chunks + chunk[:, None]) * groups + group[None, :]
    means = tl.load(partial_ptr + places, mask=exists, other=0.0)
    squares = tl.sum(tl.load(partial_ptr + chunks * groups + places, mask=exists, other=0.0), 0)
    counts = tl.minimum(tl.maximum(pixels - chunk * ROWS, 0), ROWS).to(tl.float32)[:, None]
    rows = tl.minimum(pixels - start * ROWS, BLOCK * ROWS)
    mean = tl.sum(counts * means, 0) / rows
    apart = tl.where(exists, means - mean[None, :], 0.0)
    squares += tl.sum(counts * apart * apart, 0) * CHANNELS_PER_GROUP
    return mean, squares, (rows * CHANNELS_PER_GROUP).to(tl.float32)


@triton.jit
def merge_chunks(
    partial_ptr,  # [B, 2, chunks, G]
    image,
    group,
    group_exists,
    groups,
    chunks,
    pixels,
    eps,
    CHANNELS_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # pixels of a chunk
    CHUNKS_PADDED: tl.constexpr,
):
    """Computes mean and 1 / standard deviation of groups from the moments of all chunks.

    More than CHUNKS_AT_ONCE come in blocks: those of a large map would not fit into registers.
    """
    BLOCK: tl.constexpr = min(CHUNKS_PADDED, CHUNKS_AT_ONCE)
    about = (group, group_exists, groups, chunks, pixels)
    mean, squares, count = load_chunks(partial_ptr, image, 0, *about, CHANNELS_PER_GROUP, ROWS, BLOCK)
    if CHUNKS_PADDED > BLOCK:
        for start in range(BLOCK, chunks, BLOCK):
            more = load_chunks(partial_ptr, image, start, *about, CHANNELS_PER_GROUP, ROWS, BLOCK)
            mean, squares, count = merge_sets(mean, squares, count, *more)
    return mean, tl.rsqrt(squares / (pixels * CHANNELS_PER_GROUP) + eps)


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
    ROWS: tl.constexpr,  # pixels of a chunk
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

    group = tl.program_id(1) * GROUPS + tl.arange(0, BLOCK_G)
    group_exists = (tl.arange(0, BLOCK_G) < GROUPS) & (group < groups)
    mean, rstd = merge_chunks(
        *(partial_ptr, image, group, group_exists, groups, chunks, pixels, eps, CHANNELS_PER_GROUP, ROWS),
        CHUNKS_PADDED,
    )
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
