"""Computes the noise schedule: alphas, timesteps, the three predictions, loss weights. Tables are float32.

Source: Ho et al., "Denoising diffusion probabilistic models", 2020, arXiv 2006.11239, and those named beside the lines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldmseg_fast.config import SchedulerConfig
from ldmseg_fast.errors import ArgumentError


def make_betas(config: SchedulerConfig) -> Tensor:
    """Computes beta_t, float32 [num_train_timesteps]."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":  # Ho et al. 2020, section 4
        return torch.linspace(start, end, count, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":  # Rombach et al. 2022: linear in the square root
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if config.beta_schedule == "sigmoid":  # Xu et al. 2022 (GeoDiff)
        return torch.sigmoid(torch.linspace(-6, 6, count)) * (end - start) + start
    if config.beta_schedule == "rectified_flow":
        # (1 - s) x_0 + s e with s = t / T (Liu et al. 2023, arXiv 2209.03003), divided by its deviation
        times = torch.arange(1, count + 1, dtype=torch.float64) / count
        alphas = torch.cat([torch.ones(1, dtype=torch.float64), (1 - times) ** 2 / ((1 - times) ** 2 + times**2)])
        return (1.0 - alphas[1:] / alphas[:-1]).float()

    def alpha_bar(time: float) -> float:  # Nichol & Dhariwal 2021, equation 17
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float32)


def rescale_zero_snr(betas: Tensor) -> Tensor:
    """Rescales betas, float32 [T], so that their last cumulative product is zero (Lin et al. 2024, algorithm 1)."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    squared = roots**2
    alphas = torch.cat([squared[:1], squared[1:] / squared[:-1]])
    return 1.0 - alphas


class Scheduler:
    """Holds the forward process q(x_t | x_0) = N(sqrt(a_t) x_0, 1 - a_t) and what training and sampling need of it.

    Attributes:
        alphas_cumprod: a_t, float32 [T]. Before step 0 it is a_0, not 1.
        loss_weights: w(t), float32 [T].

    Raises:
        ArgumentError: `rescale_zero_snr` with noise as the prediction.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        betas = make_betas(config)
        if config.prediction_type == "epsilon" and (config.rescale_zero_snr or config.beta_schedule == "rectified_flow"):
            raise ArgumentError("scheduler.rescale_zero_snr needs v_prediction: noise is no target at t = T")
        if config.rescale_zero_snr:
            betas = rescale_zero_snr(betas)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self.loss_weights = self._loss_weights()

    def to(self, device: torch.device | str) -> Scheduler:
        """Moves the tables to `device` in place and returns self."""
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        self.loss_weights = self.loss_weights.to(device)
        return self

    def _loss_weights(self) -> Tensor:
        """Computes w(t) of the squared error of what is predicted.

        Modes none, max_clamp_snr, fixed, linear and inverse_log_snr are those of LDMSeg's public training
        configuration (https://github.com/segments-ai/latent-diffusion-segmentation).
        """
        config = self.config
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        if (
            config.loss_weighting == "max_clamp_snr"
        ):  # min-SNR (Hang et al. 2023, section 3.4), one weight of x_0 for all
            per_type = {"epsilon": snr.clamp(min=1e-12), "sample": torch.ones_like(snr), "v_prediction": snr + 1.0}
            return snr.clamp(max=config.max_snr) / per_type[config.prediction_type]
        if config.loss_weighting == "fixed":  # 0.1 in the first quarter, where the noise is small
            quarter = torch.arange(len(snr)) < len(snr) // 4
            return torch.where(quarter, 0.1, snr)
        if config.loss_weighting == "inverse_log_snr":
            weights = torch.log(1.0 / snr.clamp(min=1e-12)).clamp(min=1.0)
            return weights / weights[-1]
        if config.loss_weighting == "inverse_log1p_snr":
            return (1.0 / torch.log1p(snr)).clamp(max=1.0)
        if config.loss_weighting == "velocity":
            # of the velocity e - x_0 of a rectified flow: its error is that of x_0 over s, with s / (1 - s) = snr^-1/2
            share = 1.0 / (1.0 + snr.sqrt())
            per_type = {"sample": share**-2, "v_prediction": ((1 - share) ** 2 + share**2) ** -1}
            return per_type[config.prediction_type].clamp(max=1e4)
        if config.loss_weighting == "linear":
            return torch.arange(1, len(snr) + 1) / len(snr)
        return torch.full_like(snr, config.fixed_weight if config.loss_weighting == "constant" else 1.0)

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, *[1] * (like.ndim - 1))
        return alphas.sqrt(), (1.0 - alphas).sqrt()

    def add_noise(self, mask_latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, equation 4).

        Args:
            mask_latents: x_0, float [B, C, h, w].
            noise: standard normal, float [B, C, h, w].
            timesteps: t, int64 [B].

        Returns:
            float32 [B, C, h, w], also of half-precision inputs.
        """
        signal, sigma = self._coefficients(timesteps, mask_latents)
        return signal * mask_latents + sigma * noise

    def noise_between(self, mask_latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the noise that `add_noise` makes x_t of x_0 with; all float [B, C, h, w], timesteps int64 [B]."""
        signal, sigma = self._coefficients(timesteps, mask_latents)
        return (noisy_latents - signal * mask_latents) / sigma

    def target(self, mask_latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns what the UNet is to predict, float [B, C, h, w]: noise, x_0, or v.

        v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022, appendix D). Arguments as of `add_noise`; noise and
        x_0 are returned themselves.
        """
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return mask_latents
        signal, sigma = self._coefficients(timesteps, mask_latents)
        return signal * noise - sigma * mask_latents

    def pred_original_sample(self, model_output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the estimate of x_0, float [B, C, h, w], that `model_output` stands for.

        It inverts `target`: for noise, x_0 = (x_t - sqrt(1 - a_t) noise) / sqrt(a_t) (Ho et al. 2020, equation 15).

        Args:
            model_output: float [B, C, h, w]; returned itself where x_0 is predicted.
            noisy_latents: x_t, float [B, C, h, w].
            timesteps: t, int64 [B].
        """
        if self.config.prediction_type == "sample":
            return model_output
        signal, sigma = self._coefficients(timesteps, noisy_latents)
        if self.config.prediction_type == "epsilon":
            return (noisy_latents - sigma * model_output) / signal
        return signal * noisy_latents - sigma * model_output

    def timesteps(
        self, num_inference_steps: int, spacing: Sequence[int] | str | None = None
    ) -> tuple[list[int], list[int]]:
        """Lists the timesteps from noise to data, and the one that follows each (negative: the data itself).

        Args:
            num_inference_steps: N.
            spacing: with r = T // N, "trailing" is t = r i + r - 1 for i = N-1..0 and "leading" t = r i; None is the
                schedule's own. A list is taken as it is, whatever N.

        Raises:
            ArgumentError: fewer than 1 step, or more than the schedule has; an unknown word; a list that does not
                decrease, or leaves the schedule.
        """
        total = self.config.num_train_timesteps
        if spacing is not None and not isinstance(spacing, str):
            times = [int(time) for time in spacing]
            falling = all(here > there for here, there in itertools.pairwise(times))
            if not times or not falling or times[0] >= total or times[-1] < 0:
                raise ArgumentError(f"timesteps={list(spacing)}: falling whole numbers from {total - 1} to 0 expected")
            return times, [*times[1:], -1]
        if not 1 <= num_inference_steps <= total:
            raise ArgumentError(f"num_inference_steps={num_inference_steps}: from 1 to {total}")
        spacing = spacing or self.config.timestep_spacing
        if spacing not in ("trailing", "leading"):
            raise ArgumentError(f"timesteps={spacing!r}: trailing, leading or a list of timesteps expected")
        ratio = total // num_inference_steps
        offset = ratio - 1 if spacing == "trailing" else 0
        times = [ratio * i + offset for i in reversed(range(num_inference_steps))]
        return times, [time - ratio for time in times]
