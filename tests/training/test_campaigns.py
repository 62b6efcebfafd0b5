"""Trainings that are interrupted twenty times in each way: nothing is lost, and the end is that of a calm one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldmseg_fast.data.scenes import write_scenes
from tests.training.helpers import Job, deepspeed, losses, torchrun, train_command

SCRIPT = Path(__file__).with_name("interrupted_trainings.py")
KEEPER = [sys.executable, "-m", "ldmseg_fast.distributed.keeper"]
COUNT = 20
Start = Callable[..., Job]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def campaign(mode: str, count: int, folder: Path, tmp_path: Path, start: Start) -> dict[str, int]:
    scenes = write_scenes(tmp_path / "scenes", 24, 32, 0, workers=1, version=1)
    job = start([sys.executable, SCRIPT, mode, count, folder, scenes], CUDA_VISIBLE_DEVICES="")
    assert job.wait(3600) == 0, job.output[-6000:]
    return json.loads(job.output.splitlines()[-1])


def signals(launcher: list, count: int, scenes: Path, tmp_path: Path, start: Start) -> dict[str, int]:
    """Sends SIGTERM to the process that started the ranks, `count` times, some steps after each start."""
    from tests.training.interrupted_trainings import files, is_half, is_temporary, newest  # which imports DeepSpeed

    folder, rng = tmp_path / "run", random.Random(0)
    fixed = [
        "train.log_every=1",
        "train.save_every=1000",
        "train.schedule=constant",
        "data.val_limit=1",
        "train.keep=2",
    ]
    found = {"signals": 0, "lost": 0, "half": 0, "left": 0}

    def command(out: Path, steps: int) -> list:
        resume = ["--resume"] if newest(out) else []
        return train_command("autoencoder", out, scenes, *resume, *fixed, f"train.steps={steps}")

    for _ in range(count):
        begun = newest(folder)
        job = start([*launcher[0], *launcher[1](2, *command(folder, 100_000))])
        wanted = begun + rng.randint(1, 4)
        log = folder / "logs" / "log.jsonl"
        job.wait_for(lambda log=log, wanted=wanted: log.is_file() and last_step(log) >= wanted, 600)
        seen = last_step(log)
        job.process.send_signal(signal.SIGTERM)
        job.wait(300)
        job.wait_until_empty(300)
        found["signals"] += 1
        found["lost"] += newest(folder) < seen or newest(folder) != last_step(log)
        found["half"] += sum(is_half(path) for name, path in files(folder).items() if not is_temporary(name))
        found["left"] += sum(map(is_temporary, files(folder)))
    steps, whole = newest(folder) + 2, tmp_path / "whole"
    for out in (folder, whole):
        assert start(launcher[1](2, *command(out, steps))).wait(600) == 0
    weights = "mask_vae/model.safetensors"
    same = losses(folder) == losses(whole) and (folder / weights).read_bytes() == (whole / weights).read_bytes()
    return found | {"different": int(not same), "steps": steps}


def last_step(log: Path) -> int:
    lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
    return max((json.loads(line)["step"] for line in lines), default=0)


def check(found: dict[str, int], record_property: Callable[[str, object], None]) -> None:
    for name, value in found.items():
        record_property(name, value)
    assert not any(found[name] for name in ("lost", "half", "left", "different"))


LAUNCHERS = {"torchrun": ([], torchrun), "deepspeed": (KEEPER, deepspeed)}


@pytest.mark.soak
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_twenty_signals(
    launcher: str, scenes: Path, tmp_path: Path, start: Start, record_property: Callable[[str, object], None]
) -> None:
    found = signals(LAUNCHERS[launcher], COUNT, scenes, tmp_path, start)
    check(found, record_property)
    assert found["signals"] == COUNT


@pytest.mark.soak
def test_twenty_ranks_without_memory(
    tmp_path: Path, start: Start, record_property: Callable[[str, object], None]
) -> None:
    """Twenty are killed and twenty are refused memory."""
    folder = tmp_path / "campaign"
    folder.mkdir()
    found = campaign("memory", 2 * COUNT, folder, tmp_path, start)
    check(found, record_property)
    assert found["killed"] == found["refused"] == COUNT and found["named"] == 2 * COUNT and found["stuck"] == 0


@pytest.mark.soak
def test_twenty_full_disks(
    small_disk: Path, tmp_path: Path, start: Start, record_property: Callable[[str, object], None]
) -> None:
    found = campaign("disk", COUNT, small_disk, tmp_path, start)
    check(found, record_property)
    assert found["filled"] == found["named"] == COUNT and found["stuck"] == 0


@pytest.mark.serial
def test_one_full_disk(small_disk: Path, tmp_path: Path, start: Start) -> None:
    found = campaign("disk", 1, small_disk, tmp_path, start)
    assert found["named"] == 1 and not any(found[name] for name in ("lost", "half", "left", "different", "stuck"))


@pytest.mark.serial
def test_two_ranks_without_memory(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "campaign"
    folder.mkdir()
    found = campaign("memory", 2, folder, tmp_path, start)
    assert (
        found["killed"] == found["refused"] == 1
        and found["named"] == 2
        and not any(found[name] for name in ("lost", "half", "left", "different", "stuck"))
    )
