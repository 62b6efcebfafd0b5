"""Reads the maps of a COCO-panoptic folder strictly; `pictures` reads its pictures, `panoptic.splits` finds both."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldmseg_fast.data.pictures import load_picture, open_image, read_image
from ldmseg_fast.data.transforms import TABLE_SIZE, dense_ids
from ldmseg_fast.errors import DataError, PanopticFormatError
from ldmseg_fast.files import read_file
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import MAX_PIXELS, read_panoptic_png
from ldmseg_fast.panoptic.splits import SplitFolders, find_split, list_splits

__all__ = [
    "DataError",
    "SplitFolders",
    "find_split",
    "list_splits",
    "load_picture",
    "open_image",
    "read_dense_map",
    "read_image",
]


def read_dense_map(
    path: str | Path, segment_ids: Sequence[int], *, crowd: Sequence[bool] = (), min_area: int = 0
) -> np.ndarray:
    """Reads a map and numbers its segments as `dense_ids` does: [H, W] with 0 void and 1..len(segment_ids).

    Returns:
        uint8 [H, W] for up to 255 segments, int32 [H, W] for more.

    Raises:
        PanopticFormatError: see `read_panoptic_png`.
        ValueError: an id of the map that `segment_ids` lacks.
        OSError: a file that cannot be read.
    """
    if _C is not None and len(segment_ids) < TABLE_SIZE:
        try:
            return _C.read_png(read_file(path, PanopticFormatError, "map"), MAX_PIXELS).dense_ids(
                segment_ids, crowd, min_area
            )
        except _C.UnreadablePng:
            pass  # interlaced or damaged: the other reader says which
    return dense_ids(read_panoptic_png(path), segment_ids, crowd=crowd, min_area=min_area)
