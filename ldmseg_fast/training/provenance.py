"""Records how a run was made: command and machine of each start, time spent, the runs that it was built on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.run_records import read_log, read_run_settings
from ldmseg_fast.threads import cores

STARTS = "starts.jsonl"


def machine() -> str:
    """Describes this machine in one line without a host name: processor and cores, or GPUs, and PyTorch's version."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"{_processor()}, {cores()} cores"
    return f"{device}, PyTorch {torch.__version__}"


def record_start(logs: Path, stage: str, start_step: int) -> None:
    """Adds a line to logs/starts.jsonl; rank 0 calls it each time a run is started or resumed."""
    logs.mkdir(parents=True, exist_ok=True)
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "stage": stage,
        "step": start_step,
        "command": shlex.join(["python", *sys.argv]),
        "ranks": distributed.world_size(),
        "machine": machine(),
    }
    with (logs / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cpu_minutes(logs: Path) -> float:
    """Adds up the processor time of rank 0, all starts together, in minutes."""
    total = previous = 0.0
    for record in read_log(logs.parent):
        now = record.get("cpu_seconds")
        if now is not None:
            total += now - (previous if now >= previous else 0.0)  # the counter begins again with each start
            previous = now
    return total / 60


def ancestors(run_dir: Path) -> list[Path]:
    """Lists the folders that are there of the runs that this one was built on: oldest first, itself last.

    Raises:
        CheckpointError: settings that no training wrote; see `read_run_settings`.
    """
    chain: list[Path] = []
    waiting = [run_dir]
    while waiting:
        folder = waiting.pop()
        if not (folder / "config.json").is_file() or folder in chain:
            continue
        chain.append(folder)
        model = read_run_settings(folder)["model"]
        waiting += [Path(model[key]) for key in ("init_from", "mask_vae") if model.get(key)]
    return chain[::-1]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or os.uname().machine
