"""Data sets with every kind of segment, and what of one must come back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.panoptic.format import read_panoptic_png

CATEGORIES = [
    {"id": 3, "name": "dog", "isthing": 1},
    {"id": 5, "name": "größe & <x>", "isthing": 1, "color": [10, 200, 30]},
    {"id": 9, "name": "sky", "isthing": 0},
]


def annotated(ids: np.ndarray, seed: int = 0, crowd: bool = False, scores: bool = False) -> AnnotatedMap:
    """A map [H, W] whose segments have categories; stuff has one segment a category."""
    rng = np.random.default_rng(seed)
    segments, stuff = [], False
    for number in (int(each) for each in np.unique(ids) if each):
        category = 3 if stuff else int(rng.choice([3, 5, 9]))
        stuff |= category == 9
        segment = {"id": number, "category_id": category, "iscrowd": int(crowd and category == 5)}
        segments.append(segment | ({"score": round(float(rng.uniform()), 3)} if scores else {}))
    return AnnotatedMap(ids.astype(np.int32), segments)


def data_set(
    folder: Path, maps: dict[str, AnnotatedMap], split: str = "val", categories: list | None = None
) -> DataSet:
    """A data set of maps in memory, whose pictures lie in `folder`."""
    entries = []
    for number, (name, each) in enumerate(maps.items(), 1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (*each.ids.shape, 3), np.uint8)
        Image.fromarray(noise).save(path)
        entries.append(Entry(name, path, lambda each=each: each, number, ()))
    return DataSet(categories or CATEGORIES, {split: entries})


def described(each: AnnotatedMap, categories: list[dict], crowd: bool = True) -> dict[tuple, tuple]:
    """What a map says, whatever its ids: pixels of each segment -> name of its category, thing or not, crowd or not."""
    named = {category["id"]: category for category in categories}
    assert each.ids.dtype == np.int32
    assert [segment["id"] for segment in each.segments] == [int(i) for i in np.unique(each.ids) if i]
    return {
        tuple(np.flatnonzero(each.ids == segment["id"])): (
            named[segment["category_id"]]["name"],
            named[segment["category_id"]]["isthing"],
            crowd and segment["iscrowd"],
        )
        for segment in each.segments
    }


def noise(seed: int, height: int, width: int, void: bool = True) -> np.ndarray:
    """Blocks of four ids with holes and pieces that touch at corners, int [H, W]."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0 if void else 1, 5, (height // 3 + 1, width // 3 + 1))
    return blocks.repeat(3, 0).repeat(3, 1)[:height, :width] * 11


def coco_maps(shared: Path, name: str) -> tuple[dict[str, AnnotatedMap], list[dict]]:
    """Maps of COCO's photographs with their void and crowds, by picture, and the categories."""
    root = shared / "data" / "coco_mini"
    content = json.loads((root / "annotations" / f"{name}.json").read_text())
    maps = {}
    for annotation in content["annotations"]:
        ids = read_panoptic_png(root / "panoptic_val2017" / annotation["file_name"])
        segments = [
            {key: segment[key] for key in ("id", "category_id", "iscrowd")}
            for segment in sorted(annotation["segments_info"], key=lambda segment: segment["id"])
        ]
        maps[annotation["file_name"].replace(".png", ".jpg")] = AnnotatedMap(ids, segments)
    return maps, content["categories"]
