"""Every setting of a run: what there is (`settings`), presets, `key=value` overrides, and which go together."""

from ldmseg_fast.config.checks import validate
from ldmseg_fast.config.presets import PRESETS, load_config
from ldmseg_fast.config.settings import (
    ConditioningConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    FewStepConfig,
    ImageEncoderConfig,
    LossConfig,
    MaskVAEConfig,
    ModelConfig,
    PostprocessConfig,
    SchedulerConfig,
    TrainConfig,
    UNetConfig,
)
from ldmseg_fast.config.values import describe, from_dict, to_dict, update

__all__ = [
    "PRESETS",
    "ConditioningConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "FewStepConfig",
    "ImageEncoderConfig",
    "LossConfig",
    "MaskVAEConfig",
    "ModelConfig",
    "PostprocessConfig",
    "SchedulerConfig",
    "TrainConfig",
    "UNetConfig",
    "describe",
    "from_dict",
    "load_config",
    "to_dict",
    "update",
    "validate",
]
