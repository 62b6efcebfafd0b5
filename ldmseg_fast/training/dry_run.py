"""`train.py --dry-run`: what a run would be, without data, weights or a step."""

from __future__ import annotations

import json
from typing import Any

from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.init_from import resolve_start
from ldmseg_fast.config import Config, describe
from ldmseg_fast.stages.few_step import started_from_model
from ldmseg_fast.training.deepspeed_settings import deepspeed_config, merge_user_config
from ldmseg_fast.training.estimate import count_parameters, report


def dry_run(stage_name: str, config: Config, user_config: dict[str, Any] | None) -> list[str]:
    """Lines: resolved settings, DeepSpeed's derived configuration, parameters, and memory per rank for ZeRO 0-3.

    Raises:
        ConfigError: settings that contradict a pre-trained folder or the user's DeepSpeed configuration.
    """
    if stage_name in ("one_step", "distillation"):
        config = started_from_model(config)
    if stage_name != "autoencoder" and config.model.init_from:
        config = resolve_start(config).config
    ranks = distributed.world_size()
    counts = count_parameters(stage_name, config)
    derived = deepspeed_config(config, ranks, counts.trainable)
    derived = merge_user_config(derived, user_config or {}, config.train.clip)
    return [
        *describe(config),
        "",
        f"DeepSpeed configuration for {ranks} ranks: {json.dumps(derived, indent=2)}",
        "",
        *report(stage_name, config, ranks),
    ]
