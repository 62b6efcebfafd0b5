"""Progressive distillation: N sampling steps learn what M > N steps of the same model do (Salimans & Ho 2022).

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
from ldmseg_fast.training.stages.base import per_image, remap
from ldmseg_fast.training.stages.few_step import FewStepStage, ddim_update


class DistillationStage(FewStepStage):
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

    def train(self, mode: bool = True) -> DistillationStage:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        device, slots = batch["segment_ids"].device, remap(batch["segment_ids"], batch["table"])
        times, previous = (torch.tensor(values, device=device) for values in self.step_times())
        with self.autocast():
            with torch.no_grad():
                bits = self.mask_bits(batch["segment_ids"], batch["table"])
                mask_latents = self.mask_vae.encode_latents(bits).float()  # [B, C, h, w]
            image_latents = self.image_latents(batch)  # [B, C_image, h, w]
            generators = self.generators(step, batch, self.name)
            noise = per_image(torch.randn, mask_latents.shape[1:], generators)  # [B, C, h, w]
            index = torch.cat([torch.randint(0, len(times), (1,), generator=g, device=device) for g in generators])
            time, next_time = times[index], previous[index]  # [B]
            first = (index == 0).view(-1, 1, 1, 1)
            noisy_latents = torch.where(first, noise, self.scheduler.add_noise(mask_latents, noise, time))

            target = self.teach(batch, noisy_latents, image_latents, time, next_time, first)
            condition = None
            if self.self_condition:
                condition = torch.zeros_like(noisy_latents)
                if len(times) > 1:
                    with torch.no_grad():
                        own = self.estimate(noisy_latents, image_latents, time, condition)
                    condition = torch.where(first, condition, own)
            estimate = self.estimate(noisy_latents, image_latents, time, condition)

        error = F.mse_loss(estimate, target, reduction="none")  # [B, C, h, w]
        if self.config.diffusion.mask_void:
            error = error * (F.interpolate(slots[:, None].float(), error.shape[-2:], mode="nearest") > 0)
        signal = self.alpha(time, error)
        loss = ((signal / (1.0 - signal)).clamp(min=1.0) * error).mean()
        return {"loss": loss, "error": error.detach().mean()}

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
        """x~, [B, C, h, w]: what one step from z_t [B, C, h, w] has to estimate to end where the teacher's steps do.

        time, next_time: t and s, int64 [B]; s is negative in the sampler's last step. first: bool [B, 1, 1, 1], whether
        t is the sampler's first.
        """
        if self.trains_image_vae:
            image_latents = self.teacher["image_vae"](batch["image"].contiguous(memory_format=torch.channels_last))
        span = time - next_time  # [B]
        latents, now = noisy_latents, time
        condition = torch.zeros_like(latents) if self.self_condition else None
        if condition is not None and not bool(first.all()):
            own = self.estimate(latents, image_latents, now, condition, self.teacher["unet"])
            condition = torch.where(first, condition, own)
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
