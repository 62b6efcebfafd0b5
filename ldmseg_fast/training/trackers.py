"""Shows a run in Weights & Biases, MLflow and trackio; each is imported when a setting asks for it.

What a tracker calls the run lies in logs/trackers.json, so that a resumed run goes on in the same one and no other run
gets into it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldmseg_fast.errors import ConfigError
from ldmseg_fast.files import read_json, real_path, write_json

FILE = "trackers.json"


class Tracker(Protocol):
    """Is told what a run measures.

    Attributes:
        id: that the tracker finds the run by.
    """

    id: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""

    def picture(self, step: int, pixels: np.ndarray, name: str = "validation") -> None:
        """Shows a picture, uint8 [H, W, 3], of a step, under `name`."""

    def close(self) -> None:
        """Says that the process has ended its work on the run."""


def start_trackers(projects: Mapping[str, str], folder: Path, resumed: bool, settings: dict[str, Any]) -> list[Tracker]:
    """Starts the trackers that have a project, and remembers the runs that they made.

    Args:
        projects: by the tracker's name, of TRACKERS; "": off.
        folder: logs/ of the run.
        resumed: whether the run goes on, in the trackers' old runs.
        settings: of the run.

    Raises:
        ConfigError: a tracker that is not installed or cannot start.
    """
    path = folder / FILE
    known: dict[str, str] = read_json(path) if resumed and path.is_file() else {}
    started: list[Tracker] = []
    name = real_path(folder).parent.name
    for kind, project in projects.items():
        if not project:
            continue
        started.append(TRACKERS[kind](project, name, known.get(kind), folder, settings))
        known[kind] = started[-1].id
        write_json(path, known)
    return started


class WandbTracker:
    """Writes a run of Weights & Biases (https://docs.wandb.ai/ref/python/init); WANDB_MODE=offline needs no network."""

    def __init__(self, project: str, name: str, old: str | None, folder: Path, settings: dict[str, Any]) -> None:
        self.wandb = library("wandb", project)
        self.id = old or uuid.uuid4().hex[:12]
        try:
            self.run = self.wandb.init(
                project=project, name=name, id=self.id, resume="allow", dir=str(folder), config=settings
            )
        except self.wandb.errors.Error as error:
            raise ConfigError(
                f"train.wandb={project}: {_line(error)}; `wandb login`, or set WANDB_MODE=offline"
            ) from None
        # wandb drops steps that lie before its last one, as those after a checkpoint do in a resumed run
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
        self.run.log({**values, "step": step})

    def picture(self, step: int, pixels: np.ndarray, name: str = "validation") -> None:
        """Shows a picture, uint8 [H, W, 3], of a step, under `name`."""
        self.run.log({name: self.wandb.Image(pixels), "step": step})

    def close(self) -> None:
        """Ends the process's part of the run."""
        self.run.finish()


class MlflowTracker:
    """Writes a run of MLflow (https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html).

    MLFLOW_TRACKING_URI says where to; without it MLflow makes a local store. A server that is lost later costs what it
    would have been told, not the training.
    """

    def __init__(self, project: str, name: str, old: str | None, folder: Path, settings: dict[str, Any]) -> None:
        self.mlflow = library("mlflow", project)
        # MLflow would try for many minutes, in which nothing is trained
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.lost = False
        try:
            self.client = self.mlflow.MlflowClient()
            self.id = self._start(project, name, old, settings)
        except (self.mlflow.exceptions.MlflowException, ImportError) as error:
            raise ConfigError(
                f"train.mlflow={project}: {_line(error)}; MLFLOW_TRACKING_URI says which server or folder is meant"
            ) from None

    def _start(self, project: str, name: str, old: str | None, settings: dict[str, Any]) -> str:
        """Takes the old run up again, or makes one, and returns its id."""
        if old is not None:
            try:
                self.client.update_run(old, status="RUNNING")
                return old
            except self.mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = self.client.get_experiment_by_name(project)
        number = self.client.create_experiment(project) if experiment is None else experiment.experiment_id
        made: str = self.client.create_run(number, run_name=name).info.run_id
        params = [self.mlflow.entities.Param(key, str(value)[:500]) for key, value in _flat(settings).items()]
        for start in range(0, len(params), 100):  # as many as a call takes
            self.client.log_batch(made, params=params[start : start + 100])
        return made

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
        now = int(1000 * time.time())
        metrics = [self.mlflow.entities.Metric(key, value, now, step) for key, value in values.items()]
        self._tell(lambda: self.client.log_batch(self.id, metrics=metrics))

    def picture(self, step: int, pixels: np.ndarray, name: str = "validation") -> None:
        """Shows a picture, uint8 [H, W, 3], of a step, under `name`."""
        self._tell(lambda: self.client.log_image(self.id, pixels, key=name, step=step, synchronous=True))

    def close(self) -> None:
        """Ends the process's part of the run."""
        self._tell(lambda: self.client.set_terminated(self.id))

    def _tell(self, call: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            call()
        except self.mlflow.exceptions.MlflowException as error:
            self.lost = True
            warnings.warn(f"MLflow is lost ({_line(error)}); logs/log.jsonl has everything", stacklevel=3)


class TrackioTracker:
    """Writes a run of trackio (https://huggingface.co/docs/trackio), local unless TRACKIO_SPACE_ID names a Space.

    trackio finds a run by its name, so the name has a part of its own.
    """

    def __init__(self, project: str, name: str, old: str | None, folder: Path, settings: dict[str, Any]) -> None:
        self.trackio = library("trackio", project)
        self.id = old or f"{name}-{uuid.uuid4().hex[:8]}"
        with contextlib.redirect_stdout(sys.stderr):
            self.run = self.trackio.init(
                project=project, name=self.id, config=_flat(settings), resume="allow", embed=False
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
        self.run.log(dict(values), step=step)

    def picture(self, step: int, pixels: np.ndarray, name: str = "validation") -> None:
        """Shows a picture, uint8 [H, W, 3], of a step, under `name`."""
        self.run.log({name: self.trackio.Image(pixels)}, step=step)

    def close(self) -> None:
        """Ends the process's part of the run."""
        with contextlib.redirect_stdout(sys.stderr):
            self.run.finish()


TRACKERS: dict[str, Callable[[str, str, str | None, Path, dict[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}


def library(name: str, project: str) -> Any:
    """Imports what the tracker `name` needs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"train.{name}={project}: `pip install {name}`, or leave train.{name} out") from None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
