"""Derives DeepSpeed's configuration from ours, and merges it with a user's own JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldmseg_fast.config import Config
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.files import read_text

# of a user's file: what our settings decide, and which setting that is
OURS = {
    "optimizer": "train.learning_rate, train.betas and train.weight_decay",
    "scheduler": "train.schedule, train.warmup and train.min_lr",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "activation_checkpointing": "train.checkpointing",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size / train.accumulation / ranks",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer": "train.offload",
    "zero_optimization.offload_param": "train.offload",
}
BUCKET = 50_000_000  # elements that ZeRO reduces or gathers at a time
OFF: tuple[Any, ...] = ({}, None, {"enabled": False})  # sections that change nothing


def deepspeed_config(config: Config, world_size: int, num_elements: int = 0, on_gpu: bool = False) -> dict[str, Any]:
    """Derives DeepSpeed's settings for `world_size` ranks.

    Autocast, loss scaling and the learning rate are the engine's own, so DeepSpeed sees float32 weights and no
    scheduler.

    Args:
        config: the run's.
        world_size: ranks.
        num_elements: trainable parameters; with them its buffers are not larger than the model.
        on_gpu: whether the ranks have GPUs.
    """
    train = config.train
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu and train.zero_stage > 0,
    }
    if train.zero_stage:
        bucket = min(BUCKET, num_elements or BUCKET)
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if train.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // train.accumulation // world_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip if train.zero_stage else 0.0,  # at stage 0 the optimizer clips by itself
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def read_user_config(path: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed JSON file.

    Raises:
        ConfigError: a file that is missing or no JSON object; the message names it.
    """
    try:
        values = json.loads(read_text(path, ConfigError, "JSON"))
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed_config {path}: no JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--deepspeed_config {path}: a JSON object expected")
    return values


def merge_user_config(derived: dict[str, Any], user: dict[str, Any], clip: float) -> dict[str, Any]:
    """Merges `derived` with what `user` adds or tunes; "auto" means ours.

    Raises:
        ConfigError: entries that our settings decide and that say something else, all of them named.
    """
    ours = _flat(derived) | {"gradient_clipping": clip}
    conflicts, merged = [], json.loads(json.dumps(derived))
    for key, value in _flat(user).items():
        rule = next((rule for rule in OURS if key == rule or key.startswith(rule + ".")), None)
        if value == "auto":
            continue
        if rule is None:
            _put(merged, key, value)
        elif ours.get(key) != value and not _is_off(user, rule):
            has = ours.get(key)
            conflicts.append(f"{key} is {value!r} there{'' if has is None else f' and {has!r} here'}: set {OURS[rule]}")
    if conflicts:
        raise ConfigError("--deepspeed_config: " + "; ".join(sorted(set(conflicts))) + ", or leave it out there")
    return merged


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _is_off(user: dict[str, Any], rule: str) -> bool:
    section: Any = user
    for part in rule.split("."):
        section = section.get(part) if isinstance(section, dict) else None
    return section in OFF or (isinstance(section, dict) and section.get("enabled") is False)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        values = values.setdefault(part, {})
    values[last] = value
