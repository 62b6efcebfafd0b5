"""First stage: the mask auto-encoder learns to reconstruct segment maps from bit planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.checkpoint import postprocess_settings, save_component, save_index
from ldmseg_fast.config import Config
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.losses import mask_losses
from ldmseg_fast.model_card import write_model_card
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.panoptic import PanopticResult, postprocess
from ldmseg_fast.stages.base import Stage, remap


class AutoencoderStage(Stage):
    latent_std: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mask_vae = MaskVAE(config.mask_vae)
        self.register_buffer("latent_std", torch.tensor(1.0))  # running, of the unscaled latents

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        config, vae = self.config.loss, self.mask_vae
        generator = self.generator(step, batch, "autoencoder")
        slots = remap(batch["segment_ids"], batch["table"])  # [B, H, W]
        given = batch["segment_ids"]
        if config.drop_blocks:
            given = drop_blocks(given, config.drop_blocks, config.drop_block_size, generator)

        with self.autocast():
            bits = encode_mask_bits(given, vae.config.num_bits, batch["table"], channels_last=True)  # [B, K, H, W]
            posterior = self.recompute(vae.encode, bits)
            noise = torch.randn(posterior.mean.shape, generator=generator, device=slots.device)
            latents = posterior.sample(noise)  # [B, C, h, w]
            spread = latents.detach().float().std()
            self.latent_std.lerp_(spread, 1.0 if step == 0 else 0.02)
            if config.latent_noise:
                noise = torch.randn(latents.shape, generator=generator, device=slots.device)
                # each image its own strength, so that clean latents stay part of the training
                strength = torch.rand(len(latents), 1, 1, 1, generator=generator, device=slots.device)
                latents = latents + config.latent_noise * strength * spread * noise
            mask_logits = self.recompute(vae.decode, latents)  # [B, Q, H/2^.., W/2^..]

        losses = mask_losses(mask_logits, slots, config, generator)
        kl = posterior.kl().float().mean()
        loss = losses.total + config.kl * kl
        if posterior.loss is not None:
            loss = loss + posterior.loss.float()
        return {"loss": loss, "ce": losses.ce, "bce": losses.bce, "dice": losses.dice, "kl": kl}

    @torch.no_grad()
    def predict(self, batch: dict[str, Any], target_sizes: Sequence[tuple[int, int]]) -> list[PanopticResult]:
        """Reconstructions of the batch's own maps."""
        vae = self.mask_vae
        with self.autocast():
            bits = encode_mask_bits(batch["segment_ids"], vae.config.num_bits, batch["table"], channels_last=True)
            mask_logits = vae.decode(vae.encode(bits).mode())
        size = tuple(batch["segment_ids"].shape[-2:])
        return postprocess(mask_logits.float(), size, list(target_sizes), self.config.postprocess)

    def save(self, folder: Path) -> None:
        vae_config = self.mask_vae.config
        if vae_config.scaling_factor == 0:
            vae_config = replace(vae_config, scaling_factor=round(1.0 / float(self.latent_std), 5))
        save_component(folder, "mask_vae", vae_config, self.mask_vae.state_dict())
        settings = postprocess_settings(self.config.postprocess) | {"image_size": self.config.data.image_size}
        save_index(folder, ["mask_vae"], settings | {"id_assignment": self.config.data.id_assignment})
        write_model_card(folder, {"stage": "autoencoder", "data": self.config.data.root, "config": self.config})


def drop_blocks(segment_ids: Tensor, strength: float, size: int, generator: torch.Generator) -> Tensor:
    """Void in blocks of size x size pixels: per image a share drawn from [0, strength] of them. Ids [B, H, W]."""
    batch, height, width = segment_ids.shape
    rows, columns = -(-height // size), -(-width // size)
    share = torch.rand(batch, 1, 1, generator=generator, device=generator.device) * strength
    keep = torch.rand(batch, rows, columns, generator=generator, device=generator.device) >= share
    keep = keep.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :height, :width]
    return torch.where(keep.to(segment_ids.device), segment_ids, torch.zeros_like(segment_ids))
