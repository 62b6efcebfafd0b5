"""Starts a training under the DeepSpeed launcher, and follows it with a progress bar."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ldmseg_fast.checkpoints.run_records import read_log
from ldmseg_fast.errors import printable

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
PERIOD = 0.5  # seconds between two looks at a training
PATIENCE = 60.0  # seconds that an interrupted training may take to save


def free_port() -> int:
    """Finds a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_training(stage: str, folder: Path, settings: list[str], ranks: int, minutes: float) -> None:
    """Trains a stage in `folder` for `minutes`, all starts together, or goes on with what is there.

    A bar on the terminal shows the time left. Everything that launcher and ranks print goes to FOLDER.log. A signal
    that interrupts this function interrupts the training too, which saves. One that an earlier start left behind is
    waited for.

    Args:
        stage: of `training.stages.STAGES`.
        folder: the run's output_dir.
        settings: `key=value`, and the options of `train.py`.
        ranks: processes, on this machine.
        minutes: `train.max_minutes`.

    Raises:
        SystemExit: the training failed; with the last lines of its log.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.log")
    with Bar(stage, folder, 60 * minutes) as bar:
        with path.open("a", encoding="utf-8") as log:
            while not _lock(log):
                bar.update("an earlier start's training goes on")
                time.sleep(PERIOD)
            command = _command(stage, folder, settings, ranks, minutes)
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, [str(TRAIN.parents[1]), os.environ.get("PYTHONPATH")]))
            }
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                bar.update()
                time.sleep(PERIOD)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            bar.update("saving")
            _wait_for_lock(path)
            raise
    if process.returncode:
        last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        sys.exit(
            "\n".join(
                [printable(f"error: training the {stage} ended with exit code {process.returncode}: {path}"), *last]
            )
        )


def _command(stage: str, folder: Path, settings: list[str], ranks: int, minutes: float) -> list[str]:
    launcher = [sys.executable]
    if importlib.util.find_spec("deepspeed") is not None:
        launcher += ["-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), "--num_gpus", str(ranks)]
    resume = ["--resume"] if any(folder.glob("checkpoints/step-*/manifest.json")) else []
    fixed = [f"output_dir={folder}", f"train.max_minutes={minutes:.4f}"]
    return [*launcher, str(TRAIN), stage, *resume, *settings, *fixed]


def _lock(log: IO[str]) -> bool:
    """Takes the log, which launcher and ranks keep as their output until the last of them has ended."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_lock(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    with path.open("a", encoding="utf-8") as log:
        while not _lock(log) and time.monotonic() < end:
            time.sleep(PERIOD)


class Bar:
    """Draws how much of its time a run has used, and its newest loss; silent where there is no terminal."""

    def __init__(self, stage: str, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.before = self.last = self._newest()
        self.since = time.monotonic()  # the newest record is there
        form = "{desc}: {percentage:3.0f}%|{bar}|{postfix}"
        self.bar = tqdm(total=seconds, desc=stage, bar_format=form, disable=None)

    def _newest(self) -> dict[str, Any]:
        records = [record for record in read_log(self.folder) if "loss" in record]
        return records[-1] if records else {}

    def update(self, state: str = "") -> None:
        """Draws what the run has logged. `state` takes the place of its step and loss."""
        if self.bar.disable:
            return
        last = self._newest()
        if last != self.last:
            self.last, self.since = last, time.monotonic()
        used = last.get("seconds", 0.0)
        if last == self.before:
            state = state or "starting"
        else:
            used = min(used + time.monotonic() - self.since, self.seconds)
            state = state or f"step {last['step']}, loss {last['loss']:.3f}"
        self.bar.n = used
        self.bar.set_postfix_str(f"{tqdm.format_interval(self.seconds - used)} left, {state}")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
