"""Shared by the tests of the app: one worker on the shipped model, and a picture of a scene with its true map."""

from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.app.work import Worker
from ldmseg_fast.panoptic.format import read_panoptic_png


@pytest.fixture(scope="session")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def scene(scenes: Path) -> tuple[Path, np.ndarray]:
    """A picture's file and its true ids, int32 [64, 64]."""
    picture = sorted((scenes / "val2017").glob("*.png"))[0]
    truth = next((scenes / "annotations").rglob(picture.name), None) or next(
        path for path in scenes.rglob(picture.name) if path != picture
    )
    return picture, read_panoptic_png(truth)
