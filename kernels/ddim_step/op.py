"""Runs Triton on CUDA and the reference elsewhere; safe inside a CUDA graph.

The step is DDIM's (Song et al., arXiv 2010.02502, equation 12 with eta 0).
"""

from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import (
    exporting,
    in_format,
    require,
    require_floats,
    require_same_device,
    runs_reference,
)
from ldmseg_fast.kernels.ddim_step import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def make_ddim_table(alphas_cumprod: Tensor, timesteps: Tensor, prev_timesteps: Tensor) -> Tensor:
    """Tabulates the coefficients of a whole loop for `ddim_step`, one row a step.

    Args:
        alphas_cumprod: [T] float.
        timesteps, prev_timesteps: [N] int32 or int64 in loop order. A negative previous time step marks the last step:
            its row is (.., .., 1, 0), so the "previous sample" is x0 itself.

    Returns:
        float32 [N, 4]: sqrt(a_t), sqrt(1 - a_t), sqrt(a_prev), sqrt(1 - a_prev), on the device of `alphas_cumprod`.

    Raises:
        ValueError: lengths differ, another dtype, or a time step is outside `alphas_cumprod`.
    """
    require(alphas_cumprod.ndim == 1, "alphas_cumprod: expected [T], got shape {}", alphas_cumprod.shape)
    require(timesteps.ndim == 1 and timesteps.numel() > 0, "timesteps: expected [N], got shape {}", timesteps.shape)
    require(
        prev_timesteps.shape == timesteps.shape,
        "prev_timesteps: shape {} differs from that of timesteps, {}",
        prev_timesteps.shape,
        timesteps.shape,
    )
    require_floats(alphas_cumprod=alphas_cumprod)
    for name, steps in (("timesteps", timesteps), ("prev_timesteps", prev_timesteps)):
        require(steps.dtype in (torch.int32, torch.int64), "{}: expected int32 or int64, got {}", name, steps.dtype)
    last = alphas_cumprod.numel() - 1
    low, high = int(timesteps.min()), int(torch.maximum(timesteps.max(), prev_timesteps.max()))
    require(low >= 0 and high <= last, "timesteps: expected 0 to {}, got {} to {}", last, low, high)
    timesteps, prev_timesteps = (steps.to(alphas_cumprod.device) for steps in (timesteps, prev_timesteps))
    alpha = alphas_cumprod.double()[timesteps]
    alpha_prev = alphas_cumprod.double()[prev_timesteps.clamp(min=0)].masked_fill(prev_timesteps < 0, 1.0)
    return torch.stack([alpha.sqrt(), (1 - alpha).sqrt(), alpha_prev.sqrt(), (1 - alpha_prev).sqrt()], 1).float()


def ddim_step(
    model_output: Tensor,
    noisy_latents: Tensor,
    image_latents: Tensor,
    step_index: Tensor,
    table: Tensor,
    prediction_type: str = "epsilon",
    self_condition: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes a DDIM step with eta 0 (Song et al., arXiv 2010.02502, equation 12) and the UNet's next input.

    Args:
        model_output: [B, C, h, w] float, what the UNet returned; either memory format.
        noisy_latents: float32 [B, C, h, w].
        image_latents: [B, Ci, h, w] float.
        step_index: one integer on the device, int32 or int64: the row of `table`. On a GPU it is read there, so that a
            CUDA graph of the loop can be replayed and nothing waits; a value outside the table is clamped. A CPU's is
            checked; a compiled graph clamps it.
        table: float32 [N, 4] from `make_ddim_table`.
        prediction_type: what `model_output` is: "epsilon", "sample" or "v_prediction".
        self_condition: append the estimate of x0 to the next input.
        dtype: of the next input.

    Returns:
        prev_latents float32 [B, C, h, w], pred_original_sample float32 [B, C, h, w], and
        next_unet_input `dtype` [B, C + Ci (+ C), h, w] in channels_last: previous sample, image, (x0).

    Raises:
        ValueError: wrong shape, dtype or device, unknown prediction type, a CPU's step outside the table.
    """
    args = (model_output, noisy_latents, image_latents, step_index, table, prediction_type, self_condition, dtype)
    needs_grad = torch.is_grad_enabled() and (model_output.requires_grad or noisy_latents.requires_grad)
    if runs_reference("ddim_step", model_output) or needs_grad:
        check(*args)
        if not (exporting() or torch.compiler.is_compiling()):
            _check_step(step_index, table)
        return reference.ddim_step(*args)
    return ddim_step_op(*args)


def _check_step(step_index: Tensor, table: Tensor) -> None:
    """Refuses a step outside the table where looking at it costs no wait for a GPU."""
    if step_index.device.type == "cpu":
        step, last = int(step_index), table.shape[0] - 1
        require(0 <= step <= last, "step_index: expected 0 to {}, got {}", last, step)


def check(
    model_output: Tensor,
    noisy_latents: Tensor,
    image_latents: Tensor,
    step_index: Tensor,
    table: Tensor,
    prediction_type: str,
    self_condition: bool,
    dtype: torch.dtype,
) -> None:
    """Refuses what the op does not take: latents are float [B, C, h, w], arguments as in `ddim_step`.

    Raises:
        ValueError: wrong shape, dtype or device, unknown prediction type; the message starts with the argument's name.
    """
    require(model_output.ndim == 4, "model_output: expected [B, C, h, w], got shape {}", model_output.shape)
    require(model_output.dtype in FLOATS, "model_output: expected a float tensor, got {}", model_output.dtype)
    require(
        noisy_latents.shape == model_output.shape,
        "noisy_latents: shape {} differs from model_output's {}",
        noisy_latents.shape,
        model_output.shape,
    )
    require(noisy_latents.dtype == torch.float32, "noisy_latents: expected float32, got {}", noisy_latents.dtype)
    require(
        image_latents.ndim == 4
        and image_latents.shape[0] == model_output.shape[0]
        and image_latents.shape[2:] == model_output.shape[2:],
        "image_latents: shape {} does not fit model_output's {}",
        image_latents.shape,
        model_output.shape,
    )
    require(image_latents.dtype in FLOATS, "image_latents: expected a float tensor, got {}", image_latents.dtype)
    require(step_index.numel() == 1, "step_index: expected one integer, got shape {}", step_index.shape)
    require(step_index.dtype in (torch.int32, torch.int64), "step_index: expected an integer, got {}", step_index.dtype)
    require(table.ndim == 2 and table.shape[1] == 4, "table: expected [N, 4], got shape {}", table.shape)
    require(table.shape[0] > 0 and table.dtype == torch.float32, "table: expected float32 rows, got {}", table.dtype)
    require(
        prediction_type in PREDICTION_TYPES,
        "prediction_type: {!r} is not one of {}",
        prediction_type,
        PREDICTION_TYPES,
    )
    require(dtype in FLOATS, "dtype: expected float16, bfloat16 or float32, got {}", dtype)
    require_same_device(
        model_output, noisy_latents=noisy_latents, image_latents=image_latents, step_index=step_index, table=table
    )


@torch.library.custom_op("ldmseg_fast::ddim_step", mutates_args=())
def ddim_step_op(
    model_output: Tensor,
    noisy_latents: Tensor,
    image_latents: Tensor,
    step_index: Tensor,
    table: Tensor,
    prediction_type: str,
    self_condition: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `ddim_step` on float [B, C, h, w], with its arguments and results; without gradient.

    Raises:
        ValueError: see `ddim_step`.
    """
    args = (model_output, noisy_latents, image_latents, step_index, table, prediction_type, self_condition, dtype)
    check(*args)
    _check_step(step_index, table)
    prev, x0, next_unet_input = reference.ddim_step(*args)
    if x0.data_ptr() == model_output.data_ptr():  # an op may not return its argument
        x0 = x0.clone()
    return prev.contiguous(), x0.contiguous(), in_format(next_unet_input, torch.channels_last)


@ddim_step_op.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ldmseg_fast.kernels.ddim_step import host  # Triton is imported on CUDA only

    check(*args)
    return host.ddim_step(*args)


@ddim_step_op.register_fake
def _(
    model_output: Tensor,
    noisy_latents: Tensor,
    image_latents: Tensor,
    step_index: Tensor,
    table: Tensor,
    prediction_type: str,
    self_condition: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    check(model_output, noisy_latents, image_latents, step_index, table, prediction_type, self_condition, dtype)
    batch, channels, height, width = model_output.shape
    next_channels = channels * (2 if self_condition else 1) + image_latents.shape[1]
    next_unet_input = torch.empty(
        (batch, next_channels, height, width),
        dtype=dtype,
        device=model_output.device,
        memory_format=torch.channels_last,
    )
    return noisy_latents.new_empty(model_output.shape), noisy_latents.new_empty(model_output.shape), next_unet_input
