"""Samples by DDIM over a `denoise` callable with fused steps, and draws the noise that belongs to an image.

Source: Song et al., "Denoising diffusion implicit models", ICLR 2021, arXiv 2010.02502. `solvers` has other solvers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.kernels.ddim_step import ddim_step, make_ddim_table

Denoise = Callable[[Tensor, Tensor], Tensor]  # (unet_input [B, C_in, h, w], timesteps [B]) -> model_output [B, C, h, w]
Callback = Callable[[int, int, Tensor, Tensor], None]  # (step, timestep, noisy_latents, pred_original_sample)


def seed_of(*parts: int | str) -> int:
    """Hashes all parts into a 63-bit seed, the same on every machine."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def image_noise(seed: int, image_ids: Sequence[int | str], shape: Sequence[int], deviation: float = 1.0) -> Tensor:
    """Draws normal noise of mean 0, float32 [B, *shape] on the CPU.

    Each image's noise comes from (seed, its id), whatever its batch. Where sampling starts its standard deviation is
    `scheduler.init_noise_sigma`.
    """
    if len(image_ids) == 0 or deviation == 0:
        return torch.zeros(len(image_ids), *shape)
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(seed, i))) for i in image_ids]
    return torch.stack(rows) * deviation


def unet_input(noisy_latents: Tensor, image_latents: Tensor, condition: Tensor | None) -> Tensor:
    """Joins noisy mask latents, image latents (and the self-condition) along the channels: [B, C_in, h, w].

    All are float [B, ..., h, w]; the result has the dtype of `image_latents`, which is the network's.
    """
    parts = [noisy_latents, image_latents] + ([] if condition is None else [condition])
    return torch.cat([part.to(image_latents.dtype) for part in parts], dim=1)


@torch.no_grad()
def ddim(
    denoise: Denoise,
    noise: Tensor,
    image_latents: Tensor,
    scheduler: Scheduler,
    num_inference_steps: int,
    self_condition: bool = True,
    callback: Callback | None = None,
    timesteps: Sequence[int] | str | None = None,
) -> Tensor:
    """Samples by DDIM with eta 0 (Song et al. 2021, equation 12); the condition is the last step's estimate of x_0.

    Args:
        denoise: the network; takes its whole input and the timesteps.
        noise: x_T, float [B, C, h, w].
        image_latents: float [B, C_image, h, w]; their dtype is the network's.
        scheduler: alphas, timesteps and prediction type.
        num_inference_steps: 1 to the schedule's length; with a list of `timesteps` that list decides.
        self_condition: whether the network's input ends in C condition channels; they start at zero.
        callback: called after each step with (step, timestep, noisy_latents, pred_original_sample).
        timesteps: where the network is evaluated; see `Scheduler.timesteps`.

    Returns:
        The last step's estimate of x_0, float32 [B, C, h, w]: scaled mask latents.

    Raises:
        ArgumentError: what `Scheduler.timesteps` refuses.
    """
    times, previous = scheduler.timesteps(num_inference_steps, timesteps)
    table = make_ddim_table(scheduler.alphas_cumprod, torch.tensor(times), torch.tensor(previous)).to(noise.device)
    time_table = torch.tensor(times, device=noise.device)
    prediction_type = scheduler.config.prediction_type
    steps = ddim_steps(denoise, noise, image_latents, time_table, table, prediction_type, self_condition)
    latents = noise
    for step, (time, (latents, estimate)) in enumerate(zip(times, steps)):
        if callback is not None:
            callback(step, time, latents, estimate)
    return latents


def ddim_steps(
    denoise: Denoise,
    noise: Tensor,
    image_latents: Tensor,
    time_table: Tensor,
    table: Tensor,
    prediction_type: str,
    self_condition: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the latents and the estimate of x_0 after each step, float32 [B, C, h, w].

    A step makes the network's next input in its own pass. Nothing waits for the device, and nothing is copied to it.

    Args:
        denoise: takes the network's input and a row of `time_table` for each image.
        noise, image_latents, self_condition: see `ddim`.
        time_table: [N, ...] on the device, what `denoise` takes of each step's time.
        table: float32 [N, 4] on the device, from `make_ddim_table`.
        prediction_type: what the network's output is.
    """
    latents = noise.float()
    condition = torch.zeros_like(latents) if self_condition else None
    network_input = unet_input(latents, image_latents, condition)
    step_indices = torch.arange(len(time_table), device=noise.device)
    for step, time in enumerate(time_table):
        model_output = denoise(network_input, time.expand(noise.shape[0], *time.shape))
        latents, estimate, network_input = ddim_step(
            model_output,
            latents,
            image_latents,
            step_indices[step],
            table,
            prediction_type,
            self_condition,
            image_latents.dtype,
        )
        yield latents, estimate
