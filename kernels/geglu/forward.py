"""Triton: value * gelu(gate)."""

import triton
import triton.language as tl


@triton.jit
def geglu_kernel(
    x_ptr,  # [N, 2 C]
    y_ptr,  # [N, C]
    channels,
    BLOCK: tl.constexpr,
):
    """Computes one block of channels of one row; gelu(x) = x (1 + erf(x / sqrt(2))) / 2."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    x_ptr += row * 2 * channels
    value = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + channels + channel, mask=inside, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(y_ptr + row * channels + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
