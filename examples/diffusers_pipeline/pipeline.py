"""A model folder as a pipeline of diffusers.

DiffusionPipeline.from_pretrained(MODEL_DIR, custom_pipeline="examples/diffusers_pipeline", trust_remote_code=True)

diffusers runs this file, so it asks for `trust_remote_code`. It finds none of its own components in a model folder, and
tells so; the networks are loaded by `LDMSegPipeline` when they are first used.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ldmseg_fast import LDMSegPipeline


class LDMSegDiffusersPipeline(DiffusionPipeline):
    """Calls `LDMSegPipeline`, and takes and returns what that does."""

    def __init__(self) -> None:
        super().__init__()
        self._target: torch.device | None = None
        self._loaded: LDMSegPipeline | None = None

    def to(self, device: str | torch.device) -> LDMSegDiffusersPipeline:  # type: ignore[override]
        """Chooses the device; the networks are loaded there when they are used."""
        self._target, self._loaded = torch.device(device), None
        return self

    def __call__(self, images: Any, *args: Any, **settings: Any) -> Any:
        """Segments images; see `LDMSegPipeline.__call__`."""
        if self._loaded is None:
            self._loaded = LDMSegPipeline.from_pretrained(self.config._name_or_path, device=self._target)
        return self._loaded(images, *args, **settings)
