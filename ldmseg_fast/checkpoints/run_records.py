"""Reads what a training has left in its folder, where a disk or a hand may have damaged it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import read_json, read_lines

LOG = Path("logs") / "log.jsonl"

_NUMBERS = ("loss", "seconds", "cpu_seconds", "images_per_s")  # beside all that begin with val/


def read_log(run: Path) -> list[dict[str, Any]]:
    """Reads the records of a run's log that have a step, without quantities that are no numbers.

    There are none where the log is missing.
    """
    records = [record for record in read_lines(run / LOG) if type(step := record.get("step")) is int and step >= 0]
    return [{name: value for name, value in record.items() if _is_sound(name, value)} for record in records]


def read_run_settings(run: Path) -> dict[str, Any]:
    """Reads the settings that a training wrote, with their stage.

    Raises:
        CheckpointError: names the file that is missing or damaged, or that no training wrote.
    """
    settings = read_json(run / "config.json")
    groups = [settings.get(name) for name in ("data", "train", "model")] if isinstance(settings, dict) else [None]
    if not (all(isinstance(group, dict) for group in groups) and _is_of_a_run(settings)):
        raise CheckpointError(f"{run / 'config.json'}: not the settings of a training; put back what training wrote")
    return settings


def _is_of_a_run(settings: dict[str, Any]) -> bool:
    starts = [settings["model"].get(name, "") for name in ("init_from", "mask_vae")]
    texts = [settings.get("stage"), settings["data"].get("root"), *starts]
    return all(isinstance(text, str) for text in texts) and "seed" in settings["train"]


def _is_sound(name: str, value: Any) -> bool:
    return type(value) in (int, float) or not (name in _NUMBERS or name.startswith("val/"))
