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
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.models.conditioning import build_conditioning, drop_captions, saved_conditioning, with_context
from ldmseg_fast.training.stages.base import per_image, random_integers, remap
from ldmseg_fast.training.stages.latent import LatentStage, cells_of

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
        super().__init__(resolve_start(self.started(config)))
        self.conditioning = build_conditioning(self.config.unet, self.config.conditioning)

    @classmethod
    def started(cls, config: Config) -> Config:
        """Takes the settings as they are; see `Stage.started`."""
        if config.scheduler.init_noise_sigma != 1:
            raise ConfigError(
                f"scheduler.init_noise_sigma={config.scheduler.init_noise_sigma:g}: stage diffusion learns to denoise, "
                f"so that sampling starts from noise; leave it at 1, or train stage one_step"
            )
        return config

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
            if self.training and self.chance(step, "own_estimate") < self.config.diffusion.own_estimate:
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
        timesteps = random_integers(self.config.scheduler.num_train_timesteps, generators)  # t, [B]
        if self.config.diffusion.image_noise:
            extra = per_image(torch.randn, image_latents.shape[1:], generators).to(image_latents)
            image_latents = image_latents + self.config.diffusion.image_noise * extra
        noisy_latents = self.scheduler.add_noise(mask_latents, noise, timesteps)  # x_t: DDPM, equation 4
        context = self.context_of(batch, step)
        return NoiseInputs(mask_latents, noise, timesteps, noisy_latents, image_latents, context)

    @torch.no_grad()
    def from_own_estimate(self, inputs: NoiseInputs, batch: dict[str, Any], step: int) -> NoiseInputs:
        """Puts the network's own estimate of x_0 in its place in x_t.

        The noise becomes what leads from there to the true x_0, so that the network learns to mend its own errors: the
        rectification of Zhou et al. 2024, arXiv 2312.00210, equation 5, with all of the estimate's error. Where x_0 is
        what is predicted, the input alone changes.
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
        segments = cells_of(remap(batch["segment_ids"], batch["table"]), error.shape[-2:])  # [B, h, w]
        if config.mask_void:
            error = error * (segments > 0)[:, None]
        unweighted = error.detach().mean()
        if self.training and config.area_weights:
            error = error * area_weights(segments)
        if self.training and config.hard_examples < 1:
            error = error * hardest_cells(error.detach(), segments > 0, config.hard_examples)
        weights = self.scheduler.loss_weights.to(error.device)[inputs.timesteps]  # w(t), [B]
        losses = {"loss": (weights.view(-1, 1, 1, 1) * error).mean(), "error": unweighted}
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


def area_weights(segments: Tensor) -> Tensor:
    """Weighs cells by 1 / area of their segment, float32 [B, 1, h, w], of mean 1 over an image's labelled cells.

    All segments of an image that have a cell weigh the same, and void cells nothing.

    Args:
        segments: int64 [B, h, w], below 256, 0 = void.
    """
    cells = segments.flatten(1)  # [B, h w]
    ones = torch.ones(cells.shape, device=cells.device)
    counts = torch.zeros(len(cells), 256, device=cells.device).scatter_add_(1, cells, ones)
    weights = (cells > 0) / counts.gather(1, cells)
    labelled = (cells > 0).sum(1, keepdim=True)
    weights = weights * labelled / weights.sum(1, keepdim=True).clamp(min=1e-6)
    return weights.view(len(segments), 1, *segments.shape[1:])


def hardest_cells(error: Tensor, labelled: Tensor, share: float) -> Tensor:
    """Picks the labelled cells of the largest errors of each image, and weighs them so that they count as all would.

    Source: Shrivastava et al. 2016, "Training region-based object detectors with online hard example mining".

    Args:
        error: float32 [B, C, h, w].
        labelled: bool [B, h, w].
        share: of an image's labelled cells, above 0; at least one is picked.

    Returns:
        float32 [B, 1, h, w]: number of labelled cells / number of picked cells, or 0.
    """
    of_cells = error.mean(1).masked_fill(~labelled, -1.0).flatten(1)  # [B, h w]
    ranks = of_cells.argsort(1, descending=True).argsort(1)
    count = labelled.flatten(1).sum(1, keepdim=True)
    picked = (share * count).round().clamp(min=1)
    weights = torch.where((ranks < picked) & labelled.flatten(1), count / picked, 0.0)
    return weights.view(len(error), 1, *error.shape[-2:])


def _with_known(condition: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
    """`condition` [B, C, h, w] with known latents in the cells that are given; `known` is of `known_latents`."""
    return condition if known is None else torch.where(known[1], known[0], condition)
