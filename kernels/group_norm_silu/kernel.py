"""Triton, channels_last: x is [B, P, C] with P = H W pixels, statistics in float32.

Groups that fit on one multiprocessor are read once, by one program each. Larger ones take three launches: sums per
channel and chunk of pixels (which needs no grouping, so every access is dense whatever C/G is), a reduction of those to
one mean and rstd per group, and the normalisation. The last one takes the images in reverse, so that what the first
read last is still in L2. Sums are taken about the channel's value at pixel 0, which keeps them exact where the mean is
large against the deviation. The backward has the same two ways.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmseg_fast.kernels.configs import Config, find_config
from ldmseg_fast.kernels.launch import launch

MAX_WHOLE = 16384  # elements of a group, padded, that one program holds in registers
MAX_PARTIALS = 8192  # chunks times channels of a group that one program reduces


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
    """(n weight + bias) (1 + scale) + shift = n gain + offset"""
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
def activate(n, gain, offset, SILU: tl.constexpr):
    u = n * gain + offset
    if SILU:
        u = u / (1.0 + tl.exp(-u))
    return u


@triton.jit
def activate_backward(grad_y, n, gain, offset, SILU: tl.constexpr):
    """The gradient of u = n gain + offset"""
    if SILU:
        u = n * gain + offset
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        grad_y = grad_y * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return grad_y


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
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.arange(0, BLOCK_P)
    local = tl.arange(0, BLOCK_C)
    channel = group * CHANNELS_PER_GROUP + local
    in_group = local < CHANNELS_PER_GROUP
    inside = (pixel < pixels)[:, None] & in_group[None, :]
    offsets = image * pixels * channels + pixel[:, None] * channels + channel[None, :]

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
    y = activate(centred * rstd, gain[None, :], offset[None, :], SILU)
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
    chunk = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = channel < channels
    x_ptr += image * pixels * channels
    origin = tl.load(x_ptr + channel, mask=in_row, other=0.0).to(tl.float32)

    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & in_row[None, :]
        offsets = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - origin[None, :], 0.0)
        total += x
        square += x * x
    row = image * 2 * tl.num_programs(0) + chunk
    tl.store(partial_ptr + row * channels + channel, tl.sum(total, 0), mask=in_row)
    tl.store(partial_ptr + (row + tl.num_programs(0)) * channels + channel, tl.sum(square, 0), mask=in_row)


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
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, BLOCK_C)
    chunk = tl.arange(0, CHUNKS_PADDED)
    in_group = local < CHANNELS_PER_GROUP
    channel = group * CHANNELS_PER_GROUP + local
    inside = (chunk < chunks)[:, None] & in_group[None, :]
    offsets = image * 2 * chunks * channels + chunk[:, None] * channels + channel[None, :]

    total = tl.sum(tl.load(partial_ptr + offsets, mask=inside, other=0.0), 0)  # [BLOCK_C]
    square = tl.sum(tl.load(partial_ptr + offsets + chunks * channels, mask=inside, other=0.0), 0)
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
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = channel < channels
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[:, None] & in_row[None, :]
    offsets = image * pixels * channels + pixel.to(tl.int64)[:, None] * channels + channel[None, :]

    row = image * (channels // CHANNELS_PER_GROUP) + channel // CHANNELS_PER_GROUP
    mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_row, HAS_SCALE, HAS_SHIFT
    )
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = activate((x - mean[None, :]) * rstd[None, :], gain[None, :], offset[None, :], SILU)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_whole_kernel(
    grad_y_ptr,  # [B, P, C]
    x_ptr,  # [B, P, C]
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,  # [B, 2, C] sums over pixels of du and du n
    grad_x_ptr,  # [B, P, C]
    pixels,
    channels,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.arange(0, BLOCK_P)
    local = tl.arange(0, BLOCK_C)
    channel = group * CHANNELS_PER_GROUP + local
    in_group = local < CHANNELS_PER_GROUP
    inside = (pixel < pixels)[:, None] & in_group[None, :]
    offsets = image * pixels * channels + pixel[:, None] * channels + channel[None, :]

    row = image * tl.num_programs(0) + group
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_group, HAS_SCALE, HAS_SHIFT
    )
    n = (tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
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
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,  # [B, 2, chunks, C] sums of du and du n
    pixels,
    channels,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = channel < channels
    row = image * (channels // CHANNELS_PER_GROUP) + channel // CHANNELS_PER_GROUP
    mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_row, HAS_SCALE, HAS_SHIFT
    )

    sum_du = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_du_n = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & in_row[None, :]
        offsets = image * pixels * channels + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        n = (tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        grad_y = tl.load(grad_y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        du = activate_backward(grad_y, n, gain[None, :], offset[None, :], SILU)
        sum_du += du
        sum_du_n += du * n
    row = image * 2 * tl.num_programs(0) + chunk
    tl.store(partial_ptr + row * channels + channel, tl.sum(sum_du, 0), mask=in_row)
    tl.store(partial_ptr + (row + tl.num_programs(0)) * channels + channel, tl.sum(sum_du_n, 0), mask=in_row)


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
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, BLOCK_C)
    chunk = tl.arange(0, CHUNKS_PADDED)
    in_group = local < CHANNELS_PER_GROUP
    channel = group * CHANNELS_PER_GROUP + local
    inside = (chunk < chunks)[:, None] & in_group[None, :]
    offsets = image * 2 * chunks * channels + chunk[:, None] * channels + channel[None, :]

    sum_du = tl.sum(tl.load(partial_ptr + offsets, mask=inside, other=0.0), 0)  # [BLOCK_C]
    sum_du_n = tl.sum(tl.load(partial_ptr + offsets + chunks * channels, mask=inside, other=0.0), 0)
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
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,  # [B, 2, G]
    grad_x_ptr,
    pixels,
    channels,
    CHANNELS_PER_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = channel < channels
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[:, None] & in_row[None, :]
    offsets = image * pixels * channels + pixel.to(tl.int64)[:, None] * channels + channel[None, :]

    groups = channels // CHANNELS_PER_GROUP
    group = channel // CHANNELS_PER_GROUP
    mean = tl.load(mean_ptr + image * groups + group, mask=in_row, other=0.0)
    rstd = tl.load(rstd_ptr + image * groups + group, mask=in_row, other=0.0)
    mean_dn = tl.load(means_ptr + image * 2 * groups + group, mask=in_row, other=0.0)
    mean_dn_n = tl.load(means_ptr + (image * 2 + 1) * groups + group, mask=in_row, other=0.0)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, channel, channels, in_row, HAS_SCALE, HAS_SHIFT
    )
    n = (tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
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


def _channel_block(channels: int) -> int:
    """The largest power of two that divides C, up to 256; a padded one where that would be a sliver of a row."""
    divisor = min(channels & -channels, 256)
    return divisor if divisor >= 32 or divisor == channels else min(triton.next_power_of_2(channels), 256)


def _whole_blocks(pixels: int, channels_per_group: int) -> dict[str, int] | None:
    """Block sizes of the kernels that hold a group at once, None where it is too large."""
    block_p, block_c = triton.next_power_of_2(pixels), triton.next_power_of_2(channels_per_group)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c} if block_p * block_c <= MAX_WHOLE else None


def _whole_config(kernel: str, blocks: dict[str, int]) -> Config:
    return find_config(kernel, "large" if blocks["BLOCK_P"] * blocks["BLOCK_C"] > 4096 else "small")


def _tiling(
    kernel: str, pixels: int, channels: int, channels_per_group: int
) -> tuple[Config, dict[str, int], int, int]:
    """(configuration, block sizes, tiles of one program of the partial sums, programs over the pixels)"""
    config = find_config(kernel, "tiled")
    block_c = _channel_block(channels)
    block_p = max(config.constants["ELEMENTS"] // block_c, 1)
    tiles = triton.cdiv(pixels, block_p)
    most_chunks = max(MAX_PARTIALS // triton.next_power_of_2(channels_per_group), 1)
    tiles_per_program = triton.cdiv(tiles, most_chunks)
    chunks = triton.cdiv(tiles, tiles_per_program)
    return config, {"BLOCK_P": block_p, "BLOCK_C": block_c}, tiles_per_program, chunks


def _pointer(tensor: Tensor | None, instead: Tensor) -> Tensor:
    return instead if tensor is None else tensor.contiguous()


def group_norm_silu_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    pixels, per_group = height * width, channels // num_groups
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    mean, rstd = (torch.empty((batch, num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    added = x if residual is None else residual.contiguous(memory_format=torch.channels_last)
    affine = (weight.contiguous(), bias.contiguous(), _pointer(scale, weight), _pointer(shift, weight))
    flags: dict[str, Any] = {"HAS_SCALE": scale is not None, "HAS_SHIFT": shift is not None, "SILU": silu}
    flags |= {"HAS_RESIDUAL": residual is not None, "CHANNELS_PER_GROUP": per_group}

    blocks = _whole_blocks(pixels, per_group)
    if blocks is not None:
        config = _whole_config("group_norm_silu_forward", blocks)
        arguments = (x, *affine, added, y, mean, rstd, pixels, channels, eps)
        launch(forward_whole_kernel, (num_groups, batch), *arguments, config=config, **flags, **blocks)
        return y, mean, rstd

    config, blocks, tiles, chunks = _tiling("group_norm_silu_forward", pixels, channels, per_group)
    partial = torch.empty((batch, 2, chunks, channels), dtype=torch.float32, device=x.device)
    columns = triton.cdiv(channels, blocks["BLOCK_C"])
    launch(
        forward_partial_kernel,
        (chunks, columns, batch),
        *(x, partial, pixels, channels),
        config=config,
        TILES=tiles,
        **blocks,
    )
    launch(
        forward_reduce_kernel,
        (num_groups, batch),
        *(x, partial, mean, rstd, pixels, channels, chunks, eps),
        config=find_config("group_norm_silu_reduce", "all"),
        CHANNELS_PER_GROUP=per_group,
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        BLOCK_C=triton.next_power_of_2(per_group),
    )
    grid = (triton.cdiv(pixels, blocks["BLOCK_P"]), columns, batch)
    launch(
        forward_apply_kernel,
        grid,
        *(x, *affine, added, y, mean, rstd, pixels, channels),
        config=config,
        **flags,
        **blocks,
    )
    return y, mean, rstd


def group_norm_silu_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    num_groups = mean.shape[1]
    pixels, per_group = height * width, channels // num_groups
    x, grad_y = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad_y))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    like: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    grad_weight, grad_bias = torch.empty(channels, **like), torch.empty(channels, **like)
    grad_scale, grad_shift = torch.empty((batch, channels), **like), torch.empty((batch, channels), **like)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_(), grad_scale.zero_(), grad_shift.zero_()
    sums = torch.empty((batch, 2, channels), **like)
    weight, bias = weight.contiguous(), bias.contiguous()
    affine = (weight, bias, _pointer(scale, weight), _pointer(shift, weight))
    flags = {"HAS_SCALE": scale is not None, "HAS_SHIFT": shift is not None, "CHANNELS_PER_GROUP": per_group}

    blocks = _whole_blocks(pixels, per_group)
    if blocks is not None:
        config = _whole_config("group_norm_silu_backward", blocks)
        arguments = (grad_y, x, *affine, mean, rstd, sums, grad_x, pixels, channels)
        launch(backward_whole_kernel, (num_groups, batch), *arguments, config=config, SILU=silu, **flags, **blocks)
    else:
        config, blocks, tiles, chunks = _tiling("group_norm_silu_backward", pixels, channels, per_group)
        partial = torch.empty((batch, 2, chunks, channels), **like)
        means = torch.empty((batch, 2, num_groups), **like)
        columns = triton.cdiv(channels, blocks["BLOCK_C"])
        launch(
            backward_partial_kernel,
            (chunks, columns, batch),
            *(grad_y, x, *affine, mean, rstd, partial, pixels, channels),
            config=config,
            TILES=tiles,
            SILU=silu,
            **flags,
            **blocks,
        )
        launch(
            backward_reduce_kernel,
            (num_groups, batch),
            *(partial, *affine, sums, means, pixels, channels, chunks),
            config=find_config("group_norm_silu_reduce", "all"),
            CHUNKS_PADDED=triton.next_power_of_2(chunks),
            BLOCK_C=triton.next_power_of_2(per_group),
            **flags,
        )
        launch(
            backward_apply_kernel,
            (triton.cdiv(pixels, blocks["BLOCK_P"]), columns, batch),
            *(grad_y, x, *affine, mean, rstd, means, grad_x, pixels, channels),
            config=config,
            SILU=silu,
            **flags,
            **blocks,
        )

    config = find_config("group_norm_silu_affine", "all")
    launch(
        backward_affine_kernel,
        (triton.cdiv(channels, config.constants["BLOCK_C"]),),
        *(sums, *affine[:3], grad_weight, grad_bias, grad_scale, grad_shift, batch, channels),
        config=config,
        HAS_SCALE=scale is not None,
    )
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift
