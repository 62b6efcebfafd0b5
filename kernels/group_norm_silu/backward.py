"""Triton: the backward pass, with n = (x + added - mean) rstd, u = n gain + offset, and du the gradient of u."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.group_norm_silu.tiles import (
    activate_backward,
    add_vector,
    group_channels,
    group_offsets,
    load_added,
    load_affine,
    reduce_partials,
    row_channels,
    store_partials,
    tile_offsets,
)


@triton.jit
def backward_whole_kernel(
    grad_y_ptr,  # [B, P, C]
    x_ptr,  # [B, P, C]
    added_ptr,  # [B, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,  # [B, 2, C] sums over pixels of du and du n
    grad_x_ptr,  # [B, P, C]
    added_stride,
    pixels,
    channels,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradient of x in one group of one image, held in registers, and the sums of its channels."""
    image, group, channel, in_group = group_channels(CHANNELS_PER_GROUP, BLOCK_C)
    offsets, inside = group_offsets(image, channel, in_group, pixels, channels, BLOCK_P)

    row = image * tl.num_programs(0) + group
    added = load_added(added_ptr, image, added_stride, channel, in_group, HAS_ADDED)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_group, HAS_SCALE, HAS_SHIFT
    )
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    n = (add_vector(x, added, HAS_ADDED) - mean) * rstd
    grad_y = tl.load(grad_y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    du = activate_backward(grad_y, n, gain[None, :], offset[None, :], SILU)
    sum_du = tl.sum(du, 0)  # [BLOCK_C]
    sum_du_n = tl.sum(du * n, 0)
    tl.store(sums_ptr + image * 2 * channels + channel, sum_du, mask=in_group)
    tl.store(sums_ptr + (image * 2 + 1) * channels + channel, sum_du_n, mask=in_group)

    count = pixels * CHANNELS_PER_GROUP
    mean_dn = tl.sum(gain * sum_du) / count
    mean_dn_n = tl.sum(gain * sum_du_n) / count
    grad_x = rstd * (du * gain[None, :] - mean_dn - n * mean_dn_n)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_partial_kernel(
    grad_y_ptr,
    x_ptr,
    added_ptr,  # [B, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,  # [B, 2, chunks, C] sums of du and du n
    added_stride,
    pixels,
    channels,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums du and du n over one chunk of pixels of a block of channels."""
    chunk = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel, in_row = row_channels(channels, BLOCK_C)
    row = image * (channels // CHANNELS_PER_GROUP) + channel // CHANNELS_PER_GROUP
    mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
    added = load_added(added_ptr, image, added_stride, channel, in_row, HAS_ADDED)
    rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_row, HAS_SCALE, HAS_SHIFT
    )

    sum_du = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_du_n = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(TILES):
        offsets, inside = tile_offsets(image, chunk * TILES + tile, channel, in_row, pixels, channels, BLOCK_P)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        n = (add_vector(x, added, HAS_ADDED) - mean[None, :]) * rstd[None, :]
        grad_y = tl.load(grad_y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        du = activate_backward(grad_y, n, gain[None, :], offset[None, :], SILU)
        sum_du += du
        sum_du_n += du * n
    store_partials(partial_ptr, image, channel, in_row, channels, tl.sum(sum_du, 0), tl.sum(sum_du_n, 0))


@triton.jit
def backward_reduce_kernel(
    partial_ptr,  # [B, 2, chunks, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    sums_ptr,  # [B, 2, C]
    means_ptr,  # [B, 2, G] means over a group of dn and dn n
    pixels,
    channels,
    chunks,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reduces the chunks of one group to sums per channel and means per group."""
    image, group, channel, in_group = group_channels(CHANNELS_PER_GROUP, BLOCK_C)
    sum_du, sum_du_n = reduce_partials(partial_ptr, image, channel, in_group, channels, chunks, CHUNKS_PADDED)
    tl.store(sums_ptr + image * 2 * channels + channel, sum_du, mask=in_group)
    tl.store(sums_ptr + (image * 2 + 1) * channels + channel, sum_du_n, mask=in_group)
    gain, _ = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_group, HAS_SCALE, HAS_SHIFT
    )
    count = pixels * CHANNELS_PER_GROUP
    row = image * 2 * tl.num_programs(0) + group
    tl.store(means_ptr + row, tl.sum(gain * sum_du) / count)
    tl.store(means_ptr + row + tl.num_programs(0), tl.sum(gain * sum_du_n) / count)


@triton.jit
def backward_apply_kernel(
    grad_y_ptr,
    x_ptr,
    added_ptr,  # [B, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,  # [B, 2, G]
    grad_x_ptr,
    added_stride,
    pixels,
    channels,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradient of x in one tile; the images come in reverse, as in `forward_apply_kernel`."""
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    channel, in_row = row_channels(channels, BLOCK_C)
    offsets, inside = tile_offsets(image, tl.program_id(0), channel, in_row, pixels, channels, BLOCK_P)

    groups = channels // CHANNELS_PER_GROUP
    group = channel // CHANNELS_PER_GROUP
    mean = tl.load(mean_ptr + image * groups + group, mask=in_row, other=0.0)
    added = load_added(added_ptr, image, added_stride, channel, in_row, HAS_ADDED)
    rstd = tl.load(rstd_ptr + image * groups + group, mask=in_row, other=0.0)
    mean_dn = tl.load(means_ptr + image * 2 * groups + group, mask=in_row, other=0.0)
    mean_dn_n = tl.load(means_ptr + (image * 2 + 1) * groups + group, mask=in_row, other=0.0)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_row, HAS_SCALE, HAS_SHIFT
    )
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    n = (add_vector(x, added, HAS_ADDED) - mean[None, :]) * rstd[None, :]
    grad_y = tl.load(grad_y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    du = activate_backward(grad_y, n, gain[None, :], offset[None, :], SILU)
    grad_x = rstd[None, :] * (du * gain[None, :] - mean_dn[None, :] - n * mean_dn_n[None, :])
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_affine_kernel(
    sums_ptr,  # [B, 2, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,  # [B, C]
    grad_weight_ptr,  # [C]
    grad_bias_ptr,  # [C]
    grad_scale_ptr,  # [B, C]
    grad_shift_ptr,  # [B, C]
    batch,
    channels,
    HAS_SCALE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradients of weight, bias, scale and shift from the sums per channel."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_C], tl.float32)
    for image in range(batch):
        row = tl.cast(image, tl.int64) * channels + channel
        sum_du = tl.load(sums_ptr + row + tl.cast(image, tl.int64) * channels, mask=inside, other=0.0)
        sum_du_n = tl.load(sums_ptr + row + (tl.cast(image, tl.int64) + 1) * channels, mask=inside, other=0.0)
        tl.store(grad_shift_ptr + row, sum_du, mask=inside)
        tl.store(grad_scale_ptr + row, weight * sum_du_n + bias * sum_du, mask=inside)
        if HAS_SCALE:
            scale = 1.0 + tl.load(scale_ptr + row, mask=inside, other=0.0).to(tl.float32)
            sum_du *= scale
            sum_du_n *= scale
        grad_weight += sum_du_n
        grad_bias += sum_du
    tl.store(grad_weight_ptr + channel, grad_weight, mask=inside)
    tl.store(grad_bias_ptr + channel, grad_bias, mask=inside)
