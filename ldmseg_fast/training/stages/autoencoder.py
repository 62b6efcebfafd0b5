"""First stage: trains the mask auto-encoder to reconstruct segment maps from bit planes.

The method is LDMSeg's, arXiv 2401.10227, section 3.1; `loss.drop_blocks` and `loss.latent_noise` are options of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.checkpoints.categories_file import save_categories
from ldmseg_fast.checkpoints.model_card import write_model_card
from ldmseg_fast.checkpoints.model_folder import postprocess_settings, save_component, save_index
from ldmseg_fast.config import Config
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.training.stages.base import Stage, kept_blocks, per_image


class AutoencoderStage(Stage):
    """Trains the mask auto-encoder.

    Attributes:
        latent_std: a float32 scalar, the running deviation of the unscaled latents, for a `scaling_factor` of 0.
    """

    latent_std: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mask_vae = MaskVAE(config.mask_vae)
        self.register_buffer("latent_std", torch.tensor(1.0))

    def prepare(self, batches: Sequence[dict[str, Any]]) -> None:
        """Shares the losses' divisors; see `Stage.prepare`."""
        self.share_counts(batches)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Gives the float32 scalars `loss`, `ce`, `bce`, `dice`, `category` and `kl`; see `Stage.forward`."""
        config, vae = self.config.loss, self.mask_vae
        generators = self.generators(step, batch, "autoencoder")
        given = batch["segment_ids"]  # [B, H, W]
        if config.drop_blocks:
            given = drop_blocks(given, config.drop_blocks, config.drop_block_size, generators)

        with self.autocast():
            bits = self.mask_bits(batch, given, batch["table"], channels_last=True)  # [B, K, H, W]
            posterior = self.recompute(vae.encode, bits)
            latents = posterior.sample(per_image(torch.randn, posterior.mean.shape[1:], generators))  # [B, C, h, w]
            clean = latents.detach().float()
            if self.training:
                self.latent_std.lerp_(clean.std(), 1.0 if step == 0 else 0.02)
            if config.latent_noise:
                noise = per_image(torch.randn, latents.shape[1:], generators)
                # each image its own strength, so that clean latents stay part of the training
                strength = per_image(torch.rand, (1, 1, 1), generators)
                spread = clean.flatten(1).std(1).view(-1, 1, 1, 1)
                latents = latents + config.latent_noise * strength * spread * noise
            # [B, Q, H/2^.., W/2^..], and [B, C + 1, H/2^.., W/2^..] or None
            mask_logits, category_logits = self.recompute(vae.decode_both, latents)

        losses = self.slot_losses(mask_logits, batch, step, category_logits)
        kl = posterior.kl().float().mean()
        loss = losses.total + config.kl * kl
        if posterior.loss is not None:
            loss = loss + posterior.loss.float()
        return {"loss": loss, **losses.parts(), "kl": kl}

    @torch.no_grad()
    def predict(self, batch: dict[str, Any], target_sizes: Sequence[tuple[int, int]]) -> list[PanopticResult]:
        """Reconstructs the batch's own maps; see `Stage.predict`."""
        vae = self.mask_vae
        with self.autocast():
            bits = self.mask_bits(batch, batch["segment_ids"], batch["table"], channels_last=True)
            logits = vae.decode_both(vae.encode(bits).mode())
        height, width = batch["segment_ids"].shape[-2:]
        return self.panoptic(logits, (height, width), target_sizes)

    def save(self, folder: Path) -> None:
        """Writes a model folder that holds the auto-encoder alone; see `Stage.save`."""
        vae_config = self.mask_vae.config
        if vae_config.scaling_factor == 0:
            vae_config = replace(vae_config, scaling_factor=round(1.0 / float(self.latent_std), 5))
        save_component(folder, "mask_vae", vae_config, self.mask_vae.state_dict())
        save_categories(folder, self.categories)
        settings = postprocess_settings(self.config.postprocess) | {"image_size": self.config.data.image_size}
        save_index(folder, ["mask_vae"], settings | {"id_assignment": self.config.data.id_assignment})
        write_model_card(folder, {"stage": "autoencoder", "data": self.config.data.root, "config": self.config})


def drop_blocks(segment_ids: Tensor, strength: float, size: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Makes blocks of `size` x `size` pixels void, of each image a share drawn from [0, strength].

    Takes and returns integer ids [B, H, W]; `generators` has one for each image.
    """
    share = per_image(torch.rand, (1, 1), generators) * strength
    keep = kept_blocks(share, segment_ids.shape[1:], size, generators)
    return segment_ids * keep.to(segment_ids.dtype)
