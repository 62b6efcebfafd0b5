"""A small COCO-panoptic folder that tests may damage."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.panoptic.format import write_panoptic_png


class Folder:
    """One split "val" under root, written picture by picture."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.json = root / "annotations" / "panoptic_val.json"
        self.content: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "object"}]}
        for folder in ("annotations", "val", "panoptic_val"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    def add(self, picture: Image.Image | np.ndarray, ids: np.ndarray, suffix: str = "jpg", crowd: tuple = ()) -> int:
        """A picture and its map; returns the index."""
        index = len(self.content["images"])
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        picture.save(self.root / "val" / f"{index}.{suffix}")
        write_panoptic_png(self.root / "panoptic_val" / f"{index}.png", ids)
        segments = [
            {"id": int(i), "category_id": 1, "iscrowd": int(i in crowd), "area": int(n), "bbox": [0, 0, 1, 1]}
            for i, n in zip(*np.unique(ids, return_counts=True))
            if i
        ]
        height, width = ids.shape
        self.content["images"].append({"id": index, "file_name": f"{index}.{suffix}", "height": height, "width": width})
        self.content["annotations"].append({"image_id": index, "file_name": f"{index}.png", "segments_info": segments})
        self.save()
        return index

    def save(self) -> None:
        self.json.write_text(json.dumps(self.content))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "coco")


@pytest.fixture
def quarters() -> Callable[[int, int], np.ndarray]:
    """A map of four segments with ids of three bytes."""

    def make(height: int, width: int) -> np.ndarray:
        down, right = np.arange(height) >= height // 2, np.arange(width) >= width // 2
        return np.array([[70_001, 5], [16_777_215, 900]], np.int32)[down.astype(int)][:, right.astype(int)]

    return make


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation scenes of 64x64. Not to be changed."""
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", 24, 64, seed=7, workers=1, version=1)
