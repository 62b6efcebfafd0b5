"""Launches a 3x3 convolution with what comes before and after it in a UNet, for inference.

It is a product of pixels and weights whose inner dimension is the window's nine cells, one block of channels after the
other (implicit GEMM: Chetlur et al. 2014, arXiv 1410.0759, section 3). Windows are read where they lie; those of an
upsampled map are read from the small one. Where tiles are too few for the GPU, several programs can share a tile.
"""

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.convolution.forward import convolution_kernel
from ldmseg_fast.kernels.convolution.reference import result_shape
from ldmseg_fast.kernels.group_norm_silu.reference import count_chunks
from ldmseg_fast.kernels.launch import launch
from ldmseg_fast.kernels.linear.host import FEW_TILES, split_buffers, tile_of


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    weight_scale: Tensor | None,
    stride: int,
    upsample: bool,
    num_groups: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launches the convolution, one kernel and a fill where it splits; arguments have passed `op.check`.

    Args:
        x: float16, bfloat16, float32 or e4m3 [B, C, h, w]; copied where it is not channels_last, as the others are.
        weight: of x's dtype [N, C, 3, 3].
        bias: float [N], or None.
        added: float [B, N] of any stride over the images, or None.
        residual: of `dtype` [B, N, h', w'], or None.
        scale, weight_scale: float32 [B] and [N] where x is e4m3, otherwise None.
        stride: 1 or 2.
        upsample: doubles height and width of x by repetition first.
        num_groups: of the result, whose moments are wanted; 0: none.
        dtype: of the result, x's own but for e4m3.

    Returns:
        [B, N, h', w'] of `dtype`, channels_last, and moments, float32 [B, 2, chunks, num_groups], or an empty tensor.
    """
    batch, channels, height, width = x.shape
    shape = result_shape(x, weight, stride, upsample)
    outputs, pixels = shape[1], shape[2] * shape[3]
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    wanted = (batch, 2, count_chunks(pixels), num_groups) if num_groups else (0,)
    made = torch.empty(wanted, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, made.zero_()
    few = batch * triton.cdiv(pixels, 64) * triton.cdiv(outputs, 64) <= FEW_TILES
    table = f"convolution{'_moments' if num_groups else ''}{'_few' if few else ''}"
    config = find_config(table, "half" if scale is None else "fp8")
    least = 16 if scale is None else 32  # columns of a product
    block_k = min(config.constants["BLOCK_K"], max(triton.next_power_of_2(channels), least))
    rows, columns, blocks = tile_of(config, outputs, num_groups)
    tiles = (triton.cdiv(pixels, rows), triton.cdiv(outputs, columns), batch)
    splits = config.constants["SPLITS"]
    parts, arrived = split_buffers(splits, tiles, (rows, blocks.get("BLOCK_N", columns)), made)
    vector = x if added is None else added if added.stride(1) == 1 else added.contiguous()
    launch(
        convolution_kernel,
        (tiles[0] * splits, *tiles[1:]),
        *(_in_rows(x), _in_rows(weight), x if bias is None else bias.contiguous(), vector),
        *(out if residual is None else _in_rows(residual), x if scale is None else scale.contiguous()),
        *(x if weight_scale is None else weight_scale.contiguous(), out, made, parts, arrived),
        *(vector.stride(0), height, width, channels, shape[3], pixels, outputs),
        config=config,
        HAS_BIAS=bias is not None,
        HAS_ADDED=added is not None,
        HAS_RESIDUAL=residual is not None,
        SCALED=scale is not None,
        STRIDE=stride,
        REPEATS=2 if upsample else 1,
        BLOCK_K=block_k,
        **blocks,
    )
    return out, made


def _in_rows(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)
