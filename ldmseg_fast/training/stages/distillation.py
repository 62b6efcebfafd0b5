"""Teaches N sampling steps what M > N steps of the same model do: progressive distillation (Salimans & Ho 2022).

One run is one round of their algorithm 2; `model.init_from` of the next run is this run's MODEL_DIR, and
16 -> 8 -> 4 -> 2 -> 1 takes four. With z_t = alpha_t x + sigma_t e, a student's step from t to s, and k = M / N DDIM
steps of the teacher between them that end in z_s, the student's x_0 is to be the one whose single step ends there too:

    x~   = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)      algorithm 2, for any k
    loss = max(alpha_t^2 / sigma_t^2, 1) |x_student(z_t, t) - x~|^2                       their "truncated SNR"

In the last of the N steps the sampler returns its estimate itself, and so x~ is the teacher's last estimate. In the
first, z_t is pure noise, because that is where sampling starts, and the condition is zero; in the others z_t is the
noised annotation and the condition each network's own estimate, as in training.

Why this and not consistency distillation (Song et al. 2023): the student is sampled by the very DDIM steps that the
pipeline, the exported graphs and the engines run, where multi-step consistency sampling draws fresh noise at every
step; an x_0 prediction needs no boundary parametrisation; and the teacher is the only second network, with no moving
target to tune.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.config import Config
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.training.stages.base import per_image, random_integers, remap
from ldmseg_fast.training.stages.few_step import FewStepStage, ddim_update
from ldmseg_fast.training.stages.latent import cells_of


class DistillationStage(FewStepStage):
    """Trains a copy of the model in `model.init_from` to do with fewer steps; see the module's docstring.

    Arguments and errors as `FewStepStage`'s; ConfigError also for numbers of steps that do not divide, for
    `diffusion.inpainting`, and for ZeRO 3.
    """

    name = "distillation"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        few_step, train = self.config.few_step, self.config.train
        if self.config.diffusion.inpainting:
            raise ConfigError(
                "diffusion.inpainting: distillation does not train it; distil first, then train stage one_step with it"
            )
        self.substeps, remainder = divmod(few_step.teacher_steps or 2 * few_step.steps, few_step.steps)
        total = self.config.scheduler.num_train_timesteps
        if remainder or not 2 <= self.substeps <= total // few_step.steps:
            raise ConfigError(
                f"few_step.teacher_steps={few_step.teacher_steps}: a multiple of few_step.steps={few_step.steps}, at "
                f"least twice and at most {total // few_step.steps} times as many, expected"
            )
        if train.zero_stage == 3:
            raise ConfigError("distillation runs two networks in turn, which ZeRO 3 does not shard: train.zero_stage=2")
        networks = {"unet": self.unet, "image_vae": self.image_vae}
        self.teacher = nn.ModuleDict({name: copy.deepcopy(network) for name, network in networks.items()})
        self.teacher.eval().requires_grad_(False)

    @classmethod
    def started(cls, config: Config) -> Config:
        """Puts into `config` what the teacher fixes. Errors as the class's."""
        if config.few_step.new_autoencoder:
            raise ConfigError("few_step.new_autoencoder: a teacher's latents are its own; train stage one_step with it")
        return super().started(config)

    def train(self, mode: bool = True) -> DistillationStage:
        """Puts what is trained into training mode; the teacher and what is frozen stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Gives the float32 scalars `loss` and `error` (its unweighted mean); see `Stage.forward`."""
        slots = remap(batch["segment_ids"], batch["table"])  # [B, H, W]
        times, previous = (torch.tensor(values, device=slots.device) for values in self.step_times())  # [N]
        with self.autocast():
            mask_latents = self.mask_latents(batch)  # x, [B, C, h, w]
            image_latents = self.image_latents(batch)  # [B, C_image, h, w]
            generators = self.generators(step, batch, self.name)
            noise = per_image(torch.randn, mask_latents.shape[1:], generators)  # e, [B, C, h, w]
            index = random_integers(len(times), generators)  # [B]
            time, next_time, first = times[index], previous[index], (index == 0).view(-1, 1, 1, 1)
            start = noise * self.config.scheduler.init_noise_sigma
            noisy_latents = torch.where(first, start, self.scheduler.add_noise(mask_latents, noise, time))  # z_t

            target = self.teach(batch, noisy_latents, image_latents, time, next_time, first)  # x~, [B, C, h, w]
            condition = self.condition_of(noisy_latents, image_latents, time, first, self.unet)
            estimate = self.estimate(noisy_latents, image_latents, time, condition)  # [B, C, h, w]

        error = F.mse_loss(estimate, target, reduction="none")  # [B, C, h, w]
        if self.config.diffusion.mask_void:
            error = error * (cells_of(slots, error.shape[-2:]) > 0)[:, None]
        signal = self.alpha(time, error)  # alpha_t^2, [B, 1, 1, 1]
        loss = ((signal / (1.0 - signal)).clamp(min=1.0) * error).mean()
        return {"loss": loss, "error": error.detach().mean()}

    @torch.no_grad()
    def condition_of(
        self, noisy_latents: Tensor, image_latents: Tensor, time: Tensor, first: Tensor, network: Any
    ) -> Tensor | None:
        """Gives a network's condition float32 [B, C, h, w] at z_t.

        It is zero in the sampler's first step, else the network's own estimate. None where the network has no channels
        for a condition. Arguments as `teach` has them.
        """
        if not self.self_condition:
            return None
        condition = torch.zeros_like(noisy_latents)
        if self.config.few_step.steps == 1:
            return condition
        own = self.estimate(noisy_latents, image_latents, time, condition, network)
        return torch.where(first, condition, own)

    @torch.no_grad()
    def teach(
        self,
        batch: dict[str, Any],
        noisy_latents: Tensor,
        image_latents: Tensor,
        time: Tensor,
        next_time: Tensor,
        first: Tensor,
    ) -> Tensor:
        """Computes x~: what one step from z_t has to estimate to end where the teacher's steps do.

        Args:
            batch: as `Stage` has it.
            noisy_latents: z_t, float32 [B, C, h, w].
            image_latents: [B, C_image, h, w], of the encoder in training; the teacher's own where that is trained.
            time, next_time: t and s, int64 [B]; s is negative in the sampler's last step.
            first: bool [B, 1, 1, 1], whether t is the sampler's first.

        Returns:
            float32 [B, C, h, w].
        """
        if self.trains_image_vae:
            image_latents = self.teacher["image_vae"](batch["image"].contiguous(memory_format=torch.channels_last))
        span = time - next_time  # [B]
        latents, now = noisy_latents, time
        condition = self.condition_of(latents, image_latents, now, first, self.teacher["unet"])
        estimate = noisy_latents
        for substep in range(1, self.substeps + 1):
            estimate = self.estimate(latents, image_latents, now, condition, self.teacher["unet"])
            after = time - span * substep // self.substeps
            latents = ddim_update(latents, estimate, self.alpha(now, latents), self.alpha(after, latents))
            now, condition = after, estimate if self.self_condition else None
        alpha, next_alpha = self.alpha(time, latents), self.alpha(next_time, latents)
        ratio = ((1.0 - next_alpha) / (1.0 - alpha)).sqrt()
        student = (latents - ratio * noisy_latents) / (next_alpha.sqrt() - ratio * alpha.sqrt())
        return torch.where((next_time < 0).view(-1, 1, 1, 1), estimate, student)
