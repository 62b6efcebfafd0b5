"""Reads folders of pictures with semantic maps: palette or grey PNGs whose pixels are labels of classes.

A split's pictures lie in SRC/images/SPLIT and its maps in SRC/labels/SPLIT, or in SRC/SPLIT/images and
SRC/SPLIT/labels, or without a split in SRC/images and SRC/labels. Instead of `images` and `labels` other usual names
are taken. Names and labels of the classes stand in SRC/categories.json or a list such as SRC/classes.txt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import VOID, map_of_keys, read_labels, unknown_label
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.source_files import (
    WITHOUT,
    by_stem,
    check_folder,
    files_below,
    paired,
    pictures_below,
    read_any_json,
    read_list,
)

PICTURES = ("images", "image", "imgs", "img", "pictures", "JPEGImages", "leftImg8bit")
MAPS = (
    "labels",
    "label",
    "annotations",
    "annotation",
    "masks",
    "mask",
    "gt",
    "SegmentationClass",
    "SegmentationClassPNG",
)
JSONS = ("categories.json", "id2label.json", "classes.json", "labels.json")
LISTS = ("classes.txt", "class_names.txt", "categories.txt", "names.txt", "labels.txt", "labelmap.txt")
ALL = "train"  # the split of a folder without splits
_NUMBERED = re.compile(r"([0-9]{1,9})(?:\s*[:;,]\s*|\s+)(\S.*)")  # label and name
_COLOURED = re.compile(r":\s*\d+,\s*\d+,\s*\d+\s*:")  # of CVAT's labelmap.txt
_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
_ENDINGS = ("_labels", "_label", "_mask", "_gt", "_seg", "_L", "_labelIds")  # of maps, after their picture's name


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads a folder of semantic maps. Every class is stuff, until `options` say what has instances.

    Label 255 is void where no class has it. Without a list of classes each label that occurs makes one.

    Raises:
        DataError: no such folders, maps without picture, or a list of classes that cannot be read. An entry's `read`
            raises it for labels that no class has.
    """
    options.one_version((), "semantic")
    found = _folders(source)
    folders = {split: found[split] for split in options.chosen(found, source)}
    pairs, without = {}, 0
    for split, (pictures, maps) in folders.items():
        by_name = by_stem(pictures_below(pictures), pictures)
        cut = partial(_without_ending, known=by_name)
        pairs[split], more = paired(by_name, by_stem(files_below(maps, _SUFFIXES), maps, cut), pictures)
        without += more
    categories, void, listed = _categories(source, [each for split in pairs.values() for each in split])
    known = {category["id"]: category["id"] for category in categories} | dict.fromkeys(void)
    splits = {
        split: [
            Entry(
                picture.relative_to(folders[split][0]).as_posix(),
                picture,
                partial(read_semantic, path, known),
                sources=(path, *listed),
            )
            for _, picture, path in each
        ]
        for split, each in pairs.items()
    }
    return DataSet(categories, splits, {WITHOUT: without})


def read_semantic(path: Path, known: Mapping[int, int | None]) -> AnnotatedMap:
    """Reads a semantic map, whose segments are its classes.

    Args:
        path: of the map.
        known: label -> category, None: void.

    Raises:
        DataError: a map that cannot be read, or a label that is not among `known`.
    """

    def meaning(label: int) -> tuple[int, bool] | None:
        if label not in known:
            raise unknown_label(path, label, known)
        category = known[label]
        return None if category is None else (category, False)

    return map_of_keys(read_labels(path), meaning, path)


def _folders(source: Path) -> dict[str, tuple[Path, Path]]:
    """Finds the folders of pictures and of maps of each split."""
    check_folder(source)
    found = {}
    if pair := _pair(source):
        pictures, maps = pair
        inner = sorted(path.name for path in pictures.iterdir() if path.is_dir() and (maps / path.name).is_dir())
        loose = any(path.is_file() and not path.name.startswith(".") for path in maps.iterdir())
        if not inner or loose:
            return {ALL: pair}
        return {name: (pictures / name, maps / name) for name in inner}
    for path in sorted(source.iterdir()):
        if path.is_dir() and (pair := _pair(path)):
            found[path.name] = pair
    if not found:
        raise DataError(
            f"{source}: no folders of pictures and maps: images/ and labels/ expected, or these two in SPLIT/"
        )
    return found


def _pair(folder: Path) -> tuple[Path, Path] | None:
    pictures, maps = (
        next((folder / name for name in names if (folder / name).is_dir()), None) for names in (PICTURES, MAPS)
    )
    return (pictures, maps) if pictures is not None and maps is not None else None


def _without_ending(stem: str, known: Mapping[str, Path]) -> str:
    """Cuts what a map's name has beside its picture's."""
    return next((stem.removesuffix(end) for end in _ENDINGS if stem not in known and stem.endswith(end)), stem)


def _categories(
    source: Path, pairs: Sequence[tuple[str, Path, Path]]
) -> tuple[list[dict[str, Any]], set[int], tuple[Path, ...]]:
    """Returns the categories, the labels that are void, and the file that lists them."""
    path = next((source / name for name in (*JSONS, *LISTS) if (source / name).is_file()), None)
    if path is None:
        labels = _labels_in([path for _, _, path in pairs])
        categories = [{"id": label, "name": f"class {label}", "isthing": 0} for label in labels if label != VOID]
        if not categories:
            raise DataError(f"{source}: no label in any map")
        return categories, {VOID}, ()
    categories, void = _listed(path)
    if not any(category["id"] == VOID for category in categories):
        void.add(VOID)
    return categories, void, (path,)


def _listed(path: Path) -> tuple[list[dict[str, Any]], set[int]]:
    """Reads a list of names, an object label -> name, or COCO's entries, which may stand in an object beside `void`."""
    if path.suffix == ".txt":
        return [_category(path, number, name) for number, name in _lines(path)], set()
    content = read_any_json(path)
    void: set[int] = set()
    if isinstance(content, dict) and isinstance(content.get("categories"), list):
        listed = content.get("void", [])
        if not isinstance(listed, list) or not all(type(label) is int for label in listed):
            raise DataError(f"{path}: `void` must be a list of labels, got {listed!r:.80}")
        content, void = content["categories"], set(listed)
    if isinstance(content, dict):
        wrong = next((key for key in content if not key.isascii() or not key.isdecimal()), None)
        if wrong is not None:
            raise DataError(f"{path}: {wrong!r:.80} is no label; an object label -> name expected")
        return [_category(path, int(key), name) for key, name in content.items()], void
    if not isinstance(content, list):
        raise DataError(f"{path}: a list of names, an object label -> name, or `categories` expected")
    return [_category(path, number, each) for number, each in enumerate(content)], void


def _lines(path: Path) -> list[tuple[int, str]]:
    """Reads label and name of each line: its number, or where all lines begin with a number ("7: road"), that."""
    lines = read_list(path, empty=True)
    if lines[:1] == ["__ignore__"]:  # LabelMe's labels.txt begins with label -1
        del lines[0]
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#") or _COLOURED.search(line):
            raise DataError(
                f"{path}, line {number}: {line[:100]!r}: a line has the name of a class and nothing else; an export of "
                "CVAT is of the kind cvat"
            )
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if all(numbered):
        return [(int(found[1]), found[2]) for found in numbered if found]
    return list(enumerate(lines))


def _category(path: Path, label: int, value: Any) -> dict[str, Any]:
    category = value if isinstance(value, dict) else {"id": label, "name": value}
    if type(category.get("id")) is not int or not isinstance(category.get("name"), str):
        raise DataError(f"{path}: entry {label} is no category, got {value!r:.80}; give it an id and a name")
    kept = {key: category[key] for key in ("id", "name", "supercategory", "color") if key in category}
    isthing = category.get("isthing", 0)
    if isthing not in (0, 1):
        raise DataError(f"{path}: entry {label}: isthing must be 0 or 1, got {isthing!r:.80}")
    return kept | {"isthing": int(isthing)}


def _labels_in(paths: Sequence[Path]) -> list[int]:
    """Reads all maps and returns the labels that occur, in ascending order."""
    found: set[int] = set()
    for path in tqdm(paths, desc="labels", unit="map", disable=None):
        found.update(np.unique(read_labels(path)).tolist())
    return sorted(found)
