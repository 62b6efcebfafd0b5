"""Launches group normalisation (Wu and He, arXiv 1803.08494) in Triton.

Tensors are channels_last: x is [B, P, C] with P = H W pixels, statistics in float32.

Groups that fit on one multiprocessor are read once, by one program each. Larger ones take two launches: mean and
squares of each chunk of pixels, and the normalisation, whose programs merge the chunks themselves. Both walk over whole
groups, as many as make rows of 16-byte accesses: 12 groups of 10 channels, say, in 128 lanes. The last one takes the
images in reverse, so that what the first read last is still in L2.

Backward, a large group takes three: sums per channel and chunk of pixels (which needs no grouping, so every access is
dense whatever C/G is), a reduction of those per group, and the gradient.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import Config, find_config
from ldmseg_fast.kernels.group_norm_silu.backward import (
    backward_affine_kernel,
    backward_apply_kernel,
    backward_partial_kernel,
    backward_reduce_kernel,
    backward_whole_kernel,
)
from ldmseg_fast.kernels.group_norm_silu.forward import (
    forward_apply_kernel,
    forward_moments_kernel,
    forward_whole_kernel,
)
from ldmseg_fast.kernels.group_norm_silu.reference import CHUNK, count_chunks
from ldmseg_fast.kernels.launch import launch

MAX_WHOLE = 16384  # elements of a group, padded, that one program holds in registers
MAX_CHUNKS = 64  # that one program merges, forward
MAX_PARTIALS = 8192  # chunks times channels of a group that one program reduces, backward
MAX_GROUPS = 32  # of one program
LANES = 128  # wanted, unless others are used better


@cache
def groups_of_a_program(num_groups: int, per_group: int) -> int:
    """Chooses how many whole groups a program takes: rows that start on 16 bytes, then few idle lanes."""

    def merit(groups: int) -> tuple[bool, float, int]:
        lanes = triton.next_power_of_2(groups * per_group)
        used = num_groups * per_group / (triton.cdiv(num_groups, groups) * lanes)
        return groups * per_group % 8 == 0 or groups == num_groups, round(used, 2), -abs(lanes - LANES)

    most = max(2 * LANES, triton.next_power_of_2(per_group))
    fitting = (n for n in range(1, min(num_groups, MAX_GROUPS) + 1) if n == 1 or n * per_group <= most)
    return max(fitting, key=merit)


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


def _tiling(pixels: int, channels: int, channels_per_group: int) -> tuple[Config, dict[str, int], int, int]:
    """Backward: (configuration, block sizes, tiles of one program of the partial sums, programs over the pixels)"""
    config = find_config("group_norm_silu_backward", "tiled")
    block_c = _channel_block(channels)
    block_p = max(config.constants["ELEMENTS"] // block_c, 1)
    tiles = triton.cdiv(pixels, block_p)
    most_chunks = max(MAX_PARTIALS // triton.next_power_of_2(channels_per_group), 1)
    tiles_per_program = triton.cdiv(tiles, most_chunks)
    chunks = triton.cdiv(tiles, tiles_per_program)
    return config, {"BLOCK_P": block_p, "BLOCK_C": block_c}, tiles_per_program, chunks


def _forward_tiling(num_groups: int, per_group: int) -> tuple[Config, dict[str, int], int]:
    """Forward: (configuration, block sizes, programs over the channels)"""
    config = find_config("group_norm_silu_forward", "tiled")
    groups = groups_of_a_program(num_groups, per_group)
    lanes = triton.next_power_of_2(groups * per_group)
    block_p = max(config.constants["ELEMENTS"] // lanes, 1)
    blocks = {"GROUPS": groups, "BLOCK_G": triton.next_power_of_2(groups), "BLOCK_P": block_p, "BLOCK_C": lanes}
    return config, blocks, triton.cdiv(num_groups, groups)


def _pointer(tensor: Tensor | None, instead: Tensor) -> Tensor:
    return instead if tensor is None else tensor.contiguous()


def _vector(added: Tensor | None, instead: Tensor) -> tuple[Tensor, int]:
    """The vector to add with the stride of its images, which may share one."""
    if added is None:
        return instead, 0
    dense = added if added.stride(1) == 1 else added.contiguous()
    return dense, 0 if len(added) == 1 else dense.stride(0)


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
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward pass: one kernel where a group fits on one multiprocessor, two otherwise.

    Args:
        x: float16, bfloat16 or float32 [B, C, H, W]; copied where it is not channels_last, as the residual is.
        weight, bias: float [C].
        num_groups: G, a divisor of C.
        eps: added to the variance.
        scale, shift: float [B, C], or None.
        residual: [B, C, H, W] of x's dtype, or None.
        silu: False leaves the activation out.
        added: float [B, C] of any stride over the images, or None.

    Returns:
        y [B, C, H, W] of x's dtype in channels_last, and per group mean and 1 / standard deviation, float32 [B, G].
    """
    batch, channels, height, width = x.shape
    pixels, per_group = height * width, channels // num_groups
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    mean, rstd = (torch.empty((batch, num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    other = x if residual is None else residual.contiguous(memory_format=torch.channels_last)
    vector, stride = _vector(added, weight)
    affine = (weight.contiguous(), bias.contiguous(), _pointer(scale, weight), _pointer(shift, weight))
    flags: dict[str, Any] = {"CHANNELS_PER_GROUP": per_group, "HAS_ADDED": added is not None}
    finish: dict[str, Any] = {"HAS_SCALE": scale is not None, "HAS_SHIFT": shift is not None, "SILU": silu}
    finish |= {"HAS_RESIDUAL": residual is not None, "INTERPRETED": triton.knobs.runtime.interpret}

    blocks = _whole_blocks(pixels, per_group)
    if blocks is not None:
        config = _whole_config("group_norm_silu_forward", blocks)
        arguments = (x, vector, *affine, other, y, mean, rstd, stride, pixels, channels, eps)
        launch(forward_whole_kernel, (num_groups, batch), *arguments, config=config, **flags, **finish, **blocks)
        return y, mean, rstd

    config, blocks, columns = _forward_tiling(num_groups, per_group)
    tiles = triton.cdiv(triton.cdiv(pixels, blocks["BLOCK_P"]), MAX_CHUNKS)
    chunks = triton.cdiv(pixels, blocks["BLOCK_P"] * tiles)
    partial = torch.empty((batch, 2, chunks, num_groups), dtype=torch.float32, device=x.device)
    launch(
        forward_moments_kernel,
        (chunks, columns, batch),
        *(x, x, x, vector, partial, channels, stride, pixels, channels, num_groups),
        config=config,
        SOURCE=0,
        TILES=tiles,
        **flags,
        **blocks,
    )
    launch(
        forward_apply_kernel,
        (triton.cdiv(pixels, blocks["BLOCK_P"]), columns, batch),
        *(x, vector, *affine, other, partial, y, mean, rstd, stride, pixels, channels, num_groups, chunks, eps),
        config=config,
        ROWS=tiles * blocks["BLOCK_P"],
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        **flags,
        **finish,
        **blocks,
    )
    return y, mean, rstd


def gather_moments(
    x: Tensor, other: Tensor, join: bool, num_groups: int, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launches x + other + added, or [x, other] + added, and the moments of the result, one kernel.

    Args:
        x: float16, bfloat16 or float32 [B, C, H, W]; copied where it is not channels_last, as the other is.
        other: of x's dtype, [B, C, H, W], or [B, D, H, W] to join.
        join: put the channels beside each other.
        num_groups: G, a divisor of the result's channels.
        added: float [B, C] (joined, [B, C + D]) of any stride over the images, or None.

    Returns:
        the result in channels_last, of x's dtype, and its moments, float32 [B, 2, chunks, G]: see `moments.CHUNK`.
    """
    batch, first, height, width = x.shape
    channels = first + other.shape[1] if join else first
    x, other = (each.contiguous(memory_format=torch.channels_last) for each in (x, other))
    shape = (batch, channels, height, width)
    gathered = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    chunks = count_chunks(height * width)
    partial = torch.empty((batch, 2, chunks, num_groups), dtype=torch.float32, device=x.device)
    if gathered.numel() == 0:
        return gathered, partial.zero_()
    vector, stride = _vector(added, x)
    config, blocks, columns = _forward_tiling(num_groups, channels // num_groups)
    blocks["BLOCK_P"] = min(blocks["BLOCK_P"], CHUNK)
    launch(
        forward_moments_kernel,
        (chunks, columns, batch),
        *(x, other, gathered, vector, partial, first, stride, height * width, channels, num_groups),
        config=config,
        CHANNELS_PER_GROUP=channels // num_groups,
        HAS_ADDED=added is not None,
        SOURCE=2 if join else 1,
        TILES=CHUNK // blocks["BLOCK_P"],
        **blocks,
    )
    return gathered, partial


def normalise(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Launches group normalisation of features whose moments are known, one kernel.

    Args:
        x: float16, bfloat16 or float32 [B, C, H, W]; copied where it is not channels_last.
        moments: float32 [B, 2, chunks, G].
        weight, bias: float [C].
        eps: added to the variance.
        silu: False leaves the activation out.

    Returns:
        [B, C, H, W] of x's dtype in channels_last.
    """
    batch, channels, height, width = x.shape
    _, _, chunks, num_groups = moments.shape
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    statistics = torch.empty((2, batch, num_groups), dtype=torch.float32, device=x.device)
    config, blocks, columns = _forward_tiling(num_groups, channels // num_groups)
    vectors = (weight, weight.contiguous(), bias.contiguous(), weight, weight)
    sizes = (0, height * width, channels, num_groups, chunks, eps)
    launch(
        forward_apply_kernel,
        (triton.cdiv(height * width, blocks["BLOCK_P"]), columns, batch),
        *(x, *vectors, x, moments.contiguous(), y, *statistics, *sizes),
        config=config,
        CHANNELS_PER_GROUP=channels // num_groups,
        HAS_ADDED=False,
        HAS_SCALE=False,
        HAS_SHIFT=False,
        HAS_RESIDUAL=False,
        SILU=silu,
        INTERPRETED=triton.knobs.runtime.interpret,
        ROWS=CHUNK,
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        **blocks,
    )
    return y


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
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward pass: two kernels where a group fits on one multiprocessor, four otherwise.

    Args:
        grad_y: float [B, C, H, W].
        x, weight, bias, scale, shift, silu, added: as in `group_norm_silu_forward`.
        mean, rstd: float32 [B, G], what that returned.

    Returns:
        the gradients of x [B, C, H, W] (x's dtype, channels_last; its sum over pixels is that of the added vector), and
        float32 of weight and bias [C], scale and shift [B, C].
    """
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
    vector, stride = _vector(added, weight)
    scaled = {"HAS_SCALE": scale is not None, "HAS_SHIFT": shift is not None, "CHANNELS_PER_GROUP": per_group}
    flags = scaled | {"HAS_ADDED": added is not None, "SILU": silu}

    blocks = _whole_blocks(pixels, per_group)
    if blocks is not None:
        config = _whole_config("group_norm_silu_backward", blocks)
        arguments = (grad_y, x, vector, *affine, mean, rstd, sums, grad_x, stride, pixels, channels)
        launch(backward_whole_kernel, (num_groups, batch), *arguments, config=config, **flags, **blocks)
    else:
        config, blocks, tiles, chunks = _tiling(pixels, channels, per_group)
        partial = torch.empty((batch, 2, chunks, channels), **like)
        means = torch.empty((batch, 2, num_groups), **like)
        columns = triton.cdiv(channels, blocks["BLOCK_C"])
        launch(
            backward_partial_kernel,
            (chunks, columns, batch),
            *(grad_y, x, vector, *affine, mean, rstd, partial, stride, pixels, channels),
            config=config,
            TILES=tiles,
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
            **scaled,
        )
        launch(
            backward_apply_kernel,
            (triton.cdiv(pixels, blocks["BLOCK_P"]), columns, batch),
            *(grad_y, x, vector, *affine, mean, rstd, means, grad_x, stride, pixels, channels),
            config=config,
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
