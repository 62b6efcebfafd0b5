"""Starts the step kernel (DDIM: Song et al., arXiv 2010.02502, equation 12)."""

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.ddim_step.forward import ddim_step_kernel
from ldmseg_fast.kernels.launch import launch


def ddim_step(
    model_output: Tensor,
    noisy_latents: Tensor,
    image_latents: Tensor,
    step_index: Tensor,
    table: Tensor,
    prediction_type: str,
    self_condition: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the step; arguments have passed `op.check`.

    Args:
        model_output: float [B, C, h, w], either memory format.
        noisy_latents: float32 [B, C, h, w].
        image_latents: float [B, Ci, h, w].
        step_index: int32 or int64, one number on the device.
        table: float32 [N, 4].
        prediction_type, self_condition, dtype: as in `op.ddim_step`.

    Returns:
        prev_latents and pred_original_sample float32 [B, C, h, w], and the next input, `dtype`
        [B, C + Ci (+ C), h, w] in channels_last.
    """
    batch, channels, height, width = model_output.shape
    image_channels = image_latents.shape[1]
    model_output, image_latents = _flat(model_output), _flat(image_latents)
    prev, x0 = (torch.empty(noisy_latents.shape, dtype=torch.float32, device=table.device) for _ in range(2))
    next_unet_input = torch.empty(
        (batch, channels * (2 if self_condition else 1) + image_channels, height, width),
        dtype=dtype,
        device=table.device,
        memory_format=torch.channels_last,
    )
    config = find_config("ddim_step", "all")
    launch(
        ddim_step_kernel,
        (triton.cdiv(height * width, config.constants["BLOCK"]), batch),
        *(model_output, noisy_latents.contiguous(), image_latents, step_index, table.contiguous()),
        *(prev, x0, next_unet_input, height * width, table.shape[0]),
        *(model_output.stride(0), model_output.stride(1), model_output.stride(3)),
        *(image_latents.stride(0), image_latents.stride(1), image_latents.stride(3)),
        config=config,
        PREDICTION=("epsilon", "sample", "v_prediction").index(prediction_type),
        SELF_CONDITION=self_condition,
        CHANNELS=channels,
        CHANNELS_PADDED=triton.next_power_of_2(channels),
        IMAGE_CHANNELS=image_channels,
        IMAGE_PADDED=triton.next_power_of_2(max(image_channels, 1)),
    )
    return prev, x0, next_unet_input


def _flat(tensor: Tensor) -> Tensor:
    """`tensor` itself where one stride walks over its cells row by row, or a copy."""
    if tensor.stride(2) == tensor.shape[3] * tensor.stride(3):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the stride of a width of 1
