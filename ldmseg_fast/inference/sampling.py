"""Pictures and noise -> mask latents -> maps: a backend's networks under any solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmseg_fast.backends.backend import Backend
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.transforms import resize_image
from ldmseg_fast.diffusion.sampler import Callback, image_noise, seed_of
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.diffusion.solvers import Constraint, Timesteps, check_solver, sample, solver_timesteps
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import read_json
from ldmseg_fast.models.conditioning import with_context
from ldmseg_fast.panoptic.postprocess import PanopticResult


@dataclass(frozen=True)
class Sampling:
    """How one call samples: names as in `diffusion.solvers.sample` and `LDMSegPipeline.__call__`."""

    num_inference_steps: int
    solver: str = "ddim"
    eta: float = 0.0
    timesteps: Timesteps = None
    seed: int = 0
    callback: Callback | None = None
    cache_interval: int = 1
    cache_branch: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether this is what `Backend.sample` does."""
        return self.solver == "ddim" and self.eta == 0 and self.timesteps is None and self.cache_interval == 1


class MaskSampler:
    """What every use of a model shares.

    Attributes:
        backend: runs the networks.
        info: the model's configuration.
        scheduler: of the model, on the backend's device.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.info = backend.info
        self.scheduler = Scheduler(self.info.scheduler).to(backend.device)
        self._mask_vae: Any = None

    def settings(self, num_inference_steps: int | None, **settings: Any) -> Sampling:
        """Checked before any work. Raises ArgumentError for what the solver, the schedule or the backend cannot do."""
        steps = self.info.num_inference_steps if num_inference_steps is None else num_inference_steps
        sampling = Sampling(steps, **settings)
        check_solver(sampling.solver, sampling.eta)
        solver_timesteps(self.scheduler, sampling.solver, steps, sampling.timesteps)
        interval, branch = sampling.cache_interval, sampling.cache_branch
        if interval < 1:
            raise ArgumentError(f"cache_interval={interval}: at least 1, which caches nothing")
        if interval > 1:
            backend: Any = self.backend
            if not hasattr(backend, "caching"):
                raise ArgumentError(f"cache_interval={interval}: graphs have no such option; use backend=torch")
            skips = backend.unet.num_skips
            if not 0 <= branch < skips:
                raise ArgumentError(f"cache_branch={branch}: from 0 to {skips - 1}, the skip connections of this UNet")
        return sampling

    def noise(self, seed: int, image_ids: Sequence[int | str]) -> Tensor:
        """x_T, [B, C, h, w], on the CPU, so that a seed means the same on every device."""
        return image_noise(seed, image_ids, self.info.latent_shape)

    def step_noise(self, seed: int, image_ids: Sequence[int | str], purpose: str, step: int) -> Tensor:
        """Noise [B, C, h, w] of one step, each image's its own too."""
        return image_noise(seed_of(seed, purpose, step), image_ids, self.info.latent_shape)

    def latents(
        self,
        arrays: Sequence[np.ndarray],
        noise: Tensor,
        image_ids: Sequence[int | str],
        sampling: Sampling,
        captions: Sequence[str] | None = None,
        constraint: Constraint | None = None,
    ) -> Tensor:
        """Scaled mask latents [B, C, h, w] of a batch of pictures uint8 [H, W, 3]: the pipeline's steps 3 to 5."""
        # 3. Pictures at the network's size
        pixels = np.stack([resize_image(array, self.info.image_size) for array in arrays])  # [B, S, S, 3]
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.backend.device)  # [B, 3, S, S]

        # 4. Image latents
        image_latents = self.backend.encode_image(inputs)  # [B, C_image, h, w]

        # 5. Denoise
        noise = noise.to(self.backend.device)
        steps = sampling.num_inference_steps
        conditioned = self.info.conditioning != "none"
        if sampling.is_plain and constraint is None and not conditioned:
            return self.backend.sample(noise, image_latents, self.scheduler, steps, sampling.callback)
        backend: Any = self.backend
        denoise: Any = backend.denoise
        if sampling.cache_interval > 1:
            denoise = backend.caching(sampling.cache_interval, sampling.cache_branch)
        if conditioned:
            denoise = with_context(denoise, backend.conditioning, inputs, captions)
        return sample(
            denoise,
            noise,
            image_latents,
            self.scheduler,
            steps,
            self.info.self_condition,
            sampling.callback,
            solver=sampling.solver,
            eta=sampling.eta,
            timesteps=sampling.timesteps,
            step_noise=partial(self.step_noise, sampling.seed, image_ids, "step"),
            constraint=constraint,
        )

    def decode(
        self, mask_latents: Tensor, sizes: list[tuple[int, int]], thresholds: PostprocessConfig | None
    ) -> list[PanopticResult]:
        """Maps at each image's own size; images of one size are decoded together."""
        results: dict[int, PanopticResult] = {}
        for size in dict.fromkeys(sizes):
            rows = [row for row, other in enumerate(sizes) if other == size]
            decoded = self.backend.decode_mask(mask_latents[rows], size, "panoptic", thresholds)
            results.update(zip(rows, decoded))
        return [results[row] for row in range(len(sizes))]

    @property
    def mask_vae(self) -> Any:
        """The mask auto-encoder in PyTorch, on the backend's device: backends of graphs hold its decoder only."""
        own = getattr(self.backend, "mask_vae", None)
        if own is None and self._mask_vae is None:
            self._mask_vae = load_component(self.info.folder, "mask_vae").to(self.backend.device)
        return self._mask_vae if own is None else own

    @property
    def id_assignment(self) -> str:
        """How training assigned slots to segments: of the index, or of the run's own settings beside it."""
        if "id_assignment" in self.info.index:
            return self.info.index["id_assignment"]
        settings = self.info.folder / "config.json"
        return read_json(settings)["data"]["id_assignment"] if settings.is_file() else "random"
