"""Triton: a 3x3 convolution as a product over windows that are never written, with what follows on the tile."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.linear.forward import leave_moments, outputs_of_tile, sum_splits


@triton.jit
def convolution_kernel(
    x_ptr,  # [B, h, w, C]
    weight_ptr,  # [N, 3, 3, C]
    bias_ptr,  # [N]
    added_ptr,  # [B, N]
    residual_ptr,  # [B, h', w', N]
    scale_ptr,  # [B]
    weight_scale_ptr,  # [N]
    out_ptr,  # [B, h', w', N]
    moments_ptr,  # [B, 2, chunks, N / CHANNELS_OUT]
    parts_ptr,  # see `sum_splits`
    arrived_ptr,
    added_stride,
    height,
    width,
    channels,  # C
    out_width,
    pixels,  # h' w'
    outputs,  # N
    HAS_BIAS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,  # e4m3 operands
    STRIDE: tl.constexpr,
    REPEATS: tl.constexpr,  # of each row and column of x
    CHANNELS_OUT: tl.constexpr,  # of a group of the result
    GROUPS_OUT: tl.constexpr,  # of a program; 0 where no moments are wanted
    BLOCK_G: tl.constexpr,
    SPLITS: tl.constexpr,  # of the inner dimension
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one tile of an image's pixels and the outputs, or its share of the product."""
    image = tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0) // SPLITS
    block = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = local < pixels
    output, in_outputs = outputs_of_tile(outputs, CHANNELS_OUT, GROUPS_OUT, BLOCK_N)

    top = local // out_width * STRIDE - 1
    left = local % out_width * STRIDE - 1
    x_ptr += image * height * width * channels
    weight_row = weight_ptr + output.to(tl.int64) * (9 * channels)
    steps = tl.cdiv(channels, BLOCK_K)  # of one cell of the window
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(9 * steps * split // SPLITS, 9 * steps * (split + 1) // SPLITS):
        cell = step // steps
        column = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        exists = column < channels
        down = top + cell // 3
        across = left + cell % 3
        inside = in_rows & (down >= 0) & (down < height * REPEATS) & (across >= 0) & (across < width * REPEATS)
        source = (down // REPEATS * width + across // REPEATS).to(tl.int64) * channels
        x = tl.load(x_ptr + source[:, None] + column[None, :], mask=inside[:, None] & exists[None, :], other=0.0)
        places = weight_row[:, None] + (cell * channels + column)[None, :]
        weight = tl.load(places, mask=in_outputs[:, None] & exists[None, :], other=0.0)
        if SCALED:  # on sm_90 sums inside an e4m3 product keep fewer bits than float32: blocks are added in registers
            acc += tl.dot(x, tl.trans(weight))
        else:
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")

    if SPLITS > 1:
        tile = (image * tl.num_programs(1) + tl.program_id(1)) * blocks + block
        acc, _, is_last = sum_splits(*(acc, acc, parts_ptr, arrived_ptr, tile, split), SPLITS, False, BLOCK_M, BLOCK_N)
        if not is_last:
            return

    if SCALED:
        scale = tl.load(scale_ptr + image) * tl.load(weight_scale_ptr + output, mask=in_outputs, other=0.0)
        acc *= scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + output, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    if HAS_ADDED:
        vector = tl.load(added_ptr + image * added_stride + output, mask=in_outputs, other=0.0)
        acc += vector.to(tl.float32)[None, :]
    inside = in_rows[:, None] & in_outputs[None, :]
    places = (image * pixels + local)[:, None] * outputs + output[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
    stored = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, stored, mask=inside)

    leave_moments(
        *(moments_ptr, stored, inside, image, block, blocks, pixels, outputs),
        *(CHANNELS_OUT, GROUPS_OUT, BLOCK_G, BLOCK_M, BLOCK_N),
    )
