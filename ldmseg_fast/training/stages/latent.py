"""Shares what the stages of the denoiser have in common: the networks, the latents that they work on, and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.checkpoints.categories_file import load_categories, save_categories
from ldmseg_fast.checkpoints.category_fit import check_categories
from ldmseg_fast.checkpoints.diffusers_folder import diffusers_scheduler
from ldmseg_fast.checkpoints.init_from import Start
from ldmseg_fast.checkpoints.model_folder import (
    load_component,
    load_index,
    postprocess_settings,
    save_component,
    save_index,
)
from ldmseg_fast.checkpoints.shipped import pretrained_weights, resolve_model_dir
from ldmseg_fast.checkpoints.start_weights import check_start, load_image_encoder, load_unet
from ldmseg_fast.checkpoints.tensors import load_state, load_weights
from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.diffusion.inpainting import whole_cells
from ldmseg_fast.diffusion.sampler import Denoise, ddim, image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.files import write_json
from ldmseg_fast.models.efficientnet_lite import EfficientNetLite, efficientnet_lite_names
from ldmseg_fast.models.image_vae import build_image_encoder
from ldmseg_fast.models.unet import UNet
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.training.stages.base import Stage, kept_blocks, per_image


class LatentStage(Stage):
    """Holds a UNet in training between a frozen mask auto-encoder and an image encoder.

    Args:
        start: the run's settings with what the folders of its weights say, and where these weights are.

    Raises:
        ConfigError: no `model.mask_vae`, one whose latents the UNet or the image encoder does not fit, or categories
            that contradict each other.
        CheckpointError: a folder that is missing or damaged, or weights that do not fit.
    """

    def __init__(self, start: Start) -> None:
        config = start.config
        super().__init__(config)
        if not config.model.mask_vae:
            raise ConfigError("model.mask_vae: the diffusion stage needs the MODEL_DIR of a trained mask auto-encoder")
        autoencoder = resolve_model_dir(config.model.mask_vae)
        load_index(autoencoder)
        folders = {"model.mask_vae": autoencoder}
        exchanged = config.few_step.new_autoencoder  # the categories are the auto-encoder's
        if start.ours and start.unet is not None and start.unet.parent != autoencoder and not exchanged:
            folders["model.init_from"] = start.unet.parent
        check_categories(config.mask_vae.num_categories, folders)
        self.mask_vae: Any = load_component(autoencoder, "mask_vae")
        vae_config = self.mask_vae.config
        self.categories = load_categories(autoencoder, vae_config)
        self.mask_vae.config = replace(
            vae_config, scaling_factor=vae_config.scaling_factor * config.diffusion.latent_scale
        )
        if self.mask_vae.config.latent_channels != config.unet.out_channels:
            raise ConfigError(
                f"model.mask_vae={config.model.mask_vae}: {self.mask_vae.config.latent_channels} latent channels, "
                f"unet.out_channels is {config.unet.out_channels}; set "
                f"mask_vae.latent_channels={self.mask_vae.config.latent_channels}, which the UNet's channels follow"
            )
        if vae_config.downsampling != config.image_encoder.downsampling:
            raise ConfigError(
                f"model.mask_vae={config.model.mask_vae}: latents of 1/{vae_config.downsampling} of the side, "
                f"image_encoder.downsampling is {config.image_encoder.downsampling}"
            )
        encoder = config.image_encoder
        if encoder.reduction != (needed := encoder.downsampling * encoder.picture_scale):
            cure = "another number of image_encoder.widths" if encoder.kind == "conv" else "another of the two"
            raise ConfigError(
                f"image_encoder.downsampling={encoder.downsampling} * image_encoder.picture_scale="
                f"{encoder.picture_scale} make {needed}, but image_encoder.kind={encoder.kind} divides the picture's "
                f"side by {encoder.reduction}; choose {cure}"
            )
        if encoder.is_pyramid and encoder.has_convolutions and encoder.downsampling != 2 ** (len(encoder.widths) - 1):
            raise ConfigError(
                f"image_encoder.downsampling={encoder.downsampling}, but {len(encoder.widths)} image_encoder.widths "
                f"make {2 ** (len(encoder.widths) - 1)}; choose another of the two"
            )
        check_start(start)
        self.image_vae: Any = build_image_encoder(encoder, start.vae_config)
        load_image_encoder(self.image_vae, start)
        self.trains_image_vae = encoder.is_trained
        if not self.trains_image_vae:
            self.image_vae.eval().requires_grad_(False)
        elif encoder.is_pyramid and config.train.image_encoder_lr == 0:
            self.image_vae.network.requires_grad_(False)
        self.unet = UNet(config.unet, config.model.attention)
        load_unet(self.unet, start)
        self.unet.checkpointing = config.train.checkpointing != "none"
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(not name.startswith(config.model.freeze))
        self.scheduler = Scheduler(config.scheduler)
        deepest = config.unet.block_out_channels[-1]
        self.alignment = Alignment(self.unet, deepest) if config.diffusion.alignment else None
        self.self_condition = config.diffusion.self_condition > 0

    def train(self, mode: bool = True) -> LatentStage:
        """Puts what is trained into training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.mask_vae.eval()
        if self.alignment is not None:
            self.alignment.teacher.eval()
        if not self.trains_image_vae:
            self.image_vae.eval()
        return self

    def encode_images(self, images: Tensor) -> Tensor:
        """Encodes images uint8 [B, 3, H, W] as latents [B, C_image, h, w], with gradients if the encoder is trained."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(self.trains_image_vae and torch.is_grad_enabled()):
            return self.recompute(self.image_vae, images)

    def image_latents(self, batch: dict[str, Any]) -> Tensor:
        """Gives the image latents float [B, C_image, h, w] of a training batch, from the cache where there is one."""
        if "image_latents" in batch:
            return batch["image_latents"].to(self.compute_dtype)
        return self.encode_images(batch["image"])

    @torch.no_grad()
    def mask_latents(self, batch: dict[str, Any], table: Tensor | None = None) -> Tensor:
        """Encodes a batch's maps: x_0, float32 [B, C, h, w] (LDMSeg, arXiv 2401.10227, section 3.1).

        It does so in float32 also inside `autocast`: x_0 is what the network is trained towards.

        Args:
            batch: as `Stage` has it.
            table: [B, 256], id -> slot, where not the batch's own.
        """
        bits = self.mask_bits(batch, batch["segment_ids"], batch["table"] if table is None else table)
        with torch.autocast(bits.device.type, enabled=False):
            return self.mask_vae.encode_latents(bits).float()

    def given_pixels(self, batch: dict[str, Any], step: int) -> Tensor:
        """Draws where the map is given, bool [B, H, W]: the blocks that are kept of the images that learn inpainting.

        A share `diffusion.inpainting` of the images does. Each of them loses blocks with its own probability of 0.1 to
        0.9, the range of LDMSeg's evaluation.
        """
        config, size = self.config.diffusion, batch["segment_ids"].shape[1:]
        generators = self.generators(step, batch, "inpainting")
        chosen = per_image(torch.rand, (1, 1), generators) < config.inpainting  # [B, 1, 1]
        dropped = 0.1 + 0.8 * per_image(torch.rand, (1, 1), generators)
        return kept_blocks(dropped, size, config.inpainting_block, generators) & chosen

    @torch.no_grad()
    def known_latents(self, batch: dict[str, Any], given: Tensor, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encodes the part of a batch's maps that is given.

        Args:
            batch: as `Stage` has it.
            given: bool [B, H, W]; the other pixels are encoded as void.
            table: [B, 256], id -> slot, where not the batch's own.

        Returns:
            Latents float32 [B, C, h, w], and the cells that are given whole, bool [B, 1, h, w].
        """
        ids = batch["segment_ids"] * given.to(batch["segment_ids"].dtype)
        cells = whole_cells(given, self.mask_vae.config.downsampling)
        return self.mask_latents(batch | {"segment_ids": ids}, table), cells

    def denoiser(self, batch: dict[str, Any]) -> Denoise:
        """The network for a batch's images as a sampler calls it."""
        return self.unet

    @torch.no_grad()
    def sample(self, batch: dict[str, Any], num_inference_steps: int, seed: int = 0) -> Tensor:
        """Samples scaled mask latents [B, C, h, w] for the batch's `image`, uint8 [B, 3, H, W], and `image_id`."""
        images = batch["image"]
        reduction = self.config.image_encoder.downsampling * self.config.image_encoder.picture_scale
        shape = [self.mask_vae.config.latent_channels, *(side // reduction for side in images.shape[-2:])]
        deviation = self.config.scheduler.init_noise_sigma
        noise = image_noise(seed, batch["image_id"], shape, deviation).to(images.device)
        with self.autocast():
            image_latents = self.encode_images(images)
            denoise = self.denoiser(batch)
            return ddim(denoise, noise, image_latents, self.scheduler, num_inference_steps, self.self_condition)

    @torch.no_grad()
    def predict(self, batch: dict[str, Any], target_sizes: Sequence[tuple[int, int]]) -> list[PanopticResult]:
        """Samples maps for the batch's images; see `Stage.predict`."""
        latents = self.sample(batch, self.config.train.validate_steps or self.config.num_inference_steps)
        with self.autocast():
            logits = self.mask_vae.decode_latents_both(latents)
        height, width = (side // self.config.image_encoder.picture_scale for side in batch["image"].shape[-2:])
        return self.panoptic(logits, (height, width), target_sizes)

    def save_networks(self, folder: Path, others: Sequence[str] = ()) -> None:
        """Writes the components and the index of a model folder. `others` names components that are there already."""
        config = self.config
        save_component(folder, "unet", config.unet, self.unet.state_dict())
        save_component(folder, "mask_vae", self.mask_vae.config, self.mask_vae.state_dict())
        save_categories(folder, self.categories)
        vae_config = getattr(self.image_vae, "vae_config", None)
        extra = {"_vae_config": dict(vae_config)} if vae_config else None
        save_component(folder, "image_vae", config.image_encoder, self.image_vae.state_dict(), extra)
        theirs = diffusers_scheduler(config.scheduler)
        save_component(
            folder,
            "scheduler",
            config.scheduler,
            None,
            write_files=lambda part: write_json(part / "scheduler_config.json", theirs),
        )
        settings = {
            "image_size": config.data.image_size,
            "num_inference_steps": config.num_inference_steps,
            "self_condition": self.self_condition,
            "id_assignment": config.data.id_assignment,
            "inpainting": config.diffusion.inpainting > 0,  # trained to take known latents as its condition
        }
        components = ["unet", "mask_vae", "image_vae", "scheduler", *others]
        save_index(folder, components, settings | postprocess_settings(config.postprocess))


class Alignment(nn.Module):
    """Aligns the UNet's deepest features with those of a frozen network (U-REPA, arXiv 2503.18414)."""

    def __init__(self, unet: nn.Module, channels: int) -> None:
        super().__init__()
        self.teacher = EfficientNetLite()
        path = pretrained_weights(ImageEncoderConfig(kind="efficientnet_lite"))
        load_state(self.teacher, efficientnet_lite_names(load_weights(path)), str(path))
        self.teacher.requires_grad_(False)
        width = self.teacher.channels[2]
        self.head = nn.Sequential(nn.Conv2d(channels, 256, 1), nn.SiLU(), nn.Conv2d(256, width, 1))
        self.seen: list[Tensor] = []
        unet.get_submodule("mid_block").register_forward_hook(lambda _module, _inputs, output: self.keep(output))

    def keep(self, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self.seen = [output]

    def loss(self, images: Tensor) -> Tensor:
        """1 - cosine, and the squared difference of the tokens' similarities; images uint8 [B, 3, S, S]."""
        with torch.no_grad():
            large = F.interpolate(images.float(), scale_factor=4, mode="bilinear", antialias=True).clamp(0, 255)
            features = self.teacher(large)[2].float()  # [B, 112, S / 4, S / 4]
        size = features.shape[-2:]
        own = F.interpolate(self.head(self.seen.pop()).float(), size, mode="bilinear")
        ours, theirs = (F.normalize(each.flatten(2), dim=1) for each in (own, features))
        tokens = 1 - (ours * theirs).sum(1).mean()
        manifold = (ours.transpose(1, 2) @ ours - theirs.transpose(1, 2) @ theirs).square().mean()
        return tokens + 3.0 * manifold


def cells_of(slots: Tensor, size: Sequence[int]) -> Tensor:
    """Picks the slot of each latent cell, int64 [B, h, w], from slots [B, H, W] and `size` (h, w).

    A cell is what nearest interpolation picks for it (the void mask of LDMSeg's public training configuration).
    """
    return F.interpolate(slots[:, None].float(), tuple(size), mode="nearest")[:, 0].long()
