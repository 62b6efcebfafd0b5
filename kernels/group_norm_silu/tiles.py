"""What the kernels of both directions share: where a program's channels and pixels lie, the vectors, SiLU."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.silu import silu_of


@triton.jit
def group_channels(CHANNELS_PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Finds (image, group, its channels, which of them exist) of a program for one group of one image."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, BLOCK_C)
    return image, group, group * CHANNELS_PER_GROUP + local, local < CHANNELS_PER_GROUP


@triton.jit
def group_offsets(image, channel, in_group, pixels, channels, BLOCK_P: tl.constexpr):
    """Finds ([P, C] offsets into [B, P, C], which of them exist) of all pixels of a group."""
    pixel = tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[:, None] & in_group[None, :]
    return image * pixels * channels + pixel[:, None] * channels + channel[None, :], inside


@triton.jit
def row_channels(channels, BLOCK_C: tl.constexpr):
    """Finds (channels, which of them exist) of a program for a block of channels, whatever their groups."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, channel < channels


@triton.jit
def tile_offsets(image, tile, channel, in_row, pixels, channels, BLOCK_P: tl.constexpr):
    """Finds ([P, C] offsets into [B, P, C], which of them exist) of the `tile`-th block of pixels."""
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[:, None] & in_row[None, :]
    return image * pixels * channels + pixel.to(tl.int64)[:, None] * channels + channel[None, :], inside


@triton.jit
def store_partials(partial_ptr, image, channel, in_row, channels, first, second):
    """Stores two sums per channel of this program's chunk of pixels, to [B, 2, chunks, C]."""
    row = image * 2 * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_ptr + row * channels + channel, first, mask=in_row)
    tl.store(partial_ptr + (row + tl.num_programs(0)) * channels + channel, second, mask=in_row)


@triton.jit
def reduce_partials(partial_ptr, image, channel, in_group, channels, chunks, CHUNKS_PADDED: tl.constexpr):
    """Adds up the two sums per channel over all chunks."""
    chunk = tl.arange(0, CHUNKS_PADDED)
    inside = (chunk < chunks)[:, None] & in_group[None, :]
    offsets = image * 2 * chunks * channels + chunk[:, None] * channels + channel[None, :]
    first = tl.sum(tl.load(partial_ptr + offsets, mask=inside, other=0.0), 0)
    return first, tl.sum(tl.load(partial_ptr + offsets + chunks * channels, mask=inside, other=0.0), 0)


@triton.jit
def merge_sets(mean, squares, count, other_mean, other_squares, others):
    """Merges two sets of numbers, each by its mean, its squares about that and its size: (mean, squares, size).

    So a large mean costs no digits (Chan et al. 1979, Updating formulae and a pairwise algorithm for computing sample
    variances, equation 1.5).
    """
    share = others / tl.maximum(count + others, 1.0)
    apart = other_mean - mean
    return mean + apart * share, squares + other_squares + apart * apart * (count * share), count + others


@triton.jit
def load_affine(
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [B, C]
    shift_ptr,  # [B, C]
    image,
    channel,
    channels,
    inside,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Loads gain and offset of (n weight + bias) (1 + scale) + shift = n gain + offset."""
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scale = 1.0 + tl.load(scale_ptr + image * channels + channel, mask=inside, other=0.0).to(tl.float32)
        gain *= scale
        offset *= scale
    if HAS_SHIFT:
        offset += tl.load(shift_ptr + image * channels + channel, mask=inside, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def load_added(added_ptr, image, added_stride, channel, inside, HAS_ADDED: tl.constexpr):
    """Loads the vector that is added before the statistics, zeros without one."""
    added = tl.zeros(channel.shape, tl.float32)
    if HAS_ADDED:
        added = tl.load(added_ptr + image * added_stride + channel, mask=inside, other=0.0).to(tl.float32)
    return added


@triton.jit
def add_vector(x, added, HAS_ADDED: tl.constexpr):
    """Adds a vector [BLOCK_C] to [BLOCK_P, BLOCK_C] if there is one: a sum with zeros would cost an instruction."""
    if HAS_ADDED:
        x += added[None, :]
    return x


@triton.jit
def activate(n, gain, offset, SILU: tl.constexpr, INTERPRETED: tl.constexpr):
    """Computes u = n gain + offset, or silu(u)."""
    u = n * gain + offset
    if SILU:
        u = silu_of(u, INTERPRETED)
    return u


@triton.jit
def activate_backward(grad_y, n, gain, offset, SILU: tl.constexpr):
    """Computes the gradient of u = n gain + offset."""
    if SILU:
        u = n * gain + offset
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        grad_y = grad_y * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return grad_y
