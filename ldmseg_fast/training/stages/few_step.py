"""Shares what the stages that train for few sampling steps have in common: where they start, and the sampler's step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.checkpoints.category_fit import check_categories
from ldmseg_fast.checkpoints.hub_names import PREFIX
from ldmseg_fast.checkpoints.init_from import resolve_start, started_encoder
from ldmseg_fast.checkpoints.model_card import write_model_card
from ldmseg_fast.checkpoints.model_folder import load_component_config, load_index
from ldmseg_fast.checkpoints.shipped import recorded, resolve_model_dir
from ldmseg_fast.config import Config, validate
from ldmseg_fast.diffusion.sampler import unet_input
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.training.stages.latent import LatentStage


class FewStepStage(LatentStage):
    """Trains a model of many steps on for `few_step.steps` of them.

    Networks, noise schedule, picture size and, where the folder tells it, id assignment are those of
    `model.init_from`, whatever the run's settings say: there is nothing to choose. One thing is: a pre-trained image
    encoder (`image_encoder.kind=efficientnet_lite`) takes the place of another one that the folder has. Another is the
    size: with `few_step.resize` the networks go on at the run's `data.image_size` and `image_encoder.picture_scale`. A
    third is the mask auto-encoder: with `few_step.new_autoencoder` it is `model.mask_vae`, which may have latents of
    another number of channels; the UNet's convolutions from and to them start anew.
    It saves a MODEL_DIR whose number of sampling steps is `few_step.steps`.

    Args:
        config: the run's.

    Raises:
        ConfigError: no `model.init_from`, a model with cross-attention, or settings that contradict each other.
        CheckpointError: no model folder, or a damaged one.
    """

    name = "few_step"
    starts_fresh = False  # whether it can do without `model.init_from`

    def __init__(self, config: Config) -> None:
        super().__init__(resolve_start(self.started(config)))

    @classmethod
    def started(cls, config: Config) -> Config:
        """Puts into `config` what a model, or an auto-encoder alone, fixes. Errors as the class's."""
        if cls.starts_fresh and not config.model.init_from and config.model.mask_vae:
            return started_fresh(config)
        return started_from_model(config)

    def step_times(self) -> tuple[list[int], list[int]]:
        """Lists the sampler's timesteps, and the one after each."""
        return self.scheduler.timesteps(self.config.few_step.steps)

    def estimate(
        self,
        noisy_latents: Tensor,
        image_latents: Tensor,
        time: int | Tensor,
        condition: Tensor | None,
        network: Any = None,
    ) -> Tensor:
        """Estimates x_0, float32 [B, C, h, w].

        Args:
            noisy_latents: x_t, [B, C, h, w].
            image_latents: [B, C_image, h, w].
            time: a timestep, or one per image, int64 [B].
            condition: [B, C, h, w]; None where the network has no channels for it.
            network: another network than the UNet in training.
        """
        timesteps = torch.as_tensor(time, device=noisy_latents.device).expand(len(noisy_latents))
        output = (network or self.unet)(unet_input(noisy_latents, image_latents, condition), timesteps, None).float()
        return self.scheduler.pred_original_sample(output, noisy_latents, timesteps)

    def alpha(self, time: int | Tensor, latents: Tensor) -> Tensor:
        """Looks up the cumulative alpha at a timestep, or at one per image: float32 [1, 1, 1, 1] or [B, 1, 1, 1].

        Before step 0 it is that of step 0. `latents` says on which device.
        """
        timesteps = torch.as_tensor(time, device=latents.device).clamp(min=0).view(-1, 1, 1, 1)
        return self.scheduler.alphas_cumprod.to(latents.device)[timesteps]

    def save(self, folder: Path) -> None:
        """Writes the model folder; see `Stage.save`."""
        self.save_networks(folder)
        start = self.config.model.init_from or self.config.model.mask_vae
        facts = {"stage": self.name, "started from": start if start.startswith(PREFIX) else Path(start).name}
        write_model_card(folder, facts | {"data": self.config.data.root, "config": self.config})


def ddim_update(noisy_latents: Tensor, estimate: Tensor, alpha: Tensor, next_alpha: Tensor) -> Tensor:
    """Steps from x_t and its estimate of x_0 to x_s (Song et al. 2021, equation 12 with eta 0).

    All latents are float32 [B, C, h, w]; the cumulative alphas at t and s are [1, 1, 1, 1] or [B, 1, 1, 1].
    """
    noise = (noisy_latents - alpha.sqrt() * estimate) / (1.0 - alpha).sqrt()
    return next_alpha.sqrt() * estimate + (1.0 - next_alpha).sqrt() * noise


def started_fresh(config: Config) -> Config:
    """Returns the settings of a run that starts from a mask auto-encoder alone, `model.mask_vae`.

    Its number of sampling steps is `few_step.steps`.

    Raises:
        ConfigError: cross-attention, or settings that contradict each other.
    """
    if config.unet.conditioning != "none":
        raise ConfigError(
            f"unet.conditioning={config.unet.conditioning}: few-step training takes models without cross-attention"
        )
    return validate(replace(config, num_inference_steps=config.few_step.steps))


def started_from_model(config: Config) -> Config:
    """Puts everything into `config` that the model in `model.init_from` fixes.

    Raises:
        ConfigError: no `model.init_from`, a model with cross-attention, settings that contradict each other, or
            categories that do.
        CheckpointError: no model folder, or one without all its components.
    """
    if not config.model.init_from:
        raise ConfigError(
            "model.init_from is missing: few-step training starts from the MODEL_DIR of a trained model; stage "
            "one_step can start from model.mask_vae, a trained mask auto-encoder, instead"
        )
    folder = resolve_model_dir(config.model.init_from)
    index = load_index(folder)
    missing = sorted({"unet", "mask_vae", "image_vae", "scheduler"} - set(index["components"]))
    if missing:
        raise CheckpointError(f"model.init_from={folder}: a model folder without {', '.join(missing)}; train it first")
    folders = {} if config.few_step.new_autoencoder else {"model.init_from": folder}
    if config.model.mask_vae:
        folders["model.mask_vae"] = resolve_model_dir(config.model.mask_vae)
    check_categories(config.mask_vae.num_categories, folders)
    found: dict[str, Any] = {name: load_component_config(folder, name)[0] for name in ("unet", "mask_vae", "scheduler")}
    if found["unet"].conditioning != "none":
        raise ConfigError(
            f"model.init_from={folder}: unet.conditioning={found['unet'].conditioning}; few-step training takes models "
            f"without cross-attention"
        )
    sigma = min(config.scheduler.init_noise_sigma, found["scheduler"].init_noise_sigma)  # what has none stays without
    found["scheduler"] = replace(found["scheduler"], init_noise_sigma=sigma)
    autoencoder = _new_autoencoder(config, folder, found) if config.few_step.new_autoencoder else None
    steps = config.few_step.steps
    if not 1 <= steps <= found["scheduler"].num_train_timesteps:
        raise ConfigError(f"few_step.steps={steps}: from 1 to {found['scheduler'].num_train_timesteps}")
    encoder = started_encoder(config, load_component_config(folder, "image_vae")[0])
    names = load_index(resolve_model_dir(autoencoder)) if autoencoder else index
    data = replace(config.data, id_assignment=names.get("id_assignment", config.data.id_assignment))
    if config.few_step.resize:  # the networks are convolutional
        found["unet"] = replace(found["unet"], sample_size=data.image_size // found["mask_vae"].downsampling)
    else:
        data = replace(data, image_size=index.get("image_size", data.image_size))
    return validate(
        replace(
            config,
            **found,
            image_encoder=encoder,
            data=data,
            # the folder's auto-encoder has the run's latent scale in its scaling factor already
            diffusion=replace(
                config.diffusion,
                latent_scale=1.0 if autoencoder is None else config.diffusion.latent_scale,
                self_condition=float(index.get("self_condition", True)),
            ),
            model=replace(config.model, mask_vae=autoencoder or recorded(config.model.init_from, folder)),
            num_inference_steps=steps,
        )
    )


def _new_autoencoder(config: Config, folder: Path, found: dict[str, Any]) -> str:
    """Puts the auto-encoder of `model.mask_vae` into `found`, and a UNet for its latents; returns what names it.

    Raises:
        ConfigError: no `model.mask_vae`.
        CheckpointError: no model folder, or a damaged one.
    """
    if not config.model.mask_vae:
        raise ConfigError("few_step.new_autoencoder=true: name the auto-encoder's MODEL_DIR, model.mask_vae=FOLDER")
    given = resolve_model_dir(config.model.mask_vae)
    mask_vae, unet = load_component_config(given, "mask_vae")[0], found["unet"]
    image_channels = load_component_config(folder, "image_vae")[0].latent_channels
    parts = (unet.in_channels - image_channels) // unet.out_channels  # noisy latents, and perhaps the condition
    channels = mask_vae.latent_channels
    found["mask_vae"] = mask_vae
    found["unet"] = replace(unet, in_channels=image_channels + parts * channels, out_channels=channels)
    return recorded(config.model.mask_vae, given)
