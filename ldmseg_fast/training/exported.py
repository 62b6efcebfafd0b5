"""Knows whether a new run may write into a folder, and which step each model folder of a run has the weights of."""

from __future__ import annotations

from pathlib import Path

from ldmseg_fast.checkpoints.schema import COMPONENTS
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import read_json, write_json

EXPORTED = "exported.json"  # beside the checkpoints: the step of each model folder, by its place in the run


def check_free(run: Path) -> None:
    """Checks that a new run may write into a folder.

    Raises:
        CheckpointError: it would replace a model, or files that no run has written.
    """
    own = ["model_index.json", "README.md", "config.json", "settings.txt", "logs/log.jsonl", "best", *COMPONENTS]
    there = [name for name in own if (run / name).exists()]
    if "model_index.json" in there:
        raise CheckpointError(f"{run} holds a model, which a new run would replace; take another output_dir")
    try:
        is_run = "config.json" in there and "stage" in read_json(run / "config.json")
    except (CheckpointError, TypeError):
        is_run = False
    if there and not is_run:  # a run that was killed before its first checkpoint may begin anew
        raise CheckpointError(f"{run / there[0]} is there, and a run would replace it; take another output_dir")


def exported_step(folder: Path, checkpoints: Path) -> int | None:
    """Returns the step whose weights a model folder of the run has; None where it is not whole, or not recorded."""
    try:
        components = read_json(folder / "model_index.json")["components"]
        step = read_json(checkpoints / EXPORTED)[_name_in_run(folder, checkpoints)]
    except (CheckpointError, KeyError, TypeError):
        return None
    return step if all((folder / name / "config.json").is_file() for name in components) else None


def note_exported(folder: Path, checkpoints: Path, step: int | None) -> None:
    """Records that a model folder of the run has the weights of `step`.

    step: None before the folder is written, whose weights are of no one step until that is done.
    """
    path = checkpoints / EXPORTED
    checkpoints.mkdir(parents=True, exist_ok=True)
    try:
        known = dict(read_json(path))
    except (CheckpointError, TypeError, ValueError):
        known = {}
    name = _name_in_run(folder, checkpoints)
    if step is not None:
        write_json(path, known | {name: step})
    elif known.pop(name, None) is not None:
        write_json(path, known)


def _name_in_run(folder: Path, checkpoints: Path) -> str:
    return folder.relative_to(checkpoints.parent).as_posix()  # "." or "best", whatever the run is called
