"""Loader processes hold what they read, nothing of the training process, and need nothing of the user's script."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldmseg_fast.data import loader
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.loader import TrainingBatches
from ldmseg_fast.data.packed import Packed
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.errors import DataError

VALUES = [{"id": 7, "name": "ü"}, [], "text", {"segments_info": [{"id": 1}]}]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("workers") / "scenes", 8, 32, 0, workers=1, version=1)


def memory_of(process: int, key: str) -> int:
    """A process's memory in bytes, by a key of smaps_rollup."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


@pytest.mark.parametrize("values", [VALUES, []])
def test_packed_values_and_their_copy_in_another_process(values: list) -> None:
    packed = Packed(values)
    assert [packed[index] for index in range(len(packed))] == values
    copy = pickle.loads(pickle.dumps(packed))
    assert [copy[index] for index in range(len(copy))] == values


def test_a_worker_has_no_copy_of_the_trainings_memory(scenes: Path) -> None:
    """256 MiB that the training process writes to before and after the start are in no worker."""
    weights = torch.ones(64 << 20)
    batches = TrainingBatches(CocoPanoptic(scenes, "train2017", 32, train=True), 2, num_workers=2)
    next(batches)
    weights += 1
    workers = [process.pid for process in batches._iterator._workers]
    private = [memory_of(process, "Private_Dirty") + memory_of(process, "Private_Clean") for process in workers]
    batches.close()
    assert max(private) < 64 << 20


def test_a_cache_is_not_sent(scenes: Path) -> None:
    dataset = CocoPanoptic(scenes, "train2017", 512, cache=True)
    before = dataset[3]["segment_ids"]
    assert len(pickle.dumps(dataset)) < 20_000
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._cache is None and torch.equal(copy[3]["segment_ids"], before)


SCRIPT = """
import os, sys
print("script runs")
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.loader import TrainingBatches
os.chdir(sys.argv[1])
batches = TrainingBatches(CocoPanoptic("scenes", "train2017", 32, train=True), 2, num_workers=1)
print(next(batches)["segment_ids"].sum().item())
batches.close()
"""


def test_a_script_without_a_main_guard_and_in_another_folder(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, tmp_path / "script.py", scenes.parent]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    here = TrainingBatches(CocoPanoptic(scenes, "train2017", 32, train=True), 2)
    assert found.stdout.split("\n")[:2] == ["script runs", str(int(next(here)["segment_ids"].long().sum()))]


def test_workers_that_cannot_start(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(loader, "worker_context", refuse)
    dataset = CocoPanoptic(scenes, "train2017", 32, train=True)
    with pytest.raises(DataError, match=r"data\.num_workers=9: .*cannot be started.*temporarily.*0 reads in the train"):
        TrainingBatches(dataset, 2, num_workers=9)
