"""Pictures that stay in memory: what they take, and a run that does without them where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldmseg_fast.config import Config
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.training import cache_memory
from ldmseg_fast.training.cache_memory import cache_need, fit_caches, memory_left
from ldmseg_fast.training.loop import train
from tests.training.helpers import losses

Settings = Callable[..., Config]
EACH = 3 * 64**2 + 32**2 + 4 * 4  # picture, map, and what says how many segments there are


@pytest.fixture
def sets(scenes: Path) -> tuple[list[CocoPanoptic], list[CocoPanoptic]]:
    """24 pictures to train on and 8 to validate on, with a cache each."""
    train_set, val_set = (
        CocoPanoptic(scenes, split, 32, train=split.startswith("train"), cache=True, picture_size=64)
        for split in ("train2017", "val2017")
    )
    return [train_set], [val_set]


def test_need_counts_every_process_that_reads(sets: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_need(*sets, workers=0) == 32 * EACH
    assert cache_need(*sets, workers=3) == (3 * 24 + 8) * EACH
    assert cache_need(*sets, workers=0, num_categories=19) == 32 * (EACH + 32**2)
    assert cache_need(*sets, workers=0, num_categories=256) == 32 * (EACH + 2 * 32**2)
    monkeypatch.setattr("ldmseg_fast.distributed.local_size", lambda: 2)
    assert fit_caches(*sets, workers=0) == "data.cache: 32 pictures take 0.8 MiB in 2 processes together"


def test_a_cache_that_fits_stays(sets: tuple) -> None:
    assert fit_caches(*sets, workers=0, free=2 * 32 * EACH) == "data.cache: 32 pictures take 0.4 MiB"
    assert sets[0][0].cache_bytes() == 24 * EACH


def test_without_a_cache_nothing_is_said(scenes: Path) -> None:
    assert fit_caches([CocoPanoptic(scenes, "train2017", 32)], [], workers=0, free=0) == ""


def test_a_cache_that_does_not_fit_is_dropped_and_items_stay_the_same(sets: tuple) -> None:
    before = sets[0][0][3]
    said = fit_caches(*sets, workers=2, free=3 * 2**20 // 10)
    assert said.startswith("warning: data.cache is off: 32 pictures would take 0.7 MiB in 2 processes together, of 0")
    assert sets[0][0].cache_bytes() == sets[1][0].cache_bytes() == 0
    after = sets[0][0][3]
    assert all(torch.equal(before[key], after[key]) for key in ("image", "segment_ids", "table"))


def test_a_run_without_room_for_its_pictures_says_so_and_learns_the_same(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    more = ("train.steps=2", "train.log_every=1", "train.validate_every=1000", "data.val_limit=1", "data.cache=true")
    kept = losses(train("autoencoder", settings("kept", *more)))
    assert "data.cache: 25 pictures take" in capsys.readouterr().err
    monkeypatch.setattr(cache_memory, "memory_left", lambda: 4096)
    assert losses(train("autoencoder", settings("dropped", *more))) == kept
    assert "warning: data.cache is off: 25 pictures would take" in capsys.readouterr().err


def test_a_cache_beyond_the_memory_is_no_error_of_its_own(scenes: Path) -> None:
    """No system promises so much; nothing is taken before the first item."""
    big = CocoPanoptic(scenes, "train2017", 32, cache=True, picture_size=2**22)
    assert "data.cache is off" in fit_caches([big], [], workers=0) and big.cache_bytes() == 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_left_within_limits(tmp_path: Path) -> None:
    """Of the system, of a container, and of a job's control group or one around it, of both versions."""
    assert memory_left(tmp_path) is None
    write(tmp_path / "proc/meminfo", "MemTotal:       8000 kB\nMemAvailable:   4000 kB\n")
    assert memory_left(tmp_path) == 4000 * 1024
    container = tmp_path / "sys/fs/cgroup"
    write(container / "memory.current", "900000\n")
    write(container / "memory.stat", "anon 100\ninactive_file 150000\nactive_file 50000\n")
    write(container / "memory.max", "max\n")
    assert memory_left(tmp_path) == 4000 * 1024
    write(container / "memory.max", "1000000\n")
    assert memory_left(tmp_path) == 300_000
    write(tmp_path / "proc/self/cgroup", "3:cpu,memory:/slurm/job\n0::/slurm/job_7/step_0\n")
    write(container / "slurm/job_7/memory.max", "500000\n")
    write(container / "slurm/job_7/memory.current", "450000\n")
    write(container / "slurm/job_7/memory.stat", "inactive_file 0\nactive_file 10\n")
    assert memory_left(tmp_path) == 50_010
    write(container / "memory/slurm/job/memory.limit_in_bytes", "40000\n")
    write(container / "memory/slurm/job/memory.usage_in_bytes", "39000\n")
    write(container / "memory/slurm/job/memory.stat", "total_inactive_file 5\ntotal_active_file 5\n")
    assert memory_left(tmp_path) == 1010


def test_memory_left_of_this_machine() -> None:
    found = memory_left()
    assert found is None or found > 0
