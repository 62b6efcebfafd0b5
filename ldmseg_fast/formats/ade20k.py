"""Reads the full ADE20K: pictures with *_seg.png beside them.

The format is https://github.com/CSAILVision/ADE20K: of a pixel's R, G, B the class is R / 10 * 256 + G, from 1, and B
tells the instances of a picture apart. The names of the classes stand in the picture's JSON as `name_ndx` and `name`,
and in the first release, of 2016, in index_ade20k.mat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import map_of_keys, read_colours, unknown_label
from ldmseg_fast.formats.matlab import read_mat
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.source_files import by_stem, files_below, first_folder, paired, read_object

_FOLDERS = ("images/ADE", "images", "ADE20K_2021_17_01/images/ADE", "ADE20K_2016_07_26/images")
_SEG = "_seg"
_INDEX = "index_ade20k.mat"


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads ADE20K, in which each object is an instance: all classes are things until `options.things` says otherwise.

    Parts of objects are left out. Splits are the folders training and validation.

    Raises:
        DataError: no such folders, maps without picture, or no names of classes. An entry's `read` raises it for a
            class without name.
    """
    options.one_version((), "ADE20K")
    folder = first_folder(source, _FOLDERS, "ADE20K's pictures")
    pairs = {}
    for split in options.chosen(sorted(path.name for path in folder.iterdir() if path.is_dir()), source):
        maps = by_stem(files_below(folder / split, (f"{_SEG}.png",)), folder / split, lambda s: s.removesuffix(_SEG))
        pictures = by_stem(files_below(folder / split, (".jpg", ".jpeg")), folder / split)
        if maps:
            pairs[split], _ = paired(pictures, maps, folder / split)
    if not pairs:
        raise DataError(f"{folder}: no SPLIT/.../*_seg.png; is this the full ADE20K?")
    names = _names(source, folder, [picture for each in pairs.values() for _, picture, _ in each])
    splits = {
        split: [
            Entry(
                picture.relative_to(folder / split).as_posix(), picture, partial(read_seg, path, names), sources=(path,)
            )
            for _, picture, path in each
        ]
        for split, each in pairs.items()
    }
    categories = [{"id": number, "name": names[number], "isthing": 1} for number in sorted(names)]
    return DataSet(categories, splits)


def read_seg(path: Path, names: Mapping[int, str]) -> AnnotatedMap:
    """Reads a *_seg.png.

    Raises:
        DataError: a map that cannot be read, or a class without name.
    """
    colours = read_colours(path).astype(np.int32)
    classes = colours[..., 0] // 10 * 256 + colours[..., 1]
    keys = np.where(classes > 0, classes * 256 + colours[..., 2], 0)

    def meaning(key: int) -> tuple[int, bool] | None:
        if key and key // 256 not in names:
            raise unknown_label(path, key // 256, names)
        return (key // 256, False) if key else None

    return map_of_keys(keys, meaning, path)


def _names(source: Path, folder: Path, pictures: Sequence[Path]) -> dict[int, str]:
    """Gathers the classes' names from the index or from the JSON beside each picture."""
    index = next((each / _INDEX for each in (source, folder.parent, folder) if (each / _INDEX).is_file()), None)
    if index is not None:
        return _names_of_index(index)
    names: dict[int, str] = {}
    for picture in tqdm(pictures, desc="classes", unit="file", disable=None):
        path = picture.with_suffix(".json")
        annotation = read_object(path, ("annotation",), latin=True)["annotation"]
        objects = annotation.get("object") if isinstance(annotation, dict) else None
        for each in objects if isinstance(objects, list) else [objects]:
            number, name = (each.get("name_ndx"), each.get("name")) if isinstance(each, dict) else (None, None)
            if type(number) is not int or number < 1 or not isinstance(name, str) or not name:
                raise DataError(f"{path}: an object without name_ndx and name, got {each!r:.80}")
            if names.setdefault(number, name) != name:
                raise DataError(f"{path}: class {number} is {name!r}, elsewhere {names[number]!r}")
    return names


def _names_of_index(path: Path) -> dict[int, str]:
    index: Any = read_mat(path, "index")
    try:
        listed = [str(cell.ravel()[0]) for cell in index["objectnames"][0, 0].ravel()]
    except (ValueError, IndexError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path}: index has no objectnames") from None
    return dict(enumerate(listed, 1))
