"""Second stage: the UNet learns to denoise mask latents, given the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.checkpoints.init_from import load_image_encoder, load_unet, resolve_start
from ldmseg_fast.checkpoints.model_card import write_model_card
from ldmseg_fast.checkpoints.model_folder import (
    load_component,
    load_index,
    postprocess_settings,
    save_component,
    save_index,
)
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config import Config
from ldmseg_fast.diffusion.inpainting import whole_cells
from ldmseg_fast.diffusion.sampler import ddim, image_noise, unet_input
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.models.conditioning import build_conditioning, drop_captions, saved_conditioning, with_context
from ldmseg_fast.models.image_vae import build_image_encoder
from ldmseg_fast.models.unet import UNet
from ldmseg_fast.panoptic.postprocess import PanopticResult, postprocess
from ldmseg_fast.training.losses import mask_losses
from ldmseg_fast.training.stages.base import Stage, kept_blocks, per_image, remap, segments_of

LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


class DiffusionStage(Stage):
    """Noise prediction with self-conditioning (METHOD of LDMSeg, section 3.2) and, as an option, for inpainting.

    A share `diffusion.inpainting` of the images learns to complete a map: blocks of it are dropped, each with the
    image's own probability of 0.1 to 0.9, and what is left is encoded. In latent cells that were kept whole these known
    latents are the condition; elsewhere it is zero, which is what an unknown map has everywhere. The estimate of a
    first pass, where there is one, is overwritten with them in the same cells. So no input channel is added, and
    `KnownLatents` of diffusion/inpainting.py makes a sampler feed the same.
    """

    def __init__(self, config: Config) -> None:
        start = resolve_start(config)
        config = start.config
        super().__init__(config)
        if not config.model.mask_vae:
            raise ConfigError("model.mask_vae: the diffusion stage needs the MODEL_DIR of a trained mask auto-encoder")
        autoencoder = resolve_model_dir(config.model.mask_vae)
        load_index(autoencoder)
        self.mask_vae: Any = load_component(autoencoder, "mask_vae")
        vae_config = self.mask_vae.config
        self.mask_vae.config = replace(
            vae_config, scaling_factor=vae_config.scaling_factor * config.diffusion.latent_scale
        )
        if self.mask_vae.config.latent_channels != config.unet.out_channels:
            raise ConfigError(
                f"model.mask_vae={config.model.mask_vae}: {self.mask_vae.config.latent_channels} latent channels, "
                f"unet.out_channels is {config.unet.out_channels}"
            )
        self.image_vae: Any = build_image_encoder(config.image_encoder, start.vae_config)
        load_image_encoder(self.image_vae, start)
        self.trains_image_vae = config.image_encoder.kind == "conv"
        if not self.trains_image_vae:
            self.image_vae.eval().requires_grad_(False)
        self.unet = UNet(config.unet, config.model.attention)
        load_unet(self.unet, start)
        self.unet.checkpointing = config.train.checkpointing != "none"
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(not name.startswith(config.model.freeze))
        self.conditioning = build_conditioning(config.unet, config.conditioning)
        self.scheduler = Scheduler(config.scheduler)
        self.self_condition = config.diffusion.self_condition > 0

    def train(self, mode: bool = True) -> DiffusionStage:
        super().train(mode)
        self.mask_vae.eval()
        if not self.trains_image_vae:
            self.image_vae.eval()
        if hasattr(self.conditioning, "encoder"):
            self.conditioning.encoder.eval()
        return self

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> image latents [B, C, h, w]; with gradients where the encoder is trained."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(self.trains_image_vae and torch.is_grad_enabled()):
            return self.recompute(self.image_vae, images)

    def image_latents(self, batch: dict[str, Any]) -> Tensor:
        """[B, C, h, w] of a training batch, from the cache where there is one."""
        if "image_latents" in batch:
            return batch["image_latents"].to(self.compute_dtype)
        return self.encode_images(batch["image"])

    def prepare(self, batches: Sequence[dict[str, Any]]) -> None:
        if self.config.diffusion.task_loss:
            self.share_counts(batches)

    def given_pixels(self, batch: dict[str, Any], step: int) -> Tensor:
        """Where the map is given, bool [B, H, W]: the blocks that stay of the images that are drawn for inpainting."""
        config, size = self.config.diffusion, batch["segment_ids"].shape[1:]
        generators = self.generators(step, batch, "inpainting")
        chosen = per_image(torch.rand, (1, 1), generators) < config.inpainting  # [B, 1, 1]
        dropped = 0.1 + 0.8 * per_image(torch.rand, (1, 1), generators)
        return kept_blocks(dropped, size, config.inpainting_block, generators) & chosen

    def known_latents(self, batch: dict[str, Any], given: Tensor, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] of the batch's maps where they are `given`, bool [B, H, W], and void elsewhere; and bool
        [B, 1, h, w], the cells that are given whole. table: id -> slot, where not the batch's own."""
        ids = batch["segment_ids"] * given.to(batch["segment_ids"].dtype)
        bits = self.mask_bits(ids, batch["table"] if table is None else table)
        return self.mask_vae.encode_latents(bits).float(), whole_cells(given, self.mask_vae.config.downsampling)

    def mask_bits(self, segment_ids: Tensor, table: Tensor) -> Tensor:
        """[B, K, H, W]; ids of the loader's fit, and looking at them would wait for a GPU."""
        return encode_mask_bits(segment_ids, self.mask_vae.config.num_bits, table, check_ids=not segment_ids.is_cuda)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        config, scheduler = self.config.diffusion, self.scheduler
        device = batch["segment_ids"].device
        slots = remap(batch["segment_ids"], batch["table"])  # [B, H, W]
        with self.autocast():
            with torch.no_grad():
                bits = self.mask_bits(batch["segment_ids"], batch["table"])
                mask_latents = self.mask_vae.encode_latents(bits).float()  # [B, C, h, w]
            image_latents = self.image_latents(batch)  # [B, C_image, h, w]

            generators = self.generators(step, batch, "diffusion")
            noise = per_image(torch.randn, mask_latents.shape[1:], generators)  # [B, C, h, w]
            total = self.config.scheduler.num_train_timesteps
            timesteps = torch.cat([torch.randint(0, total, (1,), generator=g, device=device) for g in generators])
            if config.image_noise:
                extra = per_image(torch.randn, image_latents.shape[1:], generators).to(image_latents)
                image_latents = image_latents + config.image_noise * extra
            noisy_latents = scheduler.add_noise(mask_latents, noise, timesteps)
            context = None
            if self.conditioning is not None:
                captions = drop_captions(
                    batch.get("captions"),
                    self.config.conditioning.caption_dropout,
                    self.generator(step, batch, "captions", "cpu"),
                )
                context = self.conditioning(batch["image"], captions)  # [B, M, D]

            condition = torch.zeros_like(noisy_latents) if self.self_condition else None
            if condition is not None and config.inpainting:
                with torch.no_grad():
                    known, cells = self.known_latents(batch, self.given_pixels(batch, step))
                condition = torch.where(cells, known, condition)
            if self.self_condition and self.chance(step, "self_condition") < config.self_condition:
                with torch.no_grad():
                    output = self.unet(unet_input(noisy_latents, image_latents, condition), timesteps, context)
                    condition = scheduler.pred_original_sample(output.float(), noisy_latents, timesteps)
                if config.inpainting:
                    condition = torch.where(cells, known, condition)
            output = self.unet(unet_input(noisy_latents, image_latents, condition), timesteps, context).float()

        target = scheduler.target(mask_latents, noise, timesteps)
        error = LOSSES[config.loss](output, target, reduction="none")  # [B, C, h, w]
        if config.mask_void:
            size = mask_latents.shape[-2:]
            error = error * (F.interpolate(slots[:, None].float(), size, mode="nearest") > 0)
        loss = (scheduler.loss_weights.to(device)[timesteps].view(-1, 1, 1, 1) * error).mean()
        losses = {"loss": loss, "error": error.detach().mean()}
        if config.task_loss:
            estimate = scheduler.pred_original_sample(output, noisy_latents, timesteps)
            with self.autocast():
                mask_logits = self.recompute(self.mask_vae.decode_latents, estimate)
            draws = self.generators(step, batch, "points")
            counts = (batch.get("num_masks"), batch.get("num_labelled"))
            losses["task"] = mask_losses(mask_logits, slots, self.config.loss, draws, segments_of(batch), *counts).total
            losses["loss"] = loss + config.task_loss * losses["task"]
        return losses

    @torch.no_grad()
    def sample(
        self,
        images: Tensor,
        image_ids: Sequence[int | str],
        num_inference_steps: int,
        seed: int = 0,
        captions: Sequence[str] | None = None,
    ) -> Tensor:
        """Scaled mask latents [B, C, h, w] of uint8 images [B, 3, H, W]."""
        size = [side // self.mask_vae.config.downsampling for side in images.shape[-2:]]
        noise = image_noise(seed, image_ids, [self.mask_vae.config.latent_channels, *size]).to(images.device)
        with self.autocast():
            image_latents = self.encode_images(images)
            denoise: Any = self.unet
            if self.conditioning is not None:
                denoise = with_context(self.unet, self.conditioning, images, captions)
            return ddim(denoise, noise, image_latents, self.scheduler, num_inference_steps, self.self_condition)

    @torch.no_grad()
    def predict(self, batch: dict[str, Any], target_sizes: Sequence[tuple[int, int]]) -> list[PanopticResult]:
        captions = batch.get("captions")
        latents = self.sample(batch["image"], batch["image_id"], self.config.num_inference_steps, captions=captions)
        with self.autocast():
            mask_logits = self.mask_vae.decode_latents(latents)
        size = tuple(batch["image"].shape[-2:])
        return postprocess(mask_logits.float(), size, list(target_sizes), self.config.postprocess)

    def save(self, folder: Path) -> None:
        config = self.config
        save_component(folder, "unet", config.unet, self.unet.state_dict())
        save_component(folder, "mask_vae", self.mask_vae.config, self.mask_vae.state_dict())
        vae_config = getattr(self.image_vae, "vae_config", None)
        extra = {"_vae_config": dict(vae_config)} if vae_config else None
        save_component(folder, "image_vae", config.image_encoder, self.image_vae.state_dict(), extra)
        save_component(folder, "scheduler", config.scheduler, None)
        components = ["unet", "mask_vae", "image_vae", "scheduler"]
        if self.conditioning is not None:
            save_component(folder, "conditioning", *saved_conditioning(self.conditioning))
            components.append("conditioning")
        settings = {
            "image_size": config.data.image_size,
            "num_inference_steps": config.num_inference_steps,
            "self_condition": self.self_condition,
            "id_assignment": config.data.id_assignment,
            "inpainting": config.diffusion.inpainting > 0,  # trained to take known latents as its condition
        }
        save_index(folder, components, settings | postprocess_settings(config.postprocess))
        write_model_card(folder, {"stage": "diffusion", "data": config.data.root, "config": config})
