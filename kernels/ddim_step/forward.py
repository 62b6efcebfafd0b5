"""Triton: one program per block of latent cells of one image; the coefficients are read on the device."""

import triton
import triton.language as tl


@triton.jit
def ddim_step_kernel(
    output_ptr,  # [B, C, P], any strides
    noisy_ptr,  # [B, C, P] float32
    image_ptr,  # [B, Ci, P], any strides
    step_ptr,  # one integer
    table_ptr,  # [N, 4] float32
    prev_ptr,  # [B, C, P] float32
    x0_ptr,  # [B, C, P] float32
    next_ptr,  # [B, P, C + Ci (+ C)]
    cells,  # P
    steps,  # N
    output_batch,
    output_channel,
    output_cell,
    image_batch,
    image_channel,
    image_cell,
    PREDICTION: tl.constexpr,  # 0 epsilon, 1 sample, 2 velocity
    SELF_CONDITION: tl.constexpr,
    CHANNELS: tl.constexpr,  # C
    CHANNELS_PADDED: tl.constexpr,
    IMAGE_CHANNELS: tl.constexpr,  # Ci
    IMAGE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes one block of cells of one image (Song et al., arXiv 2010.02502, equation 12 with sigma = 0)."""
    batch = tl.program_id(1).to(tl.int64)
    cell = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    channel = tl.arange(0, CHANNELS_PADDED)
    inside = (cell < cells)[:, None] & (channel < CHANNELS)[None, :]
    latent = (batch * CHANNELS + channel[None, :]) * cells + cell[:, None]  # [BLOCK, C]

    step = tl.load(step_ptr).to(tl.int64)
    step = tl.minimum(tl.maximum(step, 0), steps - 1)
    sqrt_alpha = tl.load(table_ptr + step * 4)
    sqrt_one_minus_alpha = tl.load(table_ptr + step * 4 + 1)
    sqrt_prev = tl.load(table_ptr + step * 4 + 2)
    sqrt_one_minus_prev = tl.load(table_ptr + step * 4 + 3)

    output_offset = batch * output_batch + channel[None, :] * output_channel + cell[:, None] * output_cell
    output = tl.load(output_ptr + output_offset, mask=inside, other=0.0).to(tl.float32)
    noisy = tl.load(noisy_ptr + latent, mask=inside, other=0.0)
    if PREDICTION == 0:
        epsilon = output
        x0 = (noisy - sqrt_one_minus_alpha * epsilon) / sqrt_alpha
    elif PREDICTION == 1:
        x0 = output
        epsilon = (noisy - sqrt_alpha * x0) / sqrt_one_minus_alpha
    else:
        x0 = sqrt_alpha * noisy - sqrt_one_minus_alpha * output
        epsilon = sqrt_alpha * output + sqrt_one_minus_alpha * noisy
    prev = sqrt_prev * x0 + sqrt_one_minus_prev * epsilon
    tl.store(prev_ptr + latent, prev, mask=inside)
    tl.store(x0_ptr + latent, x0, mask=inside)

    NEXT: tl.constexpr = CHANNELS * (2 if SELF_CONDITION else 1) + IMAGE_CHANNELS
    dtype = next_ptr.dtype.element_ty
    row = next_ptr + (batch * cells + cell[:, None]) * NEXT
    tl.store(row + channel[None, :], prev.to(dtype), mask=inside)
    if SELF_CONDITION:
        tl.store(row + CHANNELS + IMAGE_CHANNELS + channel[None, :], x0.to(dtype), mask=inside)
    channel = tl.arange(0, IMAGE_PADDED)
    inside = (cell < cells)[:, None] & (channel < IMAGE_CHANNELS)[None, :]
    image_offset = batch * image_batch + channel[None, :] * image_channel + cell[:, None] * image_cell
    image = tl.load(image_ptr + image_offset, mask=inside, other=0.0)
    tl.store(row + CHANNELS + channel[None, :], image.to(tl.float32).to(dtype), mask=inside)
