"""Defines what is trained: a stage holds networks, the loss of a batch, a prediction to validate, and how to save.

`base` is the interface that the loop sees. `latent` adds the networks around the denoiser, for `diffusion` and for
`few_step`, which `one_step` and `distillation` build on. Stages import the losses, and nothing else of `training`.
"""

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
