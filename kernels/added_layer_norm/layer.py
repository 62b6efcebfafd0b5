"""Triton: layer normalisation with a vector added first."""

import triton
import triton.language as tl


@triton.jit
def layer_kernel(
    x_ptr,  # [N, C]
    added_ptr,  # [C]
    weight_ptr,
    bias_ptr,
    y_ptr,  # [N, C]
    rows,
    channels,
    eps,
    HAS_ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalises a few rows, held in registers."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)
    in_row = channel < channels
    inside = (row < rows)[:, None] & in_row[None, :]
    offsets = row[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        x += tl.load(added_ptr + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(x, 1) / channels  # channels beyond the last are zeros
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / channels + eps)
    weight = tl.load(weight_ptr + channel, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=in_row, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
