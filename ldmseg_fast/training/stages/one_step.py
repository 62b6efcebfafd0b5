"""Fine-tunes a model for one step (or a few) with the loss of the task itself.

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
from ldmseg_fast.diffusion.inpainting import KnownLatents
from ldmseg_fast.diffusion.sampler import unet_input
from ldmseg_fast.training.slot_matching import match_slots, require_assignment_solver
from ldmseg_fast.training.stages.base import per_image
from ldmseg_fast.training.stages.few_step import FewStepStage, ddim_update


class OneStepStage(FewStepStage):
    """Trains the sampler's map; see the module's docstring. Arguments and errors as `FewStepStage`'s.

    Without `model.init_from` it starts from a mask auto-encoder, `model.mask_vae`, and a UNet of its own.
    """

    name = "one_step"
    starts_fresh = True

    def __init__(self, config: Config) -> None:
        matches = config.few_step.matching == "hungarian"
        if matches:
            require_assignment_solver()
        super().__init__(config)
        self.matches = matches
        if config.few_step.train_decoder:
            self.mask_vae.decoder.requires_grad_(True)

    def prepare(self, batches: Sequence[dict[str, Any]]) -> None:
        """Shares the losses' divisors; see `Stage.prepare`."""
        self.share_counts(batches)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Gives float32 scalars: `loss`, `ce`, `bce`, `dice`, and where they are on `category` and `latent`."""
        loss, segment_ids = self.config.loss, batch["segment_ids"]
        points = per_image(torch.rand, (loss.num_points, 2), self.generators(step, batch, "matching"))  # [B, P, 2]
        table: Tensor | None = None
        known: tuple[Tensor, Tensor] | None = None
        with self.autocast():
            image_latents = self.image_latents(batch)  # [B, C_image, h, w]
            noise = self.initial_noise(batch, step, image_latents)  # x_T, [B, C, h, w]
            if self.config.diffusion.mean_flow:
                return self.mean_flow(batch, step, noise, image_latents)
            if self.config.diffusion.inpainting:
                given = self.given_pixels(batch, step)  # [B, H, W]
                if self.matches:
                    table = self.given_slots(batch, given, noise, image_latents, points)  # [B, 256]
                known = self.known_latents(batch, given, table)
            estimate = self.unroll(noise, image_latents, self.depth(step), known)  # x_0, [B, C, h, w]
            # [B, Q, h 2^u, w 2^u], and [B, C + 1, h 2^u, w 2^u] or None
            mask_logits, category_logits = self.recompute(self.mask_vae.decode_latents_both, estimate)
        if self.mask_vae.config.codes == "colours":
            return colour_losses(mask_logits.float(), segment_ids)
        if self.matches:
            batch = batch | {"table": match_slots(mask_logits, segment_ids, points, loss, table)}
        losses = self.loss_of(mask_logits, estimate, batch, step, category_logits)
        config = self.config.diffusion
        if self.alignment is not None and self.training and (not config.alignment_steps or step < config.alignment_steps):
            losses["alignment"] = self.alignment.loss(batch["image"])
            losses["loss"] = losses["loss"] + config.alignment * losses["alignment"]
        elif self.alignment is not None:
            losses["loss"] = losses["loss"] + 0.0 * sum(each.sum() for each in self.alignment.head.parameters())
        return losses

    def mean_flow(self, batch: dict[str, Any], step: int, noise: Tensor, image_latents: Tensor) -> dict[str, Tensor]:
        """Learns average velocities u(z_t, r, t) = (z_t - o) / t (Geng et al. 2025), o being what the network gives."""
        latents = self.mask_latents(batch)  # x_0
        generators = self.generators(step, batch, "mean flow")
        drawn = torch.sigmoid(per_image(torch.randn, (2,), generators) - 0.4)
        equal = per_image(torch.rand, (1,), generators)[:, 0] < 0.75
        last, first = drawn.amax(1).clamp(min=0.02), drawn.amin(1)
        first = torch.where(equal, last, first)
        # the one step that is sampled, 0 from 1, is among them
        whole = per_image(torch.rand, (1,), generators)[:, 0] < 0.25
        last, first = torch.where(whole, 1.0, last), torch.where(whole, 0.0, first)
        t, r = last.view(-1, 1, 1, 1), first.view(-1, 1, 1, 1)
        velocity = noise - latents
        noisy = (1 - t) * latents + t * noise

        def average(sample: Tensor, time: Tensor) -> Tensor:
            plane = (1 - (time - r)).expand_as(sample)  # zero, as in sampling, for the step from 1 to 0
            output = self.unet(unet_input(sample, image_latents, plane), 999.0 * time.flatten(), None).float()
            return (sample - output) / time

        ours = average(noisy, t)
        with torch.no_grad():
            h = 0.005
            rate = (ours.detach() - average(noisy - h * velocity, t - h)) / h
            target = velocity - (t - r) * rate
        error = (ours - target).square().mean((1, 2, 3))
        loss = (error / (error.detach() + 1e-3)).mean()
        return {"loss": loss, "error": error.mean().detach()}

    def depth(self, step: int) -> int:
        """Tells which of the N sampling steps carries the loss, from 1 to N; drawn where `few_step.depth` is "any"."""
        few_step = self.config.few_step
        return 1 + int(self.chance(step, "depth") * few_step.steps) if few_step.depth == "any" else few_step.steps

    def initial_noise(self, batch: dict[str, Any], step: int, image_latents: Tensor) -> Tensor:
        """Draws x_T of each image, float32 [B, C, h, w], at the size of the image latents [B, C_image, h, w]."""
        shape = (self.mask_vae.config.latent_channels, *image_latents.shape[-2:])
        noise = per_image(torch.randn, shape, self.generators(step, batch, self.name))
        return noise * self.config.scheduler.init_noise_sigma

    def unroll(
        self, noise: Tensor, image_latents: Tensor, depth: int, known: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Runs the sampler for `depth` of its steps; gradients flow through the last of them only.

        Where `depth` is all of `few_step.steps`, the result equals `diffusion.sampler.ddim`'s, and with `known` that of
        sampling under `KnownLatents`.

        Args:
            noise: x_T, [B, C, h, w].
            image_latents: [B, C_image, h, w].
            depth: from 1 to `few_step.steps`.
            known: latents [B, C, h, w] and the cells where they hold, bool [B, 1, h, w].

        Returns:
            The last step's estimate of x_0, float32 [B, C, h, w].
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

    def loss_of(
        self,
        mask_logits: Tensor,
        estimate: Tensor,
        batch: dict[str, Any],
        step: int,
        category_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Scores logits float [B, Q, h * 2^u, w * 2^u] and the estimate of x_0 [B, C, h, w]: the scalars of `forward`.

        Models with categories score their logits [B, C + 1, h * 2^u, w * 2^u] too. Option: `few_step.latent_loss` adds
        the squared error of the estimate.
        """
        parts = self.slot_losses(mask_logits, batch, step, category_logits)
        losses = {"loss": parts.total, **parts.parts()}
        if self.config.few_step.latent_loss:
            with self.autocast():
                mask_latents = self.mask_latents(batch)  # [B, C, h, w]
            losses["latent"] = F.mse_loss(estimate, mask_latents)
            losses["loss"] = parts.total + self.config.few_step.latent_loss * losses["latent"]
        return losses

    @torch.no_grad()
    def given_slots(
        self, batch: dict[str, Any], given: Tensor, noise: Tensor, image_latents: Tensor, points: Tensor
    ) -> Tensor:
        """Looks up what the model calls the segments of which something is given.

        It names them in its draft, its first evaluation without knowing the map. So these are names of its own, which
        it only has to keep.

        Args:
            batch: as `Stage` has it.
            given: bool [B, H, W].
            noise: x_T, [B, C, h, w].
            image_latents: [B, C_image, h, w].
            points: [B, P, 2], (x, y) in [0, 1], where draft and map are compared.

        Returns:
            int64 [B, 256], dense id -> slot; 0 for segments of which no pixel is given.
        """
        segment_ids = batch["segment_ids"]
        draft = self.mask_vae.decode_latents(self.unroll(noise, image_latents, 1))  # [B, Q, h 2^u, w 2^u]
        table = match_slots(draft, segment_ids, points, self.config.loss)
        shown = (segment_ids * given.to(segment_ids.dtype)).flatten(1).long()
        seen = torch.zeros_like(table).scatter_(1, shown, 1)
        return table * seen


def colour_losses(colours: Tensor, segment_ids: Tensor) -> dict[str, Tensor]:
    """Pulls the colours [B, C, h, w] of a segment together and those of others apart (De Brabandere et al. 2017)."""
    ids = F.interpolate(segment_ids[:, None].float(), colours.shape[-2:], mode="nearest")[:, 0].long().flatten(1)  # [B, N]
    points = colours.flatten(2).transpose(1, 2)  # [B, N, C]
    chosen = (ids[..., None] == torch.arange(1, 64, device=ids.device)).float()  # [B, N, K]
    counts = chosen.sum(1)  # [B, K]
    means = (chosen.transpose(1, 2) @ points) / counts.clamp(min=1)[..., None]  # [B, K, C]
    off = (points - chosen @ means).square().sum(-1).add(1e-6).sqrt()
    pull = (F.relu(off - 0.5).square()[..., None] * chosen).sum(1) / counts.clamp(min=1)  # [B, K]
    there = counts > 0
    pull = pull.sum() / there.sum()
    apart = (means[:, :, None] - means[:, None]).square().sum(-1).add(1e-6).sqrt()
    pairs = there[:, :, None] & there[:, None] & ~torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    push = (F.relu(3.0 - apart).square() * pairs).sum() / pairs.sum().clamp(min=1)
    norms = (means.norm(dim=-1) * there).sum() / there.sum()
    return {"loss": pull + push + 0.001 * norms, "pull": pull.detach(), "push": push.detach()}
