"""What the stages that train for few sampling steps share: where they start, and the sampler with gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.checkpoints.model_card import write_model_card
from ldmseg_fast.checkpoints.model_folder import load_component_config, load_index
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config import Config, validate
from ldmseg_fast.diffusion.inpainting import KnownLatents
from ldmseg_fast.diffusion.sampler import unet_input
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.training.stages.base import per_image
from ldmseg_fast.training.stages.diffusion import DiffusionStage


class FewStepStage(DiffusionStage):
    """A trained model of many steps, trained on for `few_step.steps` of them.

    Networks, noise schedule, picture size and, where the folder tells it, id assignment are those of
    `model.init_from`, whatever the run's settings say: there is nothing to choose. It saves a MODEL_DIR whose number of
    sampling steps is `few_step.steps`.

    Raises:
        ConfigError: no `model.init_from`, a model with cross-attention, or settings that contradict each other.
        CheckpointError: no model folder, or a damaged one.
    """

    name = "few_step"

    def __init__(self, config: Config) -> None:
        super().__init__(started_from_model(config))

    def step_times(self) -> tuple[list[int], list[int]]:
        """The sampler's timesteps, and the one after each."""
        return self.scheduler.timesteps(self.config.few_step.steps)

    def initial_noise(self, batch: dict[str, Any], step: int, image_latents: Tensor) -> Tensor:
        """x_T of each image, [B, C, h, w] float32."""
        shape = (self.mask_vae.config.latent_channels, *image_latents.shape[-2:])
        return per_image(torch.randn, shape, self.generators(step, batch, self.name))

    def estimate(
        self,
        noisy_latents: Tensor,
        image_latents: Tensor,
        time: int | Tensor,
        condition: Tensor | None,
        network: Any = None,
    ) -> Tensor:
        """x_0 as the UNet (or another `network`) has it at a timestep, or one per image, [B]: float32 [B, C, h, w]."""
        timesteps = torch.as_tensor(time, device=noisy_latents.device).expand(len(noisy_latents))
        output = (network or self.unet)(unet_input(noisy_latents, image_latents, condition), timesteps, None).float()
        return self.scheduler.pred_original_sample(output, noisy_latents, timesteps)

    def unroll(
        self, noise: Tensor, image_latents: Tensor, depth: int, known: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x_0 as the sampler has it after `depth` of its steps; gradients flow through the last of them only.

        Equal to `diffusion.sampler.ddim` where `depth` is all of `few_step.steps`; with `known` latents [B, C, h, w]
        and the cells where they hold, bool [B, 1, h, w], to sampling under `KnownLatents`.
        """
        times, previous = self.step_times()
        latents = noise
        constraint = None if known is None else KnownLatents(*known, self.scheduler)
        condition = None
        if self.self_condition:
            condition = torch.zeros_like(latents) if constraint is None else constraint.condition(latents)
        for time, next_time in zip(times[: depth - 1], previous):
            with torch.no_grad():
                estimate = self.estimate(latents, image_latents.detach(), time, condition)
            if constraint is not None:
                estimate = constraint.estimate(estimate)
            latents = ddim_update(latents, estimate, self.alpha(time, latents), self.alpha(next_time, latents))
            condition = estimate if self.self_condition else None
        estimate = self.estimate(latents, image_latents, times[depth - 1], condition)
        return estimate if constraint is None else constraint.estimate(estimate)

    def alpha(self, time: int | Tensor, latents: Tensor) -> Tensor:
        """Cumulative alpha at a timestep, or one per image: [1 or B, 1, 1, 1]; before step 0 it is that of step 0."""
        timesteps = torch.as_tensor(time, device=latents.device).clamp(min=0).view(-1, 1, 1, 1)
        return self.scheduler.alphas_cumprod.to(latents.device)[timesteps]

    def save(self, folder: Path) -> None:
        super().save(folder)
        facts = {"stage": self.name, "started from": Path(self.config.model.init_from).name}
        write_model_card(folder, facts | {"data": self.config.data.root, "config": self.config})


def ddim_update(noisy_latents: Tensor, estimate: Tensor, alpha: Tensor, next_alpha: Tensor) -> Tensor:
    """x_s from x_t and its estimate of x_0, all [B, C, h, w] (Song et al. 2021, equation 12 with eta 0)."""
    noise = (noisy_latents - alpha.sqrt() * estimate) / (1.0 - alpha).sqrt()
    return next_alpha.sqrt() * estimate + (1.0 - next_alpha).sqrt() * noise


def started_from_model(config: Config) -> Config:
    """`config` with everything that the model in `model.init_from` fixes."""
    if not config.model.init_from:
        raise ConfigError("model.init_from is missing: few-step training starts from the MODEL_DIR of a trained model")
    folder = resolve_model_dir(config.model.init_from)
    index = load_index(folder)
    missing = sorted({"unet", "mask_vae", "image_vae", "scheduler"} - set(index.get("components", [])))
    if missing:
        raise CheckpointError(f"model.init_from={folder}: a model folder without {', '.join(missing)}; train it first")
    found: dict[str, Any] = {name: load_component_config(folder, name)[0] for name in ("unet", "mask_vae", "scheduler")}
    if found["unet"].conditioning != "none":
        raise ConfigError(
            f"model.init_from={folder}: unet.conditioning={found['unet'].conditioning}; few-step training takes models "
            f"without cross-attention"
        )
    steps = config.few_step.steps
    if not 1 <= steps <= found["scheduler"].num_train_timesteps:
        raise ConfigError(f"few_step.steps={steps}: from 1 to {found['scheduler'].num_train_timesteps}")
    data = replace(
        config.data,
        image_size=index.get("image_size", config.data.image_size),
        id_assignment=index.get("id_assignment", config.data.id_assignment),
    )
    return validate(
        replace(
            config,
            **found,
            image_encoder=replace(load_component_config(folder, "image_vae")[0], path=""),
            data=data,
            # the folder's auto-encoder has the run's latent scale in its scaling factor already
            diffusion=replace(
                config.diffusion, latent_scale=1.0, self_condition=float(index.get("self_condition", True))
            ),
            model=replace(config.model, mask_vae=str(folder)),
            num_inference_steps=steps,
        )
    )
