"""Pictures that stay in memory: what they take, and a run that does without them where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldmseg_fast.config import Config
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.training import cache_memory
from ldmseg_fast.training.cache_memory import cache_need, fit_caches, free_memory
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
    assert cache_need(*sets, workers=0) == (32, 32 * EACH)
    assert cache_need(*sets, workers=3) == (32, (3 * 24 + 8) * EACH)
    monkeypatch.setattr("ldmseg_fast.distributed.local_size", lambda: 2)
    assert cache_need(*sets, workers=0) == (32, 2 * 32 * EACH)


def test_a_cache_that_fits_stays(sets: tuple) -> None:
    assert fit_caches(*sets, workers=0, free=2 * 32 * EACH) == "data.cache: 32 pictures take 0.4 MiB"
    assert sets[0][0].cache_bytes == 24 * EACH


def test_without_a_cache_nothing_is_said(scenes: Path) -> None:
    assert fit_caches([CocoPanoptic(scenes, "train2017", 32)], [], workers=0, free=0) == ""


def test_a_cache_that_does_not_fit_is_dropped_and_items_stay_the_same(sets: tuple) -> None:
    before = sets[0][0][3]
    said = fit_caches(*sets, workers=2, free=3 * 2**20 // 10)
    assert said.startswith("warning: data.cache is off: 32 pictures would take 0.7 MiB in 2 processes together, of 0")
    assert sets[0][0].cache_bytes == sets[1][0].cache_bytes == 0
    after = sets[0][0][3]
    assert all(torch.equal(before[key], after[key]) for key in ("image", "segment_ids", "table"))


def test_a_run_without_room_for_its_pictures_says_so_and_learns_the_same(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    more = ("train.steps=2", "train.log_every=1", "train.validate_every=1000", "data.val_limit=1", "data.cache=true")
    kept = losses(train("autoencoder", settings("kept", *more)))
    assert "data.cache: 25 pictures take" in capsys.readouterr().err
    monkeypatch.setattr(cache_memory, "free_memory", lambda: 4096)
    assert losses(train("autoencoder", settings("dropped", *more))) == kept
    assert "warning: data.cache is off: 25 pictures would take" in capsys.readouterr().err


def test_free_memory_within_a_containers_limit(tmp_path: Path) -> None:
    system, group = tmp_path / "meminfo", tmp_path / "group"
    system.write_text("MemTotal:       8000 kB\nMemAvailable:   4000 kB\n")
    assert free_memory(tmp_path / "nowhere", group) is None
    assert free_memory(system, group) == 4000 * 1024
    group.mkdir()
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 100\ninactive_file 200000\n")
    (group / "memory.max").write_text("max\n")
    assert free_memory(system, group) == 4000 * 1024
    (group / "memory.max").write_text("1000000\n")
    assert free_memory(system, group) == 300_000


def test_free_memory_of_this_machine() -> None:
    found = free_memory()
    assert found is None or found > 0
