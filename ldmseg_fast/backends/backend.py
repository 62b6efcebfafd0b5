"""The face of a backend, and how one is found by name."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.diffusion.sampler import Callback
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.panoptic.postprocess import PanopticResult


class Backend(Protocol):
    """Runs the three networks of a model; `sample` is the loop over `denoise`.

    Attributes:
        info: the model's configuration.
        device: where tensors are expected and returned.
        dtype: of image latents and of the UNet's input.
        conditioning: what makes the context that `denoise` takes, see `models.conditioning`; None where it takes none.
    """

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    conditioning: Any

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> image latents [B, C_image, h, w]."""
        ...

    def denoise(self, unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Network input [B, C_in, h, w], timesteps [B] (, context [B, M, D]) -> model output [B, C, h, w]."""
        ...

    def sample(
        self,
        noise: Tensor,
        image_latents: Tensor,
        scheduler: Scheduler,
        num_inference_steps: int,
        callback: Callback | None = None,
    ) -> Tensor:
        """`diffusion.sampler.ddim` over `denoise`, in this backend's fastest form: noise [B, C, h, w] -> x_0."""
        ...

    def decode_mask(
        self,
        latents: Tensor,
        size: tuple[int, int],
        output: str = "panoptic",
        thresholds: PostprocessConfig | None = None,
    ) -> list[PanopticResult] | Tensor:
        """Scaled mask latents [B, C, h, w] -> panoptic maps at `size` (H, W), or with output="logits" the slot logits
        [B, Q, H, W], both bilinear resizings done."""
        ...
