"""Small data sets in memory, and what an imported folder must hold."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.commands.data_check import check_folder
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.panoptic.format import read_panoptic_png

SIZE = (24, 32)


@pytest.fixture
def picture_at():
    """Writes a picture of noise, by default 32x24, and returns its path."""

    def make(path: Path, size=SIZE, seed=0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
        return path

    return make


@pytest.fixture
def png_at():
    """Writes an array as a PNG of its own depth: uint8 or uint16 [H, W], or uint8 [H, W, 3], and returns its path."""

    def make(path: Path, values: np.ndarray, palette: bool = False) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(values)
        if palette:
            image = image.copy()
            image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tolist())
        image.save(path)
        return path

    return make


@pytest.fixture
def imported():
    """Reads an imported split, by default once a check and a training have read it: name of the map -> its content.

    The content is {"ids": int32 [H, W], "categories": [H, W] with -1 void, "crowd": bool [H, W], "image", "segments"}.
    """

    def read(root: Path, split: str, checked: bool = True) -> dict:
        if checked:
            report = check_folder(root, workers=1)
            assert report.ok, report.table()
            assert len(list(CocoPanoptic(root, split, 16, train=True)))
        content = json.loads((root / "annotations" / f"panoptic_{split}.json").read_text())
        images = {image["id"]: image for image in content["images"]}
        maps = {}
        for annotation in content["annotations"]:
            ids = read_panoptic_png(root / f"panoptic_{split}" / annotation["file_name"])
            categories, crowd = np.full(ids.shape, -1), np.zeros(ids.shape, bool)
            for segment in annotation["segments_info"]:
                categories[ids == segment["id"]] = segment["category_id"]
                crowd[ids == segment["id"]] = segment["iscrowd"]
            maps[annotation["file_name"]] = {
                "ids": ids,
                "categories": categories,
                "crowd": crowd,
                "image": images[annotation["image_id"]],
                "segments": annotation["segments_info"],
            }
        maps["categories"] = content["categories"]
        return maps

    return read


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Tells whether two maps [H, W] divide the pixels alike, whatever the ids; 0 is void in both."""
    pairs = np.unique(one.astype(np.int64) * 2**32 + other)
    first, second = (len(np.unique(part)) for part in (pairs >> 32, pairs & (2**32 - 1)))
    return first == second == len(pairs) and np.array_equal(one == 0, other == 0)
