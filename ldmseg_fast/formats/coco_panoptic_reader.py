"""Reads COCO-panoptic folders, and results of prediction and evaluation, as data sets.

The format is cocodataset.org/#format-data, "Panoptic Segmentation". `panoptic.annotations` reads the JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.data.folders import find_split, list_splits
from ldmseg_fast.data.orientation import turned
from ldmseg_fast.data.picture_folders import FoundPicture
from ldmseg_fast.data.pictures import Picture, read_picture, stored_size
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import read_file, text_of
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.panoptic.annotations import load_panoptic_json
from ldmseg_fast.panoptic.format import read_panoptic_png
from ldmseg_fast.panoptic.near_files import NearFiles, missing_files

PREDICTED = "predicted"  # the split that results make
_KEPT = ("id", "name", "isthing", "supercategory", "color")  # of a category
_OBJECT = {"id": 1, "name": "object", "isthing": 1}


def read(source: str | Path, options: ReadOptions) -> DataSet:
    """Reads the splits of a COCO-panoptic folder: those of `options.splits`, or all.

    Raises:
        DataError: no such split, missing files, or splits whose categories contradict each other. An entry's `read`
            raises it where map, picture and JSON do not fit.
        PanopticFormatError: a JSON or a map that breaks the format.
    """
    source = Path(source)
    splits = options.splits or tuple(list_splits(source))
    if not splits:
        raise DataError(f"{source}: no annotations/panoptic_SPLIT.json; a COCO-panoptic folder has one for each split")
    categories: dict[int, dict[str, Any]] = {}
    entries: dict[str, list[Entry]] = {}
    for split in splits:
        folders = find_split(source, split)
        content = load_panoptic_json(folders.annotations)
        _add_categories(categories, content["categories"], folders.annotations)
        images = {image["id"]: image for image in content["images"]}
        annotated = [(images[annotation["image_id"]], annotation) for annotation in content["annotations"]]
        folders.check_files(
            [image["file_name"] for image, _ in annotated], [annotation["file_name"] for _, annotation in annotated]
        )
        entries[split] = [
            _entry(image["file_name"], folders.images / image["file_name"], folders.maps, annotation, image)
            for image, annotation in annotated
        ]
    return DataSet(list(categories.values()), entries)


def read_results(path: str | Path, pictures: str | Path) -> DataSet:
    """Reads a result file of any method: NAME.json with the maps NAME/*.png beside it, as `ldmseg evaluate` writes it.

    Args:
        path: the JSON.
        pictures: the folder with the pictures that its `images` name.

    Raises:
        DataError: a JSON without `images`, or missing files.
        PanopticFormatError: a JSON or a map that breaks the format.
    """
    path, pictures = Path(path), Path(pictures)
    content = load_panoptic_json(path, predictions=True)
    images = {image["id"]: image for image in content.get("images", ()) if "file_name" in image}
    if unnamed := [each["image_id"] for each in content["annotations"] if each["image_id"] not in images]:
        raise DataError(f"{path}: `images` gives no file_name for {unnamed[0]!r}: which picture is it?")
    annotated = [(images[annotation["image_id"]], annotation) for annotation in content["annotations"]]
    maps = path.with_suffix("")
    for folder, names, what in (
        (pictures, [image["file_name"] for image, _ in annotated], "picture"),
        (maps, [annotation["file_name"] for _, annotation in annotated], "map"),
    ):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; it should have the {what}s that {path} names")
        if lost := missing_files(folder, names):
            near = NearFiles(folder).explain(lost)
            raise DataError(f"{len(lost)} of {len(names)} {what}s of {path} are not in {folder}, {near}")
    categories: dict[int, dict[str, Any]] = {}
    _add_categories(categories, content.get("categories") or _named(content["annotations"]), path)
    entries = [
        _entry(image["file_name"], pictures / image["file_name"], maps, each, image) for image, each in annotated
    ]
    return DataSet(list(categories.values()), {PREDICTED: entries})


def read_predictions(folder: str | Path, pictures: Iterable[FoundPicture], *, exif: bool = True) -> DataSet:
    """Reads what `ldmseg predict` has written for pictures: NAME.png and NAME.json of each.

    Args:
        folder: of the results.
        pictures: that have results.
        exif: whether pictures were turned as their EXIF orientation says. Their maps are turned back: data sets hold
            stored pixels.

    Raises:
        DataError: a missing or damaged JSON. An entry's `read` raises it where the map does not fit the picture.
    """
    folder = Path(folder)
    entries, annotations = [], []
    for picture in pictures:
        path = folder / picture.folder / f"{picture.file.stem}.json"
        record = _record(path)
        annotations.append(record)
        name = (picture.folder / picture.file.name).as_posix()
        entries.append(_entry(name, picture.file, path.parent, record, {}, exif))
    return DataSet(_named(annotations), {PREDICTED: entries})


def _entry(
    name: str,
    picture: Path,
    maps: Path,
    annotation: Mapping[str, Any],
    image: Mapping[str, Any],
    exif: bool = False,
) -> Entry:
    path = maps / annotation["file_name"]
    size = (int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None
    read_map: Callable[[], AnnotatedMap] = partial(_read_map, path, picture, annotation["segments_info"], size, exif)
    return Entry(name, picture, read_map, annotation.get("image_id"), (path,))


def _read_map(
    path: Path, picture: Path, segments: list[dict[str, Any]], size: tuple[int, int] | None, exif: bool
) -> AnnotatedMap:
    """Reads a map and checks it against its picture and its JSON."""
    try:
        ids = read_panoptic_png(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; write the map again") from error
    if exif:
        shown = read_picture(picture)
        ids, stored = _turned_back(ids, shown), shown.stored_size
    else:
        stored = stored_size(picture)
    for what, other in ((f"the picture {picture}", stored), ("the JSON", size)):
        if other is not None and other != ids.shape:
            raise DataError(
                f"{path}: {ids.shape[1]}x{ids.shape[0]} pixels, {what} has {other[1]}x{other[0]}; correct or leave out "
                "one of them"
            )
    present = set(np.unique(ids).tolist()) - {0}
    known = {segment["id"] for segment in segments}
    if unlisted := sorted(present - known):
        raise DataError(
            f"{path}: ids in the map that segments_info does not list: {unlisted[:5]}; list them, or make them void (0)"
        )
    kept = [
        {"id": each["id"], "category_id": each["category_id"], "iscrowd": int(each.get("iscrowd", 0))}
        | ({"score": each["score"]} if _is_score(each.get("score")) else {})
        for each in sorted(segments, key=lambda segment: segment["id"])
        if each["id"] in present
    ]
    empty = len(segments) - len(kept)
    return AnnotatedMap(ids, kept, {"segments without a pixel": empty} if empty else {})


def _turned_back(ids: np.ndarray, shown: Picture) -> np.ndarray:
    """Turns a map of a picture as viewers show it to how the picture is stored."""
    if not shown.turned:
        return ids
    return np.asarray(turned(Image.fromarray(ids), shown.orientation, exif=False, by_itself=True), np.int32)


def _record(path: Path) -> dict[str, Any]:
    """Reads the JSON of one predicted picture."""
    try:
        record = json.loads(text_of(read_file(path, DataError, "JSON file")))
        whole = isinstance(record["file_name"], str) and all(
            type(segment["id"]) is int and type(segment["category_id"]) is int and segment.get("iscrowd", 0) in (0, 1)
            for segment in record["segments_info"]
        )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; predict the picture again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DataError(f"{path}: no result of `ldmseg predict`, or damaged; predict the picture again")
    return record


def _named(annotations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lists the categories of results that do not: by the `name` of segments, and 1 without one is an object."""
    found: dict[int, dict[str, Any]] = {}
    for annotation in annotations:
        for segment in annotation["segments_info"]:
            number, name = segment["category_id"], segment.get("name")
            if not isinstance(name, str) or not name:
                name = _OBJECT["name"] if number == _OBJECT["id"] else f"category {number}"
            isthing = int(bool(segment.get("isthing", True)))
            found.setdefault(number, {"id": number, "name": name, "isthing": isthing})
    return [found[number] for number in sorted(found)] or [_OBJECT]


def _add_categories(known: dict[int, dict[str, Any]], found: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Adds a split's categories.

    Raises:
        DataError: an id that another split gives another name or kind.
    """
    for each in found:
        category = {key: each[key] for key in _KEPT if key in each}
        for key, fits in _UNCHECKED.items():
            if key in category and not fits(category[key]):
                del category[key]
        category.setdefault("name", f"category {each['id']}")
        category["isthing"] = int(category.get("isthing", 1))
        other = known.setdefault(category["id"], category)
        if any(other[key] != category[key] for key in ("name", "isthing")):
            raise DataError(
                f"{path}: category {category['id']} is {_described(category)}, in another split "
                f"{_described(other)}; write them alike, or name one --split"
            )


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(each) is int and 0 <= each <= 255 for each in value)


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# keys that `load_panoptic_json` does not look at; what is none of them is left out
_UNCHECKED: dict[str, Callable[[Any], bool]] = {
    "color": _is_colour,
    "supercategory": lambda value: isinstance(value, str),
}


def _described(category: Mapping[str, Any]) -> str:
    return f"{category['name']!r} ({'thing' if category['isthing'] else 'stuff'})"
