"""What is trained: a stage is models, a loss of a batch, and a validation."""

from ldmseg_fast.training.stages.autoencoder import AutoencoderStage
from ldmseg_fast.training.stages.base import Stage
from ldmseg_fast.training.stages.diffusion import DiffusionStage
from ldmseg_fast.training.stages.distillation import DistillationStage
from ldmseg_fast.training.stages.one_step import OneStepStage

STAGES: dict[str, type[Stage]] = {
    "autoencoder": AutoencoderStage,
    "diffusion": DiffusionStage,
    "one_step": OneStepStage,
    "distillation": DistillationStage,
}

__all__ = ["STAGES", "AutoencoderStage", "DiffusionStage", "DistillationStage", "OneStepStage", "Stage"]
