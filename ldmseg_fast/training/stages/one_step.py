"""Fine-tuning for one step (or a few) with the loss of the task itself.

A model of many steps predicts the mean of all latents that the noise leaves possible; decoded, a mean of latents is no
map. Here the sampler runs as it will be used, from pure noise x_T with its own N timesteps, and what is made better is
the map it decodes to:

    x0 = f_theta(x_T, T, image)                      N = 1: one evaluation, zero self-condition
    loss = CE + BCE + Dice of decode(x0 / scale)     the auto-encoder's loss (LDMSeg, section 3.1) on its slot logits
           + latent_loss * |x0 - encode(bits)|^2

The auto-encoder's decoder is frozen, or trained along with `few_step.train_decoder`. For N > 1 the first steps run
without gradients and the last with them, as in direct reward fine-tuning truncated to one step (Clark et al. 2024,
DRaFT-1); `few_step.depth=any` draws which of the N steps is the last, so that each of them is trained.

Slots: a segment's slot cannot be known from the picture alone where ids are drawn at random, nor quite where they are
its rank by position, which hangs on every segment before it. `few_step.matching=hungarian` scores a map under the best
naming of its segments (`slot_matching`), so that the model is free to choose one; `few_step.matching=none` takes
slot = id, as the auto-encoder's training does. With ids by rank it stayed far behind matching in a short trial,
presumably because the loss then teaches doubt: logits spread over the slots a segment might have.

A share `diffusion.inpainting` of the images learns to complete a map of which blocks are given, which the network sees
as in the diffusion stage. Segments of which something is given go by the slots that the model has for them without
knowing the map, as `pipeline.inpaint` has it with a draft; matching names the hidden ones. Slots by where the given
part lies, which the model would not choose itself, made it worse than one that knows nothing where little was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.config import Config
from ldmseg_fast.training.losses import mask_losses
from ldmseg_fast.training.slot_matching import match_slots, require_assignment_solver
from ldmseg_fast.training.stages.base import per_image, remap, segments_of
from ldmseg_fast.training.stages.few_step import FewStepStage


class OneStepStage(FewStepStage):
    name = "one_step"

    def __init__(self, config: Config) -> None:
        if config.few_step.matching == "hungarian":
            require_assignment_solver()
        super().__init__(config)
        if config.few_step.train_decoder:
            self.mask_vae.decoder.requires_grad_(True)

    def prepare(self, batches: Sequence[dict[str, Any]]) -> None:
        self.share_counts(batches)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        few_step, segment_ids = self.config.few_step, batch["segment_ids"]
        depth = few_step.steps
        if few_step.depth == "any":
            depth = 1 + int(self.chance(step, "depth") * depth)
        table, known = batch["table"], None
        points = per_image(torch.rand, (self.config.loss.num_points, 2), self.generators(step, batch, "matching"))
        with self.autocast():
            image_latents = self.image_latents(batch)  # [B, C_image, h, w]
            noise = self.initial_noise(batch, step, image_latents)  # [B, C, h, w]
            if self.config.diffusion.inpainting:
                given = self.given_pixels(batch, step)  # [B, H, W]
                if few_step.matching == "hungarian":
                    table = self.given_slots(batch, given, noise, image_latents, points)
                with torch.no_grad():
                    known = self.known_latents(batch, given, table)
            estimate = self.unroll(noise, image_latents, depth, known)
            mask_logits = self.recompute(self.mask_vae.decode_latents, estimate)  # [B, Q, h 2^u, w 2^u]

        if few_step.matching == "hungarian":
            table = match_slots(mask_logits, segment_ids, points, self.config.loss, None if known is None else table)
        parts = mask_losses(
            mask_logits,
            remap(segment_ids, table),
            self.config.loss,
            self.generators(step, batch, "points"),
            segments_of(batch | {"table": table}),
            batch.get("num_masks"),
            batch.get("num_labelled"),
        )
        losses = {"loss": parts.total, "ce": parts.ce, "bce": parts.bce, "dice": parts.dice}
        if few_step.latent_loss:
            with torch.no_grad(), self.autocast():
                mask_latents = self.mask_vae.encode_latents(self.mask_bits(segment_ids, table)).float()  # [B, C, h, w]
            losses["latent"] = F.mse_loss(estimate, mask_latents)
            losses["loss"] = parts.total + few_step.latent_loss * losses["latent"]
        return losses

    @torch.no_grad()
    def given_slots(
        self, batch: dict[str, Any], given: Tensor, noise: Tensor, image_latents: Tensor, points: Tensor
    ) -> Tensor:
        """Dense id -> slot, int64 [B, 256], of the segments of which a pixel is `given`, bool [B, H, W]; 0 for others.

        What the model calls them in its draft, its first evaluation from `noise` [B, C, h, w] without knowing the map:
        names of its own that it only has to keep. points: [B, P, 2], where draft and map are compared.
        """
        segment_ids = batch["segment_ids"]
        draft = self.mask_vae.decode_latents(self.unroll(noise, image_latents, 1))  # [B, Q, h 2^u, w 2^u]
        table = match_slots(draft, segment_ids, points, self.config.loss)
        shown = (segment_ids * given.to(segment_ids.dtype)).flatten(1).long()
        seen = torch.zeros_like(table).scatter_(1, shown, 1)
        return table * seen
