"""The face that the training loop sees."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast.config import Config
from ldmseg_fast.diffusion.sampler import seed_of
from ldmseg_fast.panoptic import PanopticResult

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stage(nn.Module, abc.ABC):
    """One stage of training. Its `forward` is the loss, so that DeepSpeed can wrap it.

    A batch holds image uint8 [B, 3, S, S], segment_ids uint8 [B, S, S] numbered 1..n, table [B, 256] from those numbers
    to slots, and image_id, a list of B.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Scalars; "loss" is what is minimised. Random numbers depend on (seed, step, image ids) alone."""

    @abc.abstractmethod
    def predict(self, batch: dict[str, Any], target_sizes: Sequence[tuple[int, int]]) -> list[PanopticResult]:
        """Panoptic maps of a validation batch, at `target_sizes`."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Components and index into the model folder."""

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        dtype = PRECISIONS[self.config.train.precision]
        device = next(self.parameters()).device.type
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
            yield

    def generator(self, step: int, image_ids: Sequence[int], purpose: str) -> torch.Generator:
        """Random numbers of this step and these images, the same after a resume."""
        return torch.Generator().manual_seed(seed_of(self.config.train.seed, purpose, step, *map(int, image_ids)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Decay for matrices and convolutions, none for norms, biases and embeddings; learning-rate factors."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            decay = self.config.train.weight_decay if parameter.ndim > 1 else 0.0
            factor = self.config.train.image_encoder_lr if name.startswith("image_vae.") else 1.0
            groups.setdefault((decay, factor), []).append(parameter)
        return [
            {"params": parameters, "weight_decay": decay, "lr_factor": factor}
            for (decay, factor), parameters in groups.items()
        ]


def remap(segment_ids: Tensor, table: Tensor) -> Tensor:
    """Slots of dense ids: segment_ids [B, H, W] through table [B, T], int64 [B, H, W]."""
    return table.long().gather(1, segment_ids.flatten(1).long()).view(segment_ids.shape)
