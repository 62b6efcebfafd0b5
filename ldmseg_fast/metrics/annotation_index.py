"""Reads the annotations of a COCO panoptic JSON one at a time, without holding the file's contents.

The format is panopticapi's, see `panoptic.annotations`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.matching import segment_table
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.annotations import judge_panoptic_json, stream_panoptic_json


@dataclass(frozen=True)
class AnnotationIndex:
    """Lists what a file holds, checked as `load_panoptic_json` does, and gets at one annotation.

    annotation(k) returns the PNG's name and the segments as int64 [S, 4] of the k-th of `image_ids` (see
    `segment_table`; areas of ground truth are those of the file). Any thread may call it.
    """

    image_ids: list[int | str]  # in the order of `annotations`
    categories: list[dict[str, Any]]  # empty where predictions do not list them
    used_categories: set[int]
    annotation: Callable[[int], tuple[str, np.ndarray]]


def index_annotations(path: str | Path, *, predictions: bool = False) -> AnnotationIndex:
    """Indexes a JSON. C++ reads the file in a stream and keeps about 100 bytes an image.

    Python reads and judges as a whole what C++ does not know: files with faults, and legal rarities.

    Raises:
        PanopticFormatError: what `load_panoptic_json` raises, in the same words.
    """
    return index_streamed(path, predictions) or _loaded(path, predictions)


def index_streamed(path: str | Path, predictions: bool) -> AnnotationIndex | None:
    """Indexes a JSON that C++ knows as plainly right; None for others."""
    index = stream_panoptic_json(path, predictions=predictions)
    if index is None:
        return None

    def annotation(k: int) -> tuple[str, np.ndarray]:
        try:
            return index.annotation(k)
        except _C.UnusualJson:
            raise PanopticFormatError(f"{path}: changed while it was being read; start again") from None

    return AnnotationIndex(
        index.image_ids, json.loads(index.categories or "[]"), set(index.used_categories), annotation
    )


def _loaded(path: str | Path, predictions: bool) -> AnnotationIndex:
    content = judge_panoptic_json(path, predictions=predictions)
    annotations = content["annotations"]

    def annotation(k: int) -> tuple[str, np.ndarray]:
        entry = annotations[k]
        return entry["file_name"], segment_table(entry["segments_info"], False, use_area=not predictions)

    used = {segment["category_id"] for entry in annotations for segment in entry["segments_info"]}
    image_ids = [entry["image_id"] for entry in annotations]
    return AnnotationIndex(image_ids, content.get("categories", []), used, annotation)
