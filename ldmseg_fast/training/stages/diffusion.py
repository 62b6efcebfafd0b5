"""Second stage: trains the UNet to denoise mask latents, given the image (LDMSeg, arXiv 2401.10227, section 3.2).

One step is Ho et al. 2020 (DDPM, arXiv 2006.11239), algorithm 1, on latents:

    x_t  = sqrt(a_t) x_0 + sqrt(1 - a_t) e                       equation 4; a_t is their cumulative alpha
    loss = w(t) |e - e_theta(x_t, t, image, condition)|^2        equation 14 with w(t) = 1

x_0 is the encoded annotation. The condition is the network's own estimate of x_0 from a pass before, without gradients
(Chen et al. 2023, self-conditioning). `noise_inputs` makes x_t, `condition_of` the condition, `loss_of` the loss. Every
option of `config.diffusion` is in one of them, and is off by default except for self-conditioning and the void mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.checkpoints.init_from import resolve_start
from ldmseg_fast.checkpoints.model_card import write_model_card
from ldmseg_fast.checkpoints.model_folder import save_component
from ldmseg_fast.config import Config
from ldmseg_fast.diffusion.sampler import Denoise, unet_input
from ldmseg_fast.models.conditioning import build_conditioning, drop_captions, saved_conditioning, with_context
from ldmseg_fast.training.stages.base import per_image, random_integers, remap
from ldmseg_fast.training.stages.latent import LatentStage, labelled_cells

LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


@dataclass(frozen=True)
class NoiseInputs:
    """What a training step shows the network, beside the condition.

    mask_latents, noise, noisy_latents: x_0, e and x_t, float32 [B, C, h, w]. timesteps: t, int64 [B]. image_latents:
    [B, C_image, h, w]. context: [B, M, D] where the network has cross-attention.
    """

    mask_latents: Tensor
    noise: Tensor
    timesteps: Tensor
    noisy_latents: Tensor
    image_latents: Tensor
    context: Tensor | None


class DiffusionStage(LatentStage):
    """Trains noise prediction with self-conditioning and, as an option, for inpainting.

    A share `diffusion.inpainting` of the images learns to complete a map: blocks of it are dropped, and what is left is
    encoded. In latent cells that were kept whole these known latents are the condition; elsewhere it is zero, which is
    what an unknown map has everywhere. The estimate of a first pass, where there is one, is overwritten with them in
    the same cells. So no input channel is added, and `KnownLatents` of diffusion/inpainting.py makes a sampler feed the
    same.

    Args:
        config: the run's; structure that the folders of its weights fix is taken from there.

    Raises:
        ConfigError: settings that contradict each other or a folder of weights.
        CheckpointError: a folder that is missing or damaged, or weights that do not fit.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(resolve_start(config))
        self.conditioning = build_conditioning(self.config.unet, self.config.conditioning)

    def train(self, mode: bool = True) -> DiffusionStage:
        """Puts what is trained into training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        if hasattr(self.conditioning, "encoder"):
            self.conditioning.encoder.eval()
        return self

    def prepare(self, batches: Sequence[dict[str, Any]]) -> None:
        """Shares the divisors of the task loss, where that is on; see `Stage.prepare`."""
        if self.config.diffusion.task_loss:
            self.share_counts(batches)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Gives float32 scalars: `loss`, `error` (not weighted) and, where it is on, `task`; see `Stage.forward`."""
        with self.autocast():
            inputs = self.noise_inputs(batch, step)
            if self.chance(step, "own_estimate") < self.config.diffusion.own_estimate:
                inputs = self.from_own_estimate(inputs, batch, step)
            condition = self.condition_of(inputs, batch, step)  # [B, C, h, w] or None
            output = self.unet_output(inputs, condition)  # e_theta, [B, C, h, w]
        return self.loss_of(output, inputs, batch, step)

    def noise_inputs(self, batch: dict[str, Any], step: int) -> NoiseInputs:
        """Draws noise and timesteps, and mixes the noise into the encoded annotation.

        Options: `diffusion.image_noise` disturbs the image latents; `unet.conditioning` adds a context.
        """
        mask_latents = self.mask_latents(batch)  # x_0, [B, C, h, w]
        image_latents = self.image_latents(batch)  # [B, C_image, h, w]
        generators = self.generators(step, batch, "diffusion")
        noise = per_image(torch.randn, mask_latents.shape[1:], generators)  # e, [B, C, h, w]
        total = self.config.scheduler.num_train_timesteps
        timesteps = random_integers(total, generators)  # t, [B]
        if self.config.diffusion.times == "logit_normal":  # Esser et al. 2024, arXiv 2403.03206, equation 19
            share = per_image(torch.randn, (), generators).sigmoid()
            timesteps = (share * total).long().clamp(max=total - 1)
        if self.config.diffusion.image_noise:
            extra = per_image(torch.randn, image_latents.shape[1:], generators).to(image_latents)
            image_latents = image_latents + self.config.diffusion.image_noise * extra
        noisy_latents = self.scheduler.add_noise(mask_latents, noise, timesteps)  # x_t: DDPM, equation 4
        context = self.context_of(batch, step)
        return NoiseInputs(mask_latents, noise, timesteps, noisy_latents, image_latents, context)

    @torch.no_grad()
    def from_own_estimate(self, inputs: NoiseInputs, batch: dict[str, Any], step: int) -> NoiseInputs:
        """Puts the network's own estimate of x_0 in its place in x_t, as a sampler does.

        The noise becomes what leads from there to the true x_0, so that the network learns to mend its own errors (the
        option "train on prediction" of LDMSeg's public training configuration; Zhou et al. 2024, arXiv 2312.00210).
        """
        output = self.unet_output(inputs, self.condition_of(inputs, batch, step))
        estimate = self.scheduler.pred_original_sample(output, inputs.noisy_latents, inputs.timesteps)
        noisy_latents = self.scheduler.add_noise(estimate, inputs.noise, inputs.timesteps)
        noise = self.scheduler.noise_between(inputs.mask_latents, noisy_latents, inputs.timesteps)
        return replace(inputs, noise=noise, noisy_latents=noisy_latents)

    def context_of(self, batch: dict[str, Any], step: int) -> Tensor | None:
        """Gives what cross-attention sees, float [B, M, D], with a share of the captions dropped; None without it."""
        if self.conditioning is None:
            return None
        generator = self.generator(step, batch, "captions", "cpu")
        captions = drop_captions(batch.get("captions"), self.config.conditioning.caption_dropout, generator)
        return self.conditioning(batch["image"], captions)

    def condition_of(self, inputs: NoiseInputs, batch: dict[str, Any], step: int) -> Tensor | None:
        """Gives the condition, float32 [B, C, h, w]; None where the network has no channels for it.

        It is the estimate of x_0 from a first pass with condition zero, or, in a share 1 - `diffusion.self_condition`
        of the steps, zero itself. Option: with `diffusion.inpainting`, known latents stand in the cells that are given.
        """
        if not self.self_condition:
            return None
        config = self.config.diffusion
        known: tuple[Tensor, Tensor] | None = None
        if config.inpainting:
            known = self.known_latents(batch, self.given_pixels(batch, step))
        condition = _with_known(torch.zeros_like(inputs.noisy_latents), known)
        if self.chance(step, "self_condition") < config.self_condition:
            with torch.no_grad():
                output = self.unet_output(inputs, condition)
                estimate = self.scheduler.pred_original_sample(output, inputs.noisy_latents, inputs.timesteps)
            condition = _with_known(estimate, known)
        return condition

    def unet_output(self, inputs: NoiseInputs, condition: Tensor | None) -> Tensor:
        """Evaluates the network once: float32 [B, C, h, w], what `scheduler.prediction_type` says."""
        sample = unet_input(inputs.noisy_latents, inputs.image_latents, condition)
        return self.unet(sample, inputs.timesteps, inputs.context).float()

    def loss_of(self, output: Tensor, inputs: NoiseInputs, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Weighs the network's error: the scalars of `forward`.

        Options: `diffusion.loss` is the kind of error; `diffusion.mask_void` leaves void cells out;
        `diffusion.area_weights` and `diffusion.hard_examples` weigh cells; `diffusion.task_loss` adds the
        auto-encoder's loss on the decoded estimate of x_0.

        Args:
            output: the network's, float32 [B, C, h, w].
            inputs: what it was made from.
            batch, step: as `forward` has them.
        """
        config = self.config.diffusion
        target = self.scheduler.target(inputs.mask_latents, inputs.noise, inputs.timesteps)  # [B, C, h, w]
        error = LOSSES[config.loss](output, target, reduction="none")  # DDPM, equation 14, [B, C, h, w]
        if config.mask_void:
            slots = remap(batch["segment_ids"], batch["table"])  # [B, H, W]
            error = error * labelled_cells(slots, error.shape[-2:])
        if config.area_weights:
            error = error * area_weights(remap(batch["segment_ids"], batch["table"]), error.shape[-2:])
        if config.hard_examples < 1:
            error = error * hardest_cells(error.detach(), config.hard_examples)
        weights = self.scheduler.loss_weights.to(error.device)[inputs.timesteps]  # w(t), [B]
        losses = {"loss": (weights.view(-1, 1, 1, 1) * error).mean(), "error": error.detach().mean()}
        if config.task_loss:
            estimate = self.scheduler.pred_original_sample(output, inputs.noisy_latents, inputs.timesteps)
            with self.autocast():
                # [B, Q, h 2^u, w 2^u], and [B, C + 1, h 2^u, w 2^u] or None
                mask_logits, category_logits = self.recompute(self.mask_vae.decode_latents_both, estimate)
            losses["task"] = self.slot_losses(mask_logits, batch, step, category_logits).total
            losses["loss"] = losses["loss"] + config.task_loss * losses["task"]
        return losses

    def denoiser(self, batch: dict[str, Any]) -> Denoise:
        """The network for a batch's images, and captions, as a sampler calls it."""
        if self.conditioning is None:
            return self.unet
        return with_context(self.unet, self.conditioning, batch["image"], batch.get("captions"))

    def save(self, folder: Path) -> None:
        """Writes the model folder; see `Stage.save`."""
        others = []
        if self.conditioning is not None:
            save_component(folder, "conditioning", *saved_conditioning(self.conditioning))
            others.append("conditioning")
        self.save_networks(folder, others)
        write_model_card(folder, {"stage": "diffusion", "data": self.config.data.root, "config": self.config})


def area_weights(slots: Tensor, size: Sequence[int]) -> Tensor:
    """Weighs latent cells by 1 / area of their segment, float32 [B, 1, h, w], of mean 1 over an image's segments.

    All segments of an image, whose cells are picked from slots [B, H, W] as in `labelled_cells`, weigh the same; void
    cells weigh nothing.
    """
    cells = F.interpolate(slots[:, None].float(), tuple(size), mode="nearest").flatten(1).long()  # [B, h w]
    areas = F.one_hot(cells).sum(1).gather(1, cells)
    weights = torch.where(cells > 0, 1.0 / areas, 0.0)
    labelled = (cells > 0).sum(1, keepdim=True)
    weights = weights * labelled / weights.sum(1, keepdim=True).clamp(min=1e-6)
    return weights.view(len(slots), 1, *size)


def hardest_cells(error: Tensor, share: float) -> Tensor:
    """Picks each image's cells of the largest errors, and weighs them so that the mean is over them alone.

    Source: Shrivastava et al. 2016, "Training region-based object detectors with online hard example mining".

    Args:
        error: float32 [B, C, h, w].
        share: of the cells, above 0; at least one is picked.

    Returns:
        float32 [B, 1, h, w], h w / number of picked cells, or 0.
    """
    of_cells = error.mean(1).flatten(1)  # [B, h w]
    count = max(1, round(share * of_cells.shape[1]))
    picked = torch.zeros_like(of_cells).scatter_(1, of_cells.topk(count).indices, of_cells.shape[1] / count)
    return picked.view(len(error), 1, *error.shape[-2:])


def _with_known(condition: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
    """`condition` [B, C, h, w] with known latents in the cells that are given; `known` is of `known_latents`."""
    return condition if known is None else torch.where(known[1], known[0], condition)
