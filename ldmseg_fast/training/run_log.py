"""Writes scalars and pictures of a run: log.jsonl, TensorBoard and the trackers that are asked for."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast import distributed
from ldmseg_fast.files import read_lines, replacing
from ldmseg_fast.training.trackers import Tracker, start_trackers


class Window:
    """Collects what is averaged between two lines of the log. Losses stay on the device until then."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.finite: Any = 0  # steps whose loss was a number; the others are left out
        self.steps, self.started = 0, time.monotonic()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Takes a step's losses by name, float scalars on the device, "loss" among them."""
        finite = torch.isfinite(losses["loss"])
        self.steps, self.finite = self.steps + 1, self.finite + finite
        for key, value in losses.items():
            self.sums[key] = self.sums.get(key, 0.0) + torch.where(finite, value.float(), 0.0)

    def means(self, batch_size: int) -> dict[str, float]:
        """Averages over steps and ranks; all ranks call it. `batch_size` is that of a whole step."""
        names = list(self.sums)
        totals = distributed.all_reduce_mean(torch.stack([*self.sums.values(), self.finite.float()]))
        means = (totals[:-1] / totals[-1]).tolist()
        seconds = max(time.monotonic() - self.started, 1e-9)
        return dict(zip(names, means)) | {"images_per_s": self.steps * batch_size / seconds}


class RunLog:
    """Writes the log, on rank 0.

    A resumed run drops the lines after the checkpoint it starts from, then appends.

    Args:
        folder: logs/ of the run.
        start_step: of the checkpoint that a resumed run starts from; 0: a new run.
        wandb: project of Weights & Biases; "": off.
        settings: of the run, for the trackers.
        mlflow: experiment of MLflow, alike.
        trackio: project of trackio, alike.

    Raises:
        ConfigError: a tracker that is asked for is not installed, or cannot start.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        wandb: str = "",
        settings: dict[str, Any] | None = None,
        *,
        mlflow: str = "",
        trackio: str = "",
    ) -> None:
        self.path = folder / "log.jsonl"
        self.tensorboard: Any = None
        self.trackers: list[Tracker] = []
        if not distributed.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        records = read_lines(self.path) if start_step else []
        kept = [record for record in records if isinstance(record.get("step"), int) and record["step"] <= start_step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        projects = {"wandb": wandb, "mlflow": mlflow, "trackio": trackio}
        self.trackers = start_trackers(projects, folder, start_step > 0, settings or {})

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the numbers of a step.

        Raises:
            OSError: the log cannot be written; it names the file.
        """
        if not distributed.is_main():
            return
        # nine digits tell any two float32 apart
        record = {"step": step} | {key: float(f"{value:.9g}") for key, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self.tensorboard is not None:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
        for tracker in self.trackers:
            tracker.write(step, values)

    def picture(self, step: int, path: Path, name: str = "validation") -> None:
        """Shows a picture file of this step in the viewers, under `name`."""
        if self.tensorboard is None and not self.trackers:
            return
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        if self.tensorboard is not None:
            self.tensorboard.add_image(name, pixels, step, dataformats="HWC")
        for tracker in self.trackers:
            tracker.picture(step, pixels, name)

    def close(self) -> None:
        """Ends what the viewers' writers have begun."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        for tracker in self.trackers:
            tracker.close()
