"""Turns pictures and noise into mask latents and maps: a backend's networks under any solver."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmseg_fast.backends.backend import Backend
from ldmseg_fast.backends.finite import all_finite, require_finite, require_sampled
from ldmseg_fast.checkpoints.schema import ModelIndex, checked, read_settings
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.transforms import resize_image
from ldmseg_fast.diffusion.sampler import Callback, Denoise, image_noise, seed_of
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.diffusion.solvers import Constraint, Timesteps, check_solver, sample, solver_timesteps
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.edges import follow_edges
from ldmseg_fast.inference.inputs import MAX_SEED, check_count
from ldmseg_fast.models.conditioning import with_context
from ldmseg_fast.panoptic.postprocess import PanopticResult, postprocess

MAX_STEPS = 1_000_000  # no schedule is longer


@dataclass(frozen=True)
class Sampling:
    """Says how one call samples: names as in `diffusion.solvers.sample` and `LDMSegPipeline.__call__`."""

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
    """Does the steps from pictures and noise to maps that every use of a model shares.

    `LDMSegPipeline.__call__` shows them in order. Shapes: H W a picture's own size, S the network's side, h w latent
    cells.

    Attributes:
        backend: runs the networks.
        info: the model's configuration.
        scheduler: of the model, on the backend's device.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.info = backend.info
        self.scheduler = Scheduler(self.info.scheduler).to(backend.device)

    def at_scale(self, scale: float) -> MaskSampler:
        """Returns a sampler of the same networks for pictures whose side is about `scale` times the model's own.

        Raises:
            ArgumentError: a backend of graphs, which have one size.
        """
        if not self.backend.cache_branches:
            raise ArgumentError(f"scales: {scale} besides 1, and graphs have one size; use backend=torch")
        multiple = self.info.size_multiple
        backend: Any = copy.copy(self.backend)
        backend.info = self.info.at_size(max(1, round(self.info.image_size * scale / multiple)) * multiple)
        return MaskSampler(backend)

    def settings(self, num_inference_steps: int | None, **settings: Any) -> Sampling:
        """Makes a Sampling and checks it before any work; steps default to the model's own.

        Raises:
            ArgumentError: what the solver, the schedule or the backend cannot do.
        """
        steps = self.info.num_inference_steps if num_inference_steps is None else num_inference_steps
        sampling = Sampling(steps, **settings)
        check_count("num_inference_steps", steps, 1, MAX_STEPS)  # the schedule says more of its own end
        check_count("seed", sampling.seed, 0, MAX_SEED)
        check_count("cache_interval", sampling.cache_interval, 1, MAX_STEPS)  # 1 caches nothing
        check_count("cache_branch", sampling.cache_branch, 0, MAX_STEPS)
        if sampling.callback is not None and not callable(sampling.callback):
            raise ArgumentError(f"callback={sampling.callback!r}: a function expected; see diffusion.sampler.Callback")
        if isinstance(sampling.eta, bool) or not isinstance(sampling.eta, (int, float, np.integer, np.floating)):
            raise ArgumentError(f"eta={sampling.eta!r}: a number from 0 to 1 expected")
        if sampling.timesteps is not None and not isinstance(sampling.timesteps, str):
            if not isinstance(sampling.timesteps, Iterable):
                raise ArgumentError(f"timesteps={sampling.timesteps!r}: trailing, leading or a list expected")
            sampling = replace(sampling, timesteps=list(sampling.timesteps))
            for time in sampling.timesteps or ():
                check_count("timesteps", time, 0, MAX_STEPS)
        check_solver(sampling.solver, sampling.eta)
        solver_timesteps(self.scheduler, sampling.solver, steps, sampling.timesteps)
        interval, branch, branches = sampling.cache_interval, sampling.cache_branch, self.backend.cache_branches
        if interval > 1 and not branches:
            raise ArgumentError(f"cache_interval={interval}: graphs have no such option; use backend=torch")
        if interval > 1 and not 0 <= branch < branches:
            raise ArgumentError(f"cache_branch={branch}: from 0 to {branches - 1}, the skip connections of this UNet")
        return sampling

    def noise(self, seed: int, image_ids: Sequence[int | str]) -> Tensor:
        """Draws x_T, float32 [B, C, h, w], on the CPU, so that a seed means the same on every device."""
        return image_noise(seed, image_ids, self.info.latent_shape, self.info.scheduler.init_noise_sigma)

    def step_noise(self, seed: int, image_ids: Sequence[int | str], purpose: str, step: int) -> Tensor:
        """Draws the noise of one step, float32 [B, C, h, w] on the CPU, each image's its own too."""
        return image_noise(seed_of(seed, purpose, step), image_ids, self.info.latent_shape)

    def resize(self, pictures: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Resizes pictures, uint8 [H, W, 3] or Pillow's in RGB, to uint8 [B, 3, P, P] on the backend's device.

        P is the side of the pictures that the image encoder sees: `ModelInfo.picture_size`.
        """
        pixels = np.stack([resize_image(picture, self.info.picture_size) for picture in pictures])  # [B, P, P, 3]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.backend.device)

    def network(self, pixels: Tensor, sampling: Sampling, captions: Sequence[str] | None = None) -> Denoise:
        """Returns the UNet as one sampling loop calls it.

        Its context [B, M, D] is fixed: none, trained queries, or CLIP's tokens of the picture or the caption. It keeps
        deep features between calls where `sampling` says so.

        Args:
            pixels: uint8 [B, 3, S, S].
            sampling: `cache_interval` and `cache_branch`.
            captions: one per picture.

        Returns:
            (unet_input [B, C_in, h, w], timesteps [B]) -> model output [B, C, h, w].
        """
        denoise: Callable[..., Tensor] = self.backend.denoise
        if sampling.cache_interval > 1:
            denoise = self.backend.caching(sampling.cache_interval, sampling.cache_branch)
        if self.info.conditioning == "none":
            return denoise
        return with_context(denoise, self.backend.conditioning, pixels, captions)

    def denoise(
        self,
        network: Denoise,
        noise: Tensor,
        image_latents: Tensor,
        image_ids: Sequence[int | str],
        sampling: Sampling,
        constraint: Constraint | None = None,
    ) -> Tensor:
        """Runs the solver from noise to mask latents, with the backend's own loop where that does the same.

        Args:
            network: what `network` returned for this loop.
            noise: x_T, float32 [B, C, h, w].
            image_latents: [B, C_image, h, w].
            image_ids: from which, with the seed, the noise of eta > 0 comes.
            sampling: solver, steps, timesteps, seed and callback.
            constraint: what is known of x_0.

        Returns:
            Scaled mask latents, float32 [B, C, h, w].

        Raises:
            NonFiniteError: latents that are NaN or infinite; it names the network that made them so.
        """
        noise = noise.to(self.backend.device)
        steps = sampling.num_inference_steps
        if sampling.is_plain and constraint is None and self.info.conditioning == "none":
            mask_latents = self.backend.sample(noise, image_latents, self.scheduler, steps, sampling.callback)
        else:
            mask_latents = sample(
                network,
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
        require_sampled(
            all_finite(mask_latents),
            lambda: all_finite(image_latents),
            lambda: all_finite(noise),
            self.info,
            self.backend.dtype,
        )
        return mask_latents

    def segment(
        self,
        pixels: Tensor,
        noise: Tensor,
        sizes: Sequence[tuple[int, int]],
        sampling: Sampling,
        thresholds: PostprocessConfig | None,
    ) -> list[PanopticResult] | None:
        """Encodes, samples and decodes at once, where the backend does all of it in one launch; None where it does not.

        Args:
            pixels: uint8 [B, 3, S, S].
            noise: x_T, float32 [B, C, h, w].
            sizes: (H, W) of each picture.
            sampling, thresholds: as in `denoise` and `decode`.

        Returns:
            A PanopticResult per picture, whose segmentation is int32 [H, W].

        Raises:
            NonFiniteError: see `denoise`.
        """
        plain = sampling.is_plain and sampling.callback is None and self.info.conditioning == "none"
        if not plain or len(set(sizes)) != 1 or self.scheduler.config != self.info.scheduler:
            return None
        steps = sampling.num_inference_steps
        return self.backend.segment(pixels, noise.to(self.backend.device), steps, sizes[0], thresholds)

    def decode(
        self,
        mask_latents: Tensor,
        sizes: Sequence[tuple[int, int]],
        thresholds: PostprocessConfig | None,
        *,
        fuse: bool = True,
    ) -> list[PanopticResult]:
        """Decodes mask latents to maps at each picture's own size; pictures of one size are decoded together.

        Args:
            mask_latents: scaled, float32 [B, C, h, w].
            sizes: (H, W) of each picture.
            thresholds: default the model's own.
            fuse: whether stuff of one category becomes one segment.

        Returns:
            A PanopticResult per picture, in their order, whose segmentation is int32 [H, W].
        """
        results: dict[int, PanopticResult] = {}
        for size in dict.fromkeys(sizes):
            rows = [row for row, other in enumerate(sizes) if other == size]
            decoded = self.backend.decode_mask(mask_latents[rows], size, "panoptic", thresholds, fuse=fuse)
            results.update(zip(rows, decoded))
        return [results[row] for row in range(len(sizes))]

    def logits(self, mask_latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decodes scaled mask latents, float32 [B, C, h, w], in PyTorch whatever the backend.

        Returns:
            Logits of slots, float [B, Q, h 2^u, w 2^u], and of categories, float [B, C + 1, ...]; None without any.

        Raises:
            NonFiniteError: logits that are NaN or infinite.
        """
        slots, categories = self.backend.mask_vae.decode_latents_both(mask_latents.to(self.backend.device))
        finite = all_finite(slots) if categories is None else all_finite(slots) & all_finite(categories)
        require_finite(finite, "mask_vae: slot or category logits", self.info, slots.dtype)
        return slots, categories

    def maps(
        self,
        slots: Tensor,
        categories: Tensor | None,
        sizes: Sequence[tuple[int, int]],
        thresholds: PostprocessConfig | None,
        edges: int,
        pictures: Tensor,
        *,
        fuse: bool = True,
    ) -> list[PanopticResult]:
        """Makes maps of logits; their edges follow those of the pictures.

        Args:
            slots, categories: of B pictures, of the shapes that `logits` gives; slots float32 where edges are followed.
            sizes, thresholds, fuse: as in `decode`.
            edges: radius of the windows, see `inference.edges`; 0: edges are as they are.
            pictures: uint8 [B, 3, P, P].

        Returns:
            A PanopticResult per picture, in their order, whose segmentation is int32 [H, W].
        """
        info, results = self.info, []
        chosen = thresholds or info.postprocess
        count = 1 if edges else len(sizes)  # slots of a filtered picture are four times as large
        for begin in range(0, len(sizes), count):
            rows = slice(begin, begin + count)
            some, named = slots[rows], None if categories is None else categories[rows]
            if edges:
                some = follow_edges(some, pictures[rows], edges)
            height, width = (max(info.image_size, each) for each in some.shape[-2:])
            results += postprocess(some, (height, width), sizes[rows], chosen, named, info.categories, fuse=fuse)
        return results

    @property
    def id_assignment(self) -> str:
        """How training assigned slots to segments: of the index, or of the run's own settings beside it."""
        if "id_assignment" in self.info.index:
            return self.info.index["id_assignment"]
        path = self.info.folder / "config.json"
        data = read_settings(path).get("data") if path.exists() else None
        name = data.get("id_assignment") if isinstance(data, dict) else None
        return checked(ModelIndex, {"id_assignment": name}, str(path))["id_assignment"] or "random"
