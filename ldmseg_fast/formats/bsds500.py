"""Reads BSDS500: images/SPLIT/*.jpg with groundTruth/SPLIT/*.mat.

The format is https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/resources.html: a .mat holds the cell
array `groundTruth`, one struct for each annotator, whose field `Segmentation` numbers the segments from 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import map_of_keys
from ldmseg_fast.formats.matlab import label_matrix, read_mat
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.source_files import WITHOUT, by_stem, files_below, first_folder, paired, pictures_below

_ID = 1
CATEGORY = {"id": _ID, "name": "object", "isthing": 1}
_ROOTS = ("", "data", "BSDS500/data", "BSR/BSDS500/data")


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads BSDS500. Each annotator's map makes an image of its own, all with the picture's file name.

    Raises:
        DataError: no such folders, maps without picture, or a .mat that cannot be read.
    """
    options.one_version((), "BSDS500")
    root = first_folder(source, tuple(f"{root}/groundTruth".lstrip("/") for root in _ROOTS), "BSDS500's maps").parent
    pictures = first_folder(root, ("images",), "BSDS500's pictures")
    splits, without = {}, 0
    folders = {path.name: path for path in sorted((root / "groundTruth").iterdir()) if path.is_dir()}
    for split in options.chosen(folders, source):
        found = by_stem(pictures_below(pictures / split), pictures / split)
        pairs, more = paired(found, by_stem(files_below(folders[split], (".mat",)), folders[split]), pictures / split)
        without += more
        progress = tqdm(pairs, desc=f"annotators of {split}", unit="file", disable=None)
        splits[split] = [
            entry for name, picture, path in progress for entry in _entries(name, picture, path, pictures / split)
        ]
    return DataSet([CATEGORY], splits, {WITHOUT: without})


def _entries(name: str, picture: Path, path: Path, folder: Path) -> Iterator[Entry]:
    for number in range(len(_annotators(path))):
        yield Entry(
            picture.relative_to(folder).as_posix(),
            picture,
            partial(read_annotator, path, number),
            f"{name}_a{number}",
            (path,),
        )


def read_annotator(path: Path, number: int) -> AnnotatedMap:
    """Reads the map of one annotator; the segments keep their numbers.

    Args:
        path: of the .mat.
        number: of the annotator, from 0.

    Raises:
        DataError: a file that cannot be read or has no such annotator.
    """
    annotators = _annotators(path)
    if number >= len(annotators):
        raise DataError(f"{path}: {len(annotators)} annotators, one at place {number} expected; was it replaced?")
    try:
        values = annotators[number]["Segmentation"][0, 0]
    except (ValueError, IndexError, TypeError, KeyError):
        raise DataError(f"{path}: annotator {number} has no field Segmentation") from None
    labels = label_matrix(values, path, "Segmentation")
    return map_of_keys(labels, lambda label: (_ID, False) if label else None, path, keep=True)


def _annotators(path: Path) -> list[Any]:
    try:
        return _annotators_of(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None


@lru_cache(maxsize=8)  # all annotators of a picture are read one after another
def _annotators_of(path: Path, changed: int) -> list[Any]:
    cells = read_mat(path, "groundTruth")
    if not isinstance(cells, np.ndarray) or cells.dtype != object or not cells.size:
        raise DataError(f"{path}: groundTruth is no cell array of annotators")
    return list(cells.ravel())
