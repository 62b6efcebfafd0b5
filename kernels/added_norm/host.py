"""Launches normalisation with a vector added first, for inference.

Tensors of group normalisation (Wu and He, arXiv 1803.08494) are channels_last: x is [B, P, C] with P = H W pixels. A
group that fits on one multiprocessor takes one launch. A larger one takes two: mean and squares of each chunk of
pixels, and the normalisation, whose programs merge the chunks themselves. Both walk over whole groups, as many as make
rows of 16-byte accesses: 12 groups of 10 channels, say, in 128 lanes.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.added_norm.group import group_apply_kernel, group_moments_kernel, group_whole_kernel
from ldmseg_fast.kernels.added_norm.layer import layer_kernel
from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import launch

MAX_WHOLE = 16384  # elements of a group, padded, that one program holds in registers
MAX_CHUNKS = 128  # that one program merges
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


def added_group_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """Launches group normalisation: one kernel where a group fits on one multiprocessor, two otherwise.

    Args:
        x: float16, bfloat16 or float32 [B, C, H, W]; copied where it is not channels_last.
        added: float [B, C] of any stride over the images, or None.
        weight, bias: float [C].
        num_groups: G, a divisor of C.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        [B, C, H, W] of x's dtype in channels_last.
    """
    batch, channels, height, width = x.shape
    pixels, per_group = height * width, channels // num_groups
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    vector = weight if added is None else added if added.stride(1) == 1 else added.contiguous()
    stride = 0 if added is None or batch == 1 else vector.stride(0)
    affine = weight.contiguous(), bias.contiguous()
    flags = {"CHANNELS_PER_GROUP": per_group, "HAS_ADDED": added is not None}
    finish = {"SILU": silu, "INTERPRETED": triton.knobs.runtime.interpret}

    blocks = {"BLOCK_P": triton.next_power_of_2(pixels), "BLOCK_C": triton.next_power_of_2(per_group)}
    elements = blocks["BLOCK_P"] * blocks["BLOCK_C"]
    if elements <= MAX_WHOLE:
        config = find_config("added_group_norm", "large" if elements > 4096 else "small")
        arguments = (x, vector, *affine, y, stride, pixels, channels, eps)
        launch(group_whole_kernel, (num_groups, batch), *arguments, config=config, **flags, **finish, **blocks)
        return y

    config = find_config("added_group_norm", "tiled")
    groups = groups_of_a_program(num_groups, per_group)
    lanes = triton.next_power_of_2(groups * per_group)
    block_p = max(config.constants["ELEMENTS"] // lanes, 1)
    tiles = triton.cdiv(triton.cdiv(pixels, block_p), MAX_CHUNKS)
    chunks = triton.cdiv(pixels, block_p * tiles)
    columns = triton.cdiv(num_groups, groups)
    blocks = {"GROUPS": groups, "TILES": tiles, "BLOCK_G": triton.next_power_of_2(groups)}
    blocks |= {"BLOCK_P": block_p, "BLOCK_C": lanes}
    partial = torch.empty((batch, 2, chunks, num_groups), dtype=torch.float32, device=x.device)
    launch(
        group_moments_kernel,
        (chunks, columns, batch),
        *(x, vector, partial, stride, pixels, channels, num_groups),
        config=config,
        **flags,
        **blocks,
    )
    launch(
        group_apply_kernel,
        (triton.cdiv(pixels, block_p), columns, batch),
        *(x, vector, *affine, partial, y, stride, pixels, channels, num_groups, chunks, eps),
        config=config,
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        **flags,
        **finish,
        **blocks,
    )
    return y


def added_layer_norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Launches layer normalisation (Ba et al., arXiv 1607.06450), a few rows a program.

    Args:
        x: float16, bfloat16 or float32 [..., C].
        added, weight, bias: float [C], the first or None.
        eps: added to the variance.

    Returns:
        [..., C] of x's dtype, contiguous.
    """
    x = x.contiguous()
    y, channels = torch.empty_like(x), x.shape[-1]
    if y.numel() == 0:
        return y
    config = find_config("added_layer_norm", "all")
    block_c, rows = triton.next_power_of_2(channels), x.numel() // channels
    block_n = max(config.constants["ELEMENTS"] // block_c, 1)
    vectors = ((weight if added is None else added).contiguous(), weight.contiguous(), bias.contiguous())
    launch(
        layer_kernel,
        (triton.cdiv(rows, block_n),),
        *(x, *vectors, y, rows, channels, eps),
        config=config,
        HAS_ADDED=added is not None,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
    )
    return y
