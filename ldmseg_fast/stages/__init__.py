"""What is trained: a stage is models, a loss of a batch, and a validation."""

from ldmseg_fast.stages.autoencoder import AutoencoderStage
from ldmseg_fast.stages.base import Stage
from ldmseg_fast.stages.diffusion import DiffusionStage

STAGES: dict[str, type[Stage]] = {"autoencoder": AutoencoderStage, "diffusion": DiffusionStage}

__all__ = ["STAGES", "AutoencoderStage", "DiffusionStage", "Stage"]
