"""What a run's settings come to on the machines that train it."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import torch

from ldmseg_fast import distributed
from ldmseg_fast.config import Config, update
from ldmseg_fast.config.precision import DTYPES, resolve_precision
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.files import read_json
from ldmseg_fast.training.fp8 import check_fp8

SETTINGS_VERSION = 2  # of a run's config.json; 1 had no number
FORMER_WEIGHTS = {"fixed": "constant", "inverse_log_snr": "inverse_log1p_snr"}  # scheduler.loss_weighting of version 1


def resolve_settings(config: Config, device: torch.device, resumed: Path | None) -> tuple[Config, str]:
    """Settles on all ranks what `config` leaves to the machine; all of them call it.

    Args:
        config: of the run.
        device: of this rank.
        resumed: folder of a run that goes on: with `train.precision=auto` it keeps the precision that it had, and its
            loss weights also where their name has changed.

    Returns:
        `config` with "fp32", "bf16" or "fp16" as `train.precision`, and a line that says which it is and why.

    Raises:
        ConfigError: `model.attention` names something that is not on this machine, or what `check_fp8` refuses.
    """
    _check_attention(config.model.attention, device)
    config = _keep_loss_weights(config, resumed)
    requested = config.train.precision
    before = ""
    if resumed is not None and requested == "auto":
        before = distributed.broadcast_object(_recorded_precision(resumed))
    answers = distributed.gather_objects(resolve_precision(before or requested, device))
    # one rank that emulates bf16 holds up all others
    precision, reason = next((answer for answer in answers if answer[0] == "fp32"), answers[0])
    if config.train.fp8:
        check_fp8(device, precision)
    kept = reason.replace(f"train.precision={before}", "as the run began", 1) if before else reason
    return replace(config, train=replace(config.train, precision=precision)), f"precision: {precision} ({kept})"


def peak_memory() -> int:
    """Reads the most main memory, in bytes, that this process has held; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def _check_attention(backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type != "cuda":
        raise ConfigError("model.attention=triton needs a GPU and there is none here; use model.attention=auto or sdpa")
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        cure = "pip install 'ldmseg_fast[xformers]', or use model.attention=auto or sdpa"
        raise ConfigError(f"model.attention=xformers: {cure}")


def _keep_loss_weights(config: Config, resumed: Path | None) -> Config:
    """Gives a run that began before SETTINGS_VERSION 2 the name that its loss weights have today."""
    scheduler = config.scheduler
    today = FORMER_WEIGHTS.get(scheduler.loss_weighting)
    if today is None or resumed is None:
        return config
    path = resumed / "config.json"
    recorded = distributed.broadcast_object(read_json(path) if distributed.is_main() and path.is_file() else {})
    before = recorded.get("scheduler", {}).get("loss_weighting", "")
    if before == today or (before == scheduler.loss_weighting and "settings_version" not in recorded):
        return replace(config, scheduler=update(scheduler, {"loss_weighting": today}))
    return config


def _recorded_precision(folder: Path) -> str:
    """The precision in a run's config.json, "" where none is recorded."""
    path = folder / "config.json"
    recorded = read_json(path) if path.is_file() else {}
    precision = recorded.get("train", {}).get("precision", "")
    return precision if precision in DTYPES else ""
