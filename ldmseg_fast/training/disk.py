"""Forecasts what a run writes, and asks before its first step whether the disk holds it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ldmseg_fast import distributed
from ldmseg_fast.config import TrainConfig
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.training.adamw_8bit import BYTES

GIB, MIB = 2**30, 2**20
SLACK = 16 * MIB  # logs, pictures, cards


MOMENT_BYTES = {"adamw": 8.0, "muon": 8.0, "adamw_8bit": BYTES}  # of both, a parameter


@dataclass(frozen=True)
class DiskNeed:
    """Holds bytes that a run has on disk when it has most.

    Attributes:
        checkpoint: one of them, without frozen weights.
        checkpoints: how many are there at once, the one that is being written among them.
        frozen: frozen weights, which all checkpoints share.
        models: model folders, and the part of one that is being written beside its old one.
    """

    checkpoint: int
    checkpoints: int
    frozen: int
    models: int

    @property
    def total(self) -> int:
        """Adds the parts up."""
        return self.checkpoint * self.checkpoints + self.frozen + self.models + SLACK


def disk_need(trained: int, total: int, train: TrainConfig, step: int = 0) -> DiskNeed:
    """Forecasts the disk of a run that goes on from `step`.

    A checkpoint has weights, two moments and averages of what is trained; a model folder all weights. All are float32
    but moments in 8 bits.

    Args:
        trained, total: parameters.
        train: settings.
        step: steps that are taken already.
    """
    saves = -(-max(train.steps - step, 0) // min(train.save_every, max(train.steps, 1))) + (step > 0)
    kept = train.keep + train.keep_best + 1  # the new one is whole before an old one goes
    folders = 1 + (train.keep_best > 0)
    moments = MOMENT_BYTES[train.optimizer]
    return DiskNeed(
        checkpoint=int(trained * (4 + moments + (4 if train.ema else 0))),
        checkpoints=max(min(saves, kept), 1),
        frozen=4 * (total - trained),
        models=4 * total * folders + 4 * trained,
    )


def describe_disk(need: DiskNeed) -> str:
    """Writes a forecast in one line."""
    frozen = f", {size_text(need.frozen)} of frozen weights" if need.frozen else ""
    return (
        f"disk: {size_text(need.total)} ({need.checkpoints} checkpoints of {size_text(need.checkpoint)}{frozen}, "
        f"models {size_text(need.models)})"
    )


def check_disk(folder: Path, stage: nn.Module, train: TrainConfig, step: int) -> str:
    """Checks on rank 0 that a run's disk holds what it will write; all ranks call it.

    What the run has written already counts as there.

    Returns:
        The forecast as a line.

    Raises:
        CheckpointError: it does not.
    """

    def check() -> str:
        # ZeRO 3 leaves empty tensors in the place of weights
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in stage.parameters()]
        need = disk_need(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes), train, step)
        require_space(folder, need)
        return describe_disk(need)

    return distributed.from_main(check)


def require_space(folder: Path, need: DiskNeed) -> None:
    """Checks that the disk of an output folder, which need not be there, holds a run.

    Raises:
        CheckpointError: it does not.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free + _written(folder)
    if need.total > free:
        raise CheckpointError(
            f"output_dir={folder}: {describe_disk(need)}, but {size_text(free)} are free there; lower train.keep or "
            f"train.keep_best, or take another disk"
        )


def _written(folder: Path) -> int:
    """Bytes of the checkpoints and weights that a run has on disk; files under several names count once."""
    files = {}
    for path in folder.rglob("*.safetensors") if folder.is_dir() else ():
        status = path.stat()
        files[status.st_ino] = status.st_size
    return sum(files.values())


def size_text(count: int) -> str:
    """Writes bytes in GiB, or in MiB where that is less than a tenth."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / MIB:.1f} MiB"
