"""Reads COCO annotations with masks, RLE or polygons, as maps: instances with `images`, or a list of results.

The format is https://cocodataset.org/#format-data, "Object Detection", and https://cocodataset.org/#format-results,
"Segmentation Detection".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.files import read_file, text_of, without_repeats
from ldmseg_fast.metrics.mask_maps import MaskMap, Size, paint_masks, size_of_masks
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.annotations import MAX_NUMBER, category_faults, without_collector
from ldmseg_fast.panoptic.format import MAX_PIXELS, MAX_SIDE


@dataclass(frozen=True)
class MaskFile:
    """Holds the annotations of a file by image; see `metrics.sources.Source` for what its members are."""

    path: Path
    image_ids: list[int | str]
    categories: list[dict[str, Any]]
    lists_images: bool
    annotations: dict[int | str, list[tuple[int, dict[str, Any]]]]  # place in the file, annotation
    sizes: dict[int | str, Size] = field(default_factory=dict)
    names: dict[int | str, Any] = field(default_factory=dict)

    @property
    def used_categories(self) -> set[int]:
        return {entry["category_id"] for entries in self.annotations.values() for _, entry in entries}

    def size(self, k: int) -> Size | None:
        """Returns (H, W) as `images` or run lengths tell it."""
        image_id = self.image_ids[k]
        if image_id in self.sizes:
            return self.sizes[image_id]
        entries = self.annotations.get(image_id, [])
        return size_of_masks(
            [entry["segmentation"] for _, entry in entries], lambda place: self._where(entries[place][0])
        )

    def read(self, k: int, size: Size | None, things: Collection[int]) -> tuple[MaskMap, np.ndarray]:
        """Paints the masks of image k, and returns the map and the table of what is left, int64 [S, 4].

        Raises:
            PanopticFormatError: names the annotation; see `paint_masks`.
        """
        entries = self.annotations.get(self.image_ids[k], [])
        final = self.size(k) or size
        if final is None:
            raise PanopticFormatError(
                f"{self.path}: nothing tells the size of image {self.image_ids[k]!r}: give it `height` and `width` in "
                "`images`"
            )
        above = [entry["category_id"] in things and not entry.get("iscrowd", 0) for _, entry in entries]
        painted = paint_masks(
            [entry["segmentation"] for _, entry in entries], above, final, lambda place: self._where(entries[place][0])
        )
        gone = set(painted.gone)
        rows = [
            (place + 1, entry["category_id"], int(entry.get("iscrowd", 0)), -1)
            for place, (_, entry) in enumerate(entries)
            if place not in gone
        ]
        return painted, np.array(rows, np.int64).reshape(-1, 4)

    def details(self, k: int) -> list[dict[str, Any]]:
        """Lists the segments of image k as `segments_info`, the numbers of `read` as ids."""
        listed = []
        for place, (_, entry) in enumerate(self.annotations.get(self.image_ids[k], [])):
            segment = {"id": place + 1, "category_id": entry["category_id"], "iscrowd": int(entry.get("iscrowd", 0))}
            listed.append(segment | ({"score": entry["score"]} if "score" in entry else {}))
        return listed

    def _where(self, place: int) -> str:
        return _where(self.path, place)


class StreamedMasks:
    """Holds where the annotations of a file stand in it, and reads those of one image at a time by C++.

    It has the members of `MaskFile`. Any thread may call `read`.
    """

    def __init__(self, path: Path, index: Any, predictions: bool, categories: list[dict[str, Any]]) -> None:
        self.path, self._index, self._predictions, self.categories = path, index, predictions, categories
        self.image_ids: list[int | str] = index.image_ids
        self.used_categories = set(index.used_categories)
        self.lists_images: bool = index.lists_images

    @cached_property
    def _whole(self) -> MaskFile:
        """The file as Python reads it: for what C++ does not know, and for words for what is wrong."""
        found = load_mask_file(self.path, predictions=self._predictions)
        if found is None or found.image_ids != self.image_ids:
            raise PanopticFormatError(f"{self.path}: changed while it was being read; start again")
        return found

    @property
    def names(self) -> dict[int | str, Any]:
        return self._whole.names

    def size(self, k: int) -> Size | None:
        """See `MaskFile.size`."""
        try:
            height, width = self._index.size(k)
        except ValueError:  # UnusualJson, BadMask
            return self._whole.size(k)
        return (height, width) if height else None

    def read(self, k: int, size: Size | None, things: Collection[int]) -> tuple[MaskMap, np.ndarray]:
        """See `MaskFile.read`."""
        try:
            above = np.array(sorted(things), np.int64)
            found, columns, gone, hidden, table = self._index.paint(k, above, *(size or (0, 0)))
        except ValueError:
            return self._whole.read(k, size, things)
        return MaskMap(found, columns, gone, hidden), table

    def details(self, k: int) -> list[dict[str, Any]]:
        """See `MaskFile.details`."""
        return self._whole.details(k)

    def match(
        self, k: int, pred: StreamedMasks, pred_k: int, things: np.ndarray, category: int
    ) -> tuple[np.ndarray, list[int], list[int]] | None:
        """Matches image k with image `pred_k` of the predictions in one call of C++, without maps.

        Args:
            things: category ids, ascending, int64 [N].
            category: of all segments, -1 for their own.

        Returns:
            Rows of `MATCH_DTYPE`, and of ground truth and prediction the pixels that are hidden and the number of masks
            that are gone, see `MaskMap`; None where `read` has to paint, or to tell what is wrong.
        """
        try:
            return _C.match_masks(self._index, k, pred._index, pred_k, things, category)
        except ValueError:
            return None


def open_mask_file(path: Path, *, predictions: bool) -> MaskFile | StreamedMasks | None:
    """Opens a file of masks; None where it is none. C++ indexes what is plainly right, Python reads all else.

    Raises:
        PanopticFormatError: see `load_mask_file`.
        OSError: a file that cannot be read.
    """
    if _C is not None and path.is_file():
        try:
            index = _C.MaskIndex(os.fsencode(path), predictions)
            categories = json.loads(index.categories or "[]", parse_constant=_refuse, object_pairs_hook=without_repeats)
        except ValueError:
            return load_mask_file(path, predictions=predictions)
        known = {category.get("id") for category in categories if isinstance(category, dict)}
        if not any(category_faults(categories)) and (not index.categories or known >= set(index.used_categories)):
            return StreamedMasks(path, index, predictions, categories)
    return load_mask_file(path, predictions=predictions)


def load_mask_file(path: Path, *, predictions: bool) -> MaskFile | None:
    """Reads a file of masks whole; None where it is no such file, but perhaps a panoptic JSON.

    Args:
        predictions: `images` and `categories` may be missing, and so the object around the list of annotations.

    Raises:
        PanopticFormatError: names the file, the annotation and the cure.
        OSError: a file that cannot be read.
    """
    raw = read_file(path, PanopticFormatError, "JSON file")
    if b'"segments_info"' in raw[:1_000_000] and b'"segmentation"' not in raw[:1_000_000]:
        return None
    try:
        text = text_of(raw)
        content = without_collector(lambda: json.loads(text, parse_constant=_refuse, object_pairs_hook=without_repeats))
    except (ValueError, RecursionError) as error:
        if b'"segmentation"' not in raw:
            return None  # the panoptic reader has the words
        raise PanopticFormatError(f"{path}: not a JSON file ({error})") from None
    if content == []:
        raise PanopticFormatError(f"{path}: the list has no annotations; is it of the right split?")
    is_list = isinstance(content, list)
    listed = content if is_list else content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(listed, list) or any(isinstance(e, dict) and "segments_info" in e for e in listed[:1]):
        return None
    has_masks = any(isinstance(entry, dict) and "segmentation" in entry for entry in listed)
    if not has_masks and not (is_list and _are_results(listed)):
        return None
    return _checked(path, {"annotations": listed} if is_list else content, is_list, predictions)


def _are_results(listed: list[Any]) -> bool:
    """Tells whether a list is one of results without masks: boxes, which the checks refuse by name."""
    return len(listed) > 0 and all(isinstance(entry, dict) and "image_id" in entry for entry in listed)


def _checked(path: Path, content: dict[str, Any], is_list: bool, predictions: bool) -> MaskFile:
    if not predictions:
        for key in ("images", "categories"):
            if not isinstance(content.get(key), list):
                raise PanopticFormatError(
                    f"{path}: `{key}` is missing; ground truth without PNGs needs images, annotations and categories"
                )
    categories = content.get("categories", [])
    if not isinstance(categories, list):
        raise PanopticFormatError(f"{path}: `categories` must be a list, got {categories!r:.80}")
    for fault in category_faults(categories):
        raise PanopticFormatError(f"{path}: {fault.message}")
    known = {category["id"] for category in categories} if "categories" in content else None
    image_ids: list[int | str] = []
    sizes: dict[int | str, Size] = {}
    names: dict[int | str, Any] = {}
    if "images" in content:
        if not isinstance(content["images"], list):
            raise PanopticFormatError(f"{path}: `images` must be a list, got {content['images']!r:.80}")
        for place, image in enumerate(content["images"]):
            image_id = _image_id(path, f"images[{place}]", image, "id")
            if image_id in names:
                raise PanopticFormatError(f"{path}: images[{place}]: `id` {image_id!r} appears twice; keep one entry")
            image_ids.append(image_id)
            names[image_id] = image.get("file_name")
            if "height" in image or "width" in image:
                sizes[image_id] = _size(path, place, image)
    annotations: dict[int | str, list[tuple[int, dict[str, Any]]]] = {}
    for place, entry in enumerate(content["annotations"]):
        image_id = _image_id(path, f"annotations[{place}]", entry, "image_id")
        if "images" in content and image_id not in names:
            raise PanopticFormatError(
                f"{_where(path, place)} belongs to image {image_id!r}, which `images` does not list; add it there"
            )
        if image_id not in annotations and "images" not in content:
            image_ids.append(image_id)
        _check_annotation(path, place, entry, known)
        annotations.setdefault(image_id, []).append((place, entry))
    return MaskFile(path, image_ids, categories, "images" in content, annotations, sizes, names)


def _check_annotation(path: Path, place: int, entry: dict[str, Any], known: set[int] | None) -> None:
    where = _where(path, place)
    category, crowd, score = entry.get("category_id"), entry.get("iscrowd", 0), entry.get("score", 0)
    if type(category) is not int or not 0 <= category <= MAX_NUMBER or (known is not None and category not in known):
        raise PanopticFormatError(f"{where} has unknown category_id {category!r:.80}; give it one of `categories`")
    if type(crowd) not in (int, bool, float) or crowd not in (0, 1):
        raise PanopticFormatError(f"{where}: `iscrowd` must be 0 or 1, got {crowd!r:.80}")
    if type(score) not in (int, float) or not math.isfinite(score):
        raise PanopticFormatError(f"{where}: `score` must be a number, got {score!r:.80}")
    if not isinstance(entry.get("segmentation"), dict | list):
        raise PanopticFormatError(
            f"{where} has no `segmentation` of run lengths or polygons, got {entry.get('segmentation')!r:.80}; boxes "
            "are no masks"
        )


def _image_id(path: Path, where: str, entry: Any, key: str) -> int | str:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if (type(value) is int and -(2**63) <= value < 2**63) or (isinstance(value, str) and value):
        return value
    raise PanopticFormatError(
        f"{path}: {where} has no usable `{key}`, got {value if isinstance(entry, Mapping) else entry!r:.80}; give it a "
        "whole number or a text"
    )


def _size(path: Path, place: int, image: Mapping[str, Any]) -> Size:
    sides: tuple[Any, Any] = image.get("height"), image.get("width")
    for side in sides:
        if type(side) not in (int, float) or not 1 <= side <= MAX_SIDE or side != int(side):
            raise PanopticFormatError(
                f"{path}: images[{place}]: `height` and `width` must be whole numbers of 1 to {MAX_SIDE} pixels, got "
                f"{sides[0]!r:.40} and {sides[1]!r:.40}"
            )
    height, width = int(sides[0]), int(sides[1])
    if height * width > MAX_PIXELS:
        raise PanopticFormatError(f"{path}: images[{place}]: {width}x{height} is over {MAX_PIXELS} pixels")
    return height, width


def _where(path: Path, place: int) -> str:
    return f"{path}: annotations[{place}]"


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON value; write a number or leave it out")
