"""Reads panoptic JSONs beside PNGs in data sets whose folders lie otherwise than COCO's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.panoptic.annotations import load_panoptic_json
from ldmseg_fast.panoptic.format import read_panoptic_png

ABSENT = "segments of the JSON that no pixel has"
_KEPT = ("id", "name", "isthing", "supercategory", "color")  # of a category


def read_panoptic(path: Path, maps: Path, split: str, find: Callable[[str], Path], pictures: Path) -> DataSet:
    """Reads one split.

    Args:
        path: of the JSON.
        maps: the folder with its PNGs.
        split: its name.
        find: returns a picture by the file name that the JSON has.
        pictures: the folder that pictures keep their names in.

    Raises:
        PanopticFormatError: a JSON that breaks the format.
        DataError: a folder or file that is not there. An entry's `read` raises it where map and JSON do not fit.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not maps.is_dir():
        raise DataError(f"{maps}: no such folder; it should have the PNGs of {path}")
    content = load_panoptic_json(path)
    images = {image["id"]: image for image in content["images"]}
    entries = []
    for annotation in content["annotations"]:
        picture = find(images[annotation["image_id"]]["file_name"])
        file = maps / annotation["file_name"]
        entries.append(
            Entry(
                picture.relative_to(pictures).as_posix(),
                picture,
                partial(read_map, file, annotation["segments_info"]),
                annotation["image_id"],
                (file, path),
            )
        )
    categories = [{key: each[key] for key in _KEPT if key in each} for each in content["categories"]]
    return DataSet([{"isthing": 1, **each} for each in categories], {split: entries})


def read_map(path: Path, infos: list[dict[str, Any]]) -> AnnotatedMap:
    """Reads a panoptic PNG with the segments that its JSON gives.

    Raises:
        DataError: an id of the map that the JSON does not have; it names the file and the id.
        PanopticFormatError: a PNG that breaks the format.
    """
    return with_segments(read_panoptic_png(path), infos, path)


def with_segments(ids: np.ndarray, infos: Sequence[Mapping[str, Any]], path: str | Path) -> AnnotatedMap:
    """Joins a map, int32 [H, W], with its segments, which have `id`, `category_id` and perhaps `iscrowd`.

    Raises:
        DataError: an id of the map that no segment has; it names the file and the id.
    """
    present = set(np.unique(ids).tolist()) - {0}
    unlisted = sorted(present - {info["id"] for info in infos})
    if unlisted:
        raise DataError(f"{path}: id {unlisted[0]} is not in segments_info; do map and JSON belong together?")
    segments = [
        {"id": info["id"], "category_id": info["category_id"], "iscrowd": int(bool(info.get("iscrowd", 0)))}
        for info in sorted(infos, key=lambda info: info["id"])
        if info["id"] in present
    ]
    return AnnotatedMap(ids, segments, {ABSENT: len(infos) - len(segments)} if len(infos) > len(segments) else {})
