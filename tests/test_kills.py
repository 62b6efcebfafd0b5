"""At whatever moment a command is killed, nothing is lost or half, and the next start comes to the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KILLS = {
    "train": 12, "train-2-ranks": 8, "evaluate": 8, "predict": 8, "cache": 8, "merge": 4, "imports": 4,
    "exports": 4, "pq": 4,
}  # fmt: skip


def killed(command: str, kills: int, folder: Path) -> dict[str, int]:
    """What `killed_commands.py` counted."""
    script = [sys.executable, str(ROOT / "tests" / "killed_commands.py"), command, str(kills), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.serial
def test_a_few_kills(tmp_path: Path) -> None:
    found = killed("train", 2, tmp_path / "campaign")
    assert found.pop("kills") == 2 and found.pop("ends") >= 1
    assert not any(found.values())


@pytest.mark.soak
@pytest.mark.parametrize("command", KILLS)
def test_sixty_kills(command: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    found = killed(command, KILLS[command], tmp_path / "campaign")
    for name, value in found.items():
        record_property(name, value)
    assert found["kills"] == KILLS[command] and found["ends"] >= 1
    assert found["lost"] == found["half"] == found["left"] == found["different"] == 0


@pytest.mark.soak
def test_twenty_kills_of_ranks_that_share_pictures(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Every second time one rank alone is killed, and the other ends by itself."""
    found = killed("predict-2-ranks", 20, tmp_path / "campaign")
    for name, value in found.items():
        record_property(name, value)
    assert found.pop("kills") == 20 and found.pop("ends") >= 1
    assert not any(found.values())


def test_they_are_sixty() -> None:
    assert sum(KILLS.values()) == 60
