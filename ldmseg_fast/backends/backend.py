"""Says what a backend is, and how it samples where it has nothing faster than DDIM over its own network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.diffusion.sampler import Callback, ddim
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.panoptic.postprocess import PanopticResult


class Backend(Protocol):
    """Runs the three networks of a model.

    Shapes: S the network's side, h w latent cells, M context tokens, Q slots; `info` holds them.

    Attributes:
        info: the model's configuration.
        device: where tensors are expected and returned.
        dtype: of image latents and of the UNet's input.
        conditioning: what makes the context that `denoise` takes, see `models.conditioning`; None where it takes none.
        cache_branches: the skip connections that `caching` can cut the UNet at; 0: this backend caches no features.
    """

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    conditioning: Any
    cache_branches: int

    @property
    def mask_vae(self) -> Any:
        """The mask auto-encoder in PyTorch, a `models.mask_vae.MaskVAE` on `device`."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Encodes pictures: uint8 [B, 3, S, S] -> image latents, `dtype` [B, C_image, h, w]."""
        ...

    def denoise(self, unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Evaluates the UNet once.

        Args:
            unet_input: float [B, C_in, h, w], see `diffusion.sampler.unet_input`.
            timesteps: int64 [B].
            context: float [B, M, D], of models with conditioning.

        Returns:
            The model output, float [B, C, h, w].
        """
        ...

    def caching(self, interval: int, branch: int) -> Callable[..., Tensor]:
        """Returns `denoise` for one sampling loop, with the UNet's deep features kept between calls (DeepCache: Ma et
        al. 2023, arXiv 2312.00858). It takes and returns what `denoise` does, float [B, C, h, w].

        Args:
            interval: the part below the skip connection is computed in each so many calls only.
            branch: the skip connection, 0 the outermost, `cache_branches` - 1 the innermost.

        Raises:
            BackendError: a backend that caches no features.
        """
        ...

    def sample(
        self,
        noise: Tensor,
        image_latents: Tensor,
        scheduler: Scheduler,
        num_inference_steps: int,
        callback: Callback | None = None,
    ) -> Tensor:
        """Computes `diffusion.sampler.ddim` over `denoise` without context, in this backend's fastest form.

        Args:
            noise: x_T, float32 [B, C, h, w].
            image_latents: `dtype` [B, C_image, h, w].
            scheduler: alphas, timesteps and prediction type.
            num_inference_steps: evaluations of the UNet.
            callback: see `diffusion.sampler.Callback`.

        Returns:
            The last estimate of x_0, scaled mask latents float32 [B, C, h, w].
        """
        ...

    def decode_mask(
        self,
        latents: Tensor,
        size: tuple[int, int],
        output: str = "panoptic",
        thresholds: PostprocessConfig | None = None,
        *,
        fuse: bool = True,
    ) -> list[PanopticResult] | Tensor:
        """Decodes scaled mask latents.

        The latents' scale is undone, the decoder makes slot logits [B, Q, h 2^u, w 2^u], two bilinear resizings take
        them to [B, Q, S, S] and to [B, Q, H, W], and argmax and thresholds make maps (arXiv 2401.10227, section 3.3).

        Args:
            latents: float32 [B, C, h, w].
            size: (H, W) in pixels.
            output: "panoptic", or "logits" for those of size [B, Q, H, W].
            thresholds: default the model's own.
            fuse: whether stuff of one category becomes one segment; of models with categories.

        Returns:
            "panoptic": a PanopticResult per image. "logits": float32 [B, Q, H, W].

        Raises:
            BackendError: an output that this backend's graphs were exported without.
        """
        ...

    def segment(
        self,
        images: Tensor,
        noise: Tensor,
        num_inference_steps: int,
        size: tuple[int, int],
        thresholds: PostprocessConfig | None = None,
    ) -> list[PanopticResult] | None:
        """Does `encode_image`, `sample` and `decode_mask` in one launch; None where this backend does not, or not yet.

        Args:
            images: uint8 [B, 3, S, S].
            noise: x_T, float32 [B, C, h, w].
            num_inference_steps: evaluations of the UNet, by the model's own schedule.
            size: (H, W) in pixels, of all maps.
            thresholds: default the model's own.

        Returns:
            A PanopticResult per image.

        Raises:
            NonFiniteError: a network's output is not finite.
        """
        ...

    def close(self) -> None:
        """Waits for calls under way, then frees graphs, engines and buffers. The backend takes no calls after it."""
        ...


class DdimBackend(ABC):
    """Samples with a backend's own loop where that can do what is asked for, else with `ddim` over its `denoise`."""

    info: ModelInfo

    @abstractmethod
    def denoise(self, unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Backend.denoise`."""

    @abstractmethod
    def _own_loop(self, noise: Tensor, image_latents: Tensor, num_inference_steps: int) -> Tensor | None:
        """Samples by the model's own schedule; None where this backend has no loop of its own."""

    def segment(
        self,
        images: Tensor,
        noise: Tensor,
        num_inference_steps: int,
        size: tuple[int, int],
        thresholds: PostprocessConfig | None = None,
    ) -> list[PanopticResult] | None:
        """See `Backend.segment`; None."""
        return None

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor,
        image_latents: Tensor,
        scheduler: Scheduler,
        num_inference_steps: int,
        callback: Callback | None = None,
    ) -> Tensor:
        """See `Backend.sample`."""
        if callback is None and scheduler.config == self.info.scheduler:
            latents = self._own_loop(noise, image_latents, num_inference_steps)
            if latents is not None:
                return latents
        self_condition = self.info.self_condition
        return ddim(self.denoise, noise, image_latents, scheduler, num_inference_steps, self_condition, callback)
