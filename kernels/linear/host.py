"""Launches a linear layer with what comes before and after it in a transformer, for inference.

Each program normalises the rows that it reads: it computes the moments of its rows itself, or merges those of groups of
channels, which the kernel before has left (Ba et al., arXiv 1607.06450; Wu and He, arXiv 1803.08494). Where tiles are
too few for the GPU, several programs can share a tile's inner dimension: the last of them adds their parts up.
"""

import math

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import Config, find_config
from ldmseg_fast.kernels.group_norm_silu.host import groups_of_a_program
from ldmseg_fast.kernels.group_norm_silu.reference import CHUNK, count_chunks
from ldmseg_fast.kernels.launch import launch
from ldmseg_fast.kernels.linear.forward import linear_kernel

FEW_TILES = 132  # of 64 x 64: at most one for each SM of an H100


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    eps: float = 0.0,
    moments: Tensor | None = None,
    beside: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    num_groups: int = 0,
) -> tuple[Tensor, Tensor]:
    """Launches the layer, one kernel and a fill where it splits; arguments have passed `op.check`.

    Args:
        x: float16, bfloat16 or float32 [B, P, K].
        weight: of x's dtype [N, K + L], gated [2 N, K + L].
        bias: float [N], gated [2 N], or None.
        gain, offset: float [K] of a normalisation of x, or None.
        eps: added to the variance.
        moments: float32 [B, 2, chunks, G] of x, whose groups of columns are then normalised; None: each row is.
        beside: of x's dtype [B, P, L], columns that stand behind x's and are not normalised, or None.
        residual: of x's dtype [B, P, N], or None.
        gated: value * gelu(gate), where the weight's first half makes the value.
        num_groups: of the result, whose moments are wanted; 0: none.

    Returns:
        [B, P, N] of x's dtype, contiguous, and moments, float32 [B, 2, chunks, num_groups], or an empty tensor.
    """
    batch, pixels, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    chunks = count_chunks(pixels)
    out = torch.empty((batch, pixels, outputs), dtype=x.dtype, device=x.device)
    wanted = (batch, 2, chunks, num_groups) if num_groups else (0,)
    made = torch.empty(wanted, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, made.zero_()
    few = batch * triton.cdiv(pixels, 64) * triton.cdiv(outputs, 64) <= FEW_TILES
    tables = "_few" if few else ""
    groups = moments.shape[3] if moments is not None else 1
    if num_groups:
        config = find_config(f"linear_moments{tables}", "all")
    else:
        config = find_config(f"linear{tables}", "gated" if gated else "plain" if gain is None else "normalised")
    rows, columns, blocks = tile_of(config, outputs, num_groups)
    tiles = (triton.cdiv(pixels, rows), triton.cdiv(outputs, columns), batch)
    splits = config.constants["SPLITS"]
    parts, arrived = split_buffers(splits, tiles, (2 if gated else 1, rows, blocks.get("BLOCK_N", columns)), made)
    launch(
        linear_kernel,
        (tiles[0] * splits, *tiles[1:]),
        *(x.contiguous(), *_pointers(x, beside), weight.contiguous(), *_pointers(weight, bias, gain, offset)),
        *(*_pointers(x, moments, residual), out, made, parts, arrived),
        *(pixels, inputs, 0 if beside is None else beside.shape[2], outputs, groups, chunks, eps),
        config=config,
        NORM=0 if gain is None else 1 if moments is None else 2,
        HAS_BESIDE=beside is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        CHANNELS_IN=inputs // groups,
        GROUPS_IN=triton.next_power_of_2(groups),
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        ROWS=CHUNK,
        **blocks,
    )
    return out, made


def tile_of(config: Config, outputs: int, num_groups: int) -> tuple[int, int, dict[str, int]]:
    """Returns a tile's rows, its outputs, and the constants of the moments that it leaves.

    Where moments are wanted, its rows are one chunk of them, and its outputs whole groups.
    """
    if not num_groups:
        constants = {"CHANNELS_OUT": 1, "GROUPS_OUT": 0, "BLOCK_G": 1}
        return config.constants["BLOCK_M"], config.constants["BLOCK_N"], constants
    of_a_group = outputs // num_groups
    groups = groups_of_a_program(num_groups, of_a_group)
    columns = groups * of_a_group
    constants = {"CHANNELS_OUT": of_a_group, "GROUPS_OUT": groups, "BLOCK_G": triton.next_power_of_2(groups)}
    return CHUNK, columns, constants | {"BLOCK_M": CHUNK, "BLOCK_N": max(triton.next_power_of_2(columns), 16)}


def split_buffers(splits: int, tiles: tuple[int, ...], shape: tuple[int, ...], unused: Tensor) -> tuple[Tensor, Tensor]:
    """Makes what programs that share a tile need, on the device of `unused`, which stands for both where none do.

    Returns:
        float32 [tiles, splits, *shape] for their parts, and int32 [tiles] zeros, in which they are counted.
    """
    if splits == 1:
        return unused, unused
    parts = torch.empty((math.prod(tiles), splits, *shape), dtype=torch.float32, device=unused.device)
    return parts, torch.zeros(math.prod(tiles), dtype=torch.int32, device=unused.device)


def _pointers(instead: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    return [instead if tensor is None else tensor.contiguous() for tensor in tensors]
