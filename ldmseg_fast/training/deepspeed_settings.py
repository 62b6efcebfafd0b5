"""Derives DeepSpeed's configuration from ours, and merges it with a user's own JSON."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ldmseg_fast.config import Config
from ldmseg_fast.config.values import shown
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.files import read_text, without_repeats

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
# of a user's file: what DeepSpeed reads; it ignores a name that it does not know, without a word
SECTIONS = {
    *("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "torch_autocast", "amp", "activation_checkpointing"),
    *("zero_optimization", "aio", "autotuning", "flops_profiler", "sparse_attention", "data_efficiency"),
    *("curriculum_learning", "tensorboard", "wandb", "csv_monitor", "comet", "elasticity", "comms_logger"),
    *("compression_training", "checkpoint", "data_types", "nebula", "datastates_ckpt", "hybrid_engine", "pipeline"),
    *("eigenvalue", "progressive_layer_drop", "quantize_training", "tensor_parallel", "expert_parallel", "compile"),
    *("timers", "weight_quantization", "monitor_config", "zenflow"),
}
VALUES = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "communication_data_type"),
    *("seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather", "disable_python_gc"),
    *("dataloader_drop_last", "graph_harvesting", "use_data_before_expert_parallelism", "vocabulary_size"),
    *("gradient_allreduce_op", "managed_gradient_accumulation"),
}
ZERO = {
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights"),
    *("elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param"),
    *("cpu_offload_use_pin_memory", "cpu_offload", "prefetch_bucket_size", "stage3_prefetch_bucket_size"),
    *("param_persistence_threshold", "stage3_param_persistence_threshold", "model_persistence_threshold"),
    *("stage3_model_persistence_threshold", "max_live_parameters", "stage3_max_live_parameters", "leaf_module"),
    *("max_reuse_distance", "stage3_max_reuse_distance", "gather_16bit_weights_on_model_save"),
    *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
    *("module_granularity_threshold", "stage3_module_granularity_threshold", "use_all_reduce_for_fetch_params"),
    *("stage3_use_all_reduce_for_fetch_params", "allgather_sequential", "stage3_allgather_sequential"),
    *("ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment", "allgather_size"),
    *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
    *("zero_quantized_gradients", "mics_shard_size", "mics_hierarchical_params_gather", "memory_efficient_linear"),
    *("pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
    *("save_muon_momentum_buffer_in_memory",),
}
ZERO_SECTIONS = {"offload_param", "offload_optimizer", "zenflow", "leaf_module"}
SIZES = ("_size", "_threshold", "_alignment", "_per_print", "_distance", "stage")
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
        ConfigError: a file that is missing or no JSON object, an entry that DeepSpeed does not know or that is there
            twice, a number that is not finite; the message names it.
    """
    source = f"--deepspeed_config {path}"
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(f"{source}: no plain file")
    try:
        text = read_text(path, ConfigError, "JSON")
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: no JSON ({error})") from None

    def not_finite(name: str) -> Any:
        raise ConfigError(f"{source}: {name} is no setting; numbers are finite")

    try:
        values = json.loads(text, object_pairs_hook=without_repeats, parse_constant=not_finite)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: no JSON ({str(error)[:200]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a JSON object expected")
    _check_names(values, SECTIONS | VALUES, "", source)
    _check_kinds(values, SECTIONS, "", source)
    zero = values.get("zero_optimization")
    if isinstance(zero, dict):
        _check_names(zero, ZERO, "zero_optimization.", source)
        _check_kinds(zero, ZERO_SECTIONS, "zero_optimization.", source)
    return values


def _check_kinds(values: dict[str, Any], sections: set[str], prefix: str, source: str) -> None:
    """Raises ConfigError for a section that is none, a number that is not positive, a switch that is neither."""
    for key, value in values.items():
        if value is None or value == "auto":
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in sections:
            right, kind = isinstance(value, dict), "a section {...}"
            if right and not isinstance(value.get("enabled", False), (bool, str)):
                raise ConfigError(f"{source}: {prefix}{key}.enabled={shown(value['enabled'])}: true or false expected")
        elif key.endswith("data_type") or key == "gradient_allreduce_op":
            right, kind = isinstance(value, str), "text"
        elif key.startswith(("train_", "gradient_", "max_", "stage3_max_")) or key.endswith(SIZES):
            right, kind = number and 0 <= value < 10**15, "a number from 0 on"
        else:
            right, kind = isinstance(value, bool), "true or false"
        if not right:
            raise ConfigError(f"{source}: {prefix}{key}={shown(value)}: {kind} expected")


def _check_names(values: dict[str, Any], known: set[str], prefix: str, source: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0)[0]
            raise ConfigError(
                f"{source}: DeepSpeed has no setting {prefix}{key[:100]}; the nearest that it has is {prefix}{near}"
            )


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
            conflicts.append(
                f"{key} is {shown(value)} there{'' if has is None else f' and {has!r} here'}: set {OURS[rule]}"
            )
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
