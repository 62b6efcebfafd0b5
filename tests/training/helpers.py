"""What the tests of training share beside fixtures: launchers, jobs, and readers of what a run wrote."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmseg_fast.data import loader, pictures
from ldmseg_fast.training.shards import ShardReader

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "ldmseg_fast" / "train.py"
TINY = Path(__file__).with_name("tiny.yaml")


def losses(folder: Path) -> list[float]:
    """The loss of every logged step."""
    lines = (folder / "logs" / "log.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def hang(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every later read of a picture wait, as that of a dead file server does, in workers too (forked then)."""
    read = pictures.read_content

    def waiting(path: str | os.PathLike) -> bytes:
        if Path(path) == picture:
            time.sleep(600)
        return read(path)

    monkeypatch.setattr(pictures, "read_content", waiting)
    monkeypatch.setattr(loader, "worker_context", lambda: multiprocessing.get_context("fork"))


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "logs" / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "val/pq" in record]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Job:
    """A process group that a test has started."""

    process: subprocess.Popen
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.output[-4000:]}")

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"exit code {self.process.poll()} before what was waited for:\n{self.output[-4000:]}")
            time.sleep(0.05)

    def wait_until_empty(self, seconds: float = 60) -> None:
        """Until no process of the job is left."""
        end = time.monotonic() + seconds
        while self.members() and time.monotonic() < end:
            time.sleep(0.2)
        assert not self.members(), self.output

    def members(self) -> list[int]:
        """The job's processes that are alive, its first one left out; torchrun gives ranks a session of their own."""
        mark = f"LDMSEG_TEST_JOB={self.log}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.process.pid:
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    found += [int(entry.name)] if state != "Z" else []
            except OSError:
                continue
        return found

    def ranks(self) -> list[int]:
        """Processes that train: started by a launcher, in the order of their ranks."""
        found = {}
        for process in self.members():
            try:
                environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
                above = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            ranks = [value for value in environment if value.startswith(b"RANK=")]
            if ranks and ranks[0] not in above:  # a data worker has its rank's environment
                found[int(ranks[0][5:])] = process
        return [found[rank] for rank in sorted(found)]

    def end(self) -> None:
        for process in [*self.members(), self.process.pid]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)


def deepspeed(ranks: int, *command: Any) -> list[Any]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", free_port(), "--num_gpus", ranks]
    return [*launcher, *command]


def torchrun(ranks: int, *command: Any) -> list[Any]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        ranks,
        "--master_port",
        free_port(),
        *command,
    ]


def train_command(stage: str, folder: Path, scenes: Path, *overrides: Any) -> list[Any]:
    return [TRAIN, stage, "--config", TINY, f"data.root={scenes}", f"output_dir={folder}", *overrides]


def assembled(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every piece of state of a checkpoint, put together: KIND/NAME to a flat tensor."""
    reader = ShardReader(checkpoint)
    state = {}
    for (kind, name), pieces in reader.pieces.items():
        size = max(start + length for start, length, _, _ in pieces)
        state[f"{kind}/{name}"] = torch.empty(size)
        reader.read_into(state[f"{kind}/{name}"], kind, name, 0)
    return state
