"""Reads PNGs whose pixels are labels, and makes maps of them: what the formats of most data sets share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.data.pictures import open_checked, read_content
from ldmseg_fast.data.pixel_formats import pillow_errors
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap
from ldmseg_fast.panoptic.format import MAX_ID, MAX_PIXELS

VOID = 255  # what most formats of 8 bits call unlabelled
_LOSSLESS = ("PNG", "BMP", "GIF", "TIFF", "PPM")
_MODES = ("1", "P", "L", "I;16", "I;16B", "I;16L", "I", "F")
_SMALL = {1: 255, 2: 85, 4: 17}  # bits of a grey PNG -> what Pillow multiplies its values with
_TABLE = 2**20  # largest label that is looked up in a table


def read_labels(path: Path) -> np.ndarray:
    """Reads the labels of a palette or grey picture, int32 [H, W]: the indices of its palette, or its grey values.

    Raises:
        DataError: missing, damaged, too large, stored with loss, or in colours; it names the file.
    """
    return labels_of(read_content(path), path)


def labels_of(content: bytes, path: str | Path) -> np.ndarray:
    """Decodes labels, int32 [H, W], as `read_labels` reads them from a file; `path` names it in errors.

    Raises:
        DataError: see `read_labels`.
    """
    with open_checked(path, content, MAX_PIXELS) as image:
        if image.format not in _LOSSLESS:
            raise DataError(f"{path}: {image.format}, which changes labels when it is saved; labels are PNGs")
        if image.mode not in _MODES:
            raise DataError(
                f"{path}: {image.mode} colours, where one label a pixel is expected; save the indices or grey values"
            )
        depth = content[24] if image.format == "PNG" and image.mode in ("1", "L") else 8
        with pillow_errors(path):
            labels = np.array(image)
    if labels.dtype.kind == "f" and (not np.isfinite(labels).all() or (labels != np.rint(labels)).any()):
        raise DataError(f"{path}: labels that are no whole numbers; save them as integers")
    labels = labels.astype(np.int32)
    if depth in _SMALL and labels.max(initial=0) > 1:  # Pillow scales grey values of few bits
        labels //= _SMALL[depth]
    if labels.min() < 0:
        raise DataError(f"{path}: negative labels; save them as unsigned integers")
    return labels


def read_colours(path: Path) -> np.ndarray:
    """Reads a picture whose colours are data, uint8 [H, W, 3]; alpha is dropped.

    Raises:
        DataError: missing, damaged, too large, stored with loss, or of another kind; it names the file.
    """
    return colours_of(read_content(path), path)


def colours_of(content: bytes, path: str | Path) -> np.ndarray:
    """Decodes colours, uint8 [H, W, 3], as `read_colours` reads them from a file; `path` names it in errors.

    Raises:
        DataError: see `read_colours`.
    """
    with open_checked(path, content, MAX_PIXELS) as image:
        if image.format not in _LOSSLESS:
            raise DataError(f"{path}: {image.format}, which changes values when it is saved; maps are PNGs")
        if image.mode not in ("RGB", "RGBA") or (image.format == "PNG" and content[24] != 8):
            raise DataError(f"{path}: mode {image.mode}, where three channels of 8 bits are expected")
        with pillow_errors(path):
            return np.array(image)[..., :3]


def map_of_keys(
    keys: np.ndarray,
    meaning: Callable[[int], tuple[int, bool] | None],
    path: Path,
    *,
    keep: bool = False,
    left_out: Mapping[str, int] | None = None,
) -> AnnotatedMap:
    """Makes a segment of each value of an array.

    Args:
        keys: integers [H, W], not negative.
        meaning: of a value: its category and whether it is a crowd, None: void. It may raise `DataError`.
        path: of the file, for errors.
        keep: values are the ids, which must fit three bytes; otherwise values get the ids 1, 2, ... in ascending order.
        left_out: of the map.

    Raises:
        DataError: an id that three bytes cannot hold, and what `meaning` raises.
    """
    present, dense = _present(keys)
    ids = np.zeros(len(present), np.int32)
    segments: list[dict[str, Any]] = []
    for place, key in enumerate(present.tolist()):
        found = meaning(key)
        if found is None:
            continue
        number = key if keep else len(segments) + 1
        if not 1 <= number <= MAX_ID:
            raise DataError(f"{path}: id {number} is not in 1..{MAX_ID}, which three bytes hold; renumber it")
        ids[place] = number
        segments.append({"id": number, "category_id": found[0], "iscrowd": int(found[1])})
    return AnnotatedMap(ids[dense], segments, dict(left_out or {}))


def _present(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of an array, ascending, and for each pixel the place of its value [H, W]."""
    if keys.size and keys.max() < _TABLE:  # several times faster than sorting
        flat = keys.ravel()
        present = np.flatnonzero(np.bincount(flat))
        places = np.zeros(int(keys.max()) + 1, np.int32)
        places[present] = np.arange(len(present))
        return present, places[keys]
    present, dense = np.unique(keys, return_inverse=True)
    return present, dense.reshape(keys.shape)


def unknown_label(path: Path, label: int, known: Iterable[int]) -> DataError:
    """Returns the error of a label that no category has."""
    listed = sorted(known)
    span = f"{listed[0]}..{listed[-1]}" if listed else "none"
    return DataError(f"{path}: label {label} is no category; known are {span}: is this the list of this data set?")


def same_size(path: Path, found: np.ndarray, other: Path, expected: np.ndarray) -> None:
    """Checks that two maps of one picture, integer [H, W] or [H, W, 3], have one size.

    Raises:
        DataError: names both files and sizes.
    """
    if found.shape[:2] != expected.shape[:2]:
        sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (found, expected)]
        raise DataError(f"{path} is {sizes[0]}, {other} {sizes[1]}: they belong to one picture")
