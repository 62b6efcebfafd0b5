"""Plain torch: what the kernel must equal."""

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import exporting


def ddim_step(
    model_output: Tensor,  # [B, C, h, w]
    noisy_latents: Tensor,  # [B, C, h, w]
    image_latents: Tensor,  # [B, Ci, h, w]
    step_index: Tensor,  # one integer; outside the table it is clamped, as in the kernel
    table: Tensor,  # [N, 4] sqrt(a_t), sqrt(1 - a_t), sqrt(a_prev), sqrt(1 - a_prev)
    prediction_type: str,
    self_condition: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes one step (Song et al., arXiv 2010.02502, equation 12 with sigma = 0); arguments as in `op.ddim_step`.

    Returns:
        prev_latents and pred_original_sample float32 [B, C, h, w], and the next input, `dtype`
        [B, C + Ci (+ C), h, w] in channels_last.
    """
    if not exporting():  # its steps are constants
        step_index = step_index.clamp(0, table.shape[0] - 1)
    row = table.index_select(0, step_index.reshape(1))[0].float()
    sqrt_alpha, sqrt_one_minus_alpha, sqrt_prev, sqrt_one_minus_prev = row.split(1)
    output, noisy = model_output.float(), noisy_latents.float()
    if prediction_type == "epsilon":
        epsilon = output
        x0 = (noisy - sqrt_one_minus_alpha * epsilon) / sqrt_alpha
    elif prediction_type == "sample":
        x0 = output
        epsilon = (noisy - sqrt_alpha * x0) / sqrt_one_minus_alpha
    else:
        x0 = sqrt_alpha * noisy - sqrt_one_minus_alpha * output
        epsilon = sqrt_alpha * output + sqrt_one_minus_alpha * noisy
    prev = sqrt_prev * x0 + sqrt_one_minus_prev * epsilon  # Song et al., equation 12 with sigma = 0
    parts = (prev, image_latents, x0) if self_condition else (prev, image_latents)
    next_unet_input = torch.cat([part.to(dtype) for part in parts], 1)
    return prev, x0, next_unet_input.contiguous(memory_format=torch.channels_last)
