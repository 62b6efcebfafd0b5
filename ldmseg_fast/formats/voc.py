"""Reads PASCAL VOC: JPEGImages/ with SegmentationClass/ and SegmentationObject/.

The format is http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html: palette PNGs, whose indices are
classes from 1 to 20 or objects, 0 background, and 255 the border of objects, which is void.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import VOID, map_of_keys, read_labels, same_size, unknown_label
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.source_files import by_stem, files_below, first_folder, read_list

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MIXED = "pixels whose class is not that of most of their object"
ROOTS = ("", "VOC2012/", "VOCdevkit/VOC2012/", "VOC2007/", "VOCdevkit/VOC2007/")


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads PASCAL VOC, with background as stuff. Without SegmentationObject the classes are segments, and stuff.

    Splits are the lists of ImageSets/Segmentation, of them train and val where nothing else is asked for; without such
    lists all maps are `train`.

    Raises:
        DataError: no such folders, or lists of files that are not there. An entry's `read` raises it for labels that
            VOC does not have, and for maps that contradict each other.
    """
    options.one_version((), "PASCAL VOC")
    root = first_folder(source, tuple(f"{root}SegmentationClass" for root in ROOTS), "PASCAL VOC's maps").parent
    pictures = by_stem(files_below(root / "JPEGImages", (".jpg", ".jpeg", ".png")), root / "JPEGImages")
    folders = [root / name for name in ("SegmentationClass", "SegmentationObject") if (root / name).is_dir()]
    maps = [by_stem(files_below(folder, (".png",)), folder) for folder in folders]
    splits = {}
    for split, (names, path) in split_lists(root / "ImageSets" / "Segmentation", maps[0], options).items():
        for folder, files in ((root / "JPEGImages", pictures), *zip(folders, maps)):
            check_named(names, files, path, folder)
        splits[split] = [
            Entry(
                pictures[name].relative_to(root / "JPEGImages").as_posix(),
                pictures[name],
                partial(read_voc, *(files[name] for files in maps)),
                sources=tuple(files[name] for files in maps),
            )
            for name in names
        ]
    has_objects = len(maps) == 2
    categories = [
        {"id": number, "name": name, "isthing": int(has_objects and number > 0)} for number, name in enumerate(CLASSES)
    ]
    return DataSet(categories, splits)


def split_lists(folder: Path, maps: Mapping[str, Path], options: ReadOptions) -> dict[str, tuple[list[str], Path]]:
    """Returns the names of each split and the list that has them.

    Raises:
        DataError: a list that cannot be read.
    """
    lists = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    if not lists:
        return {split: (sorted(maps), folder) for split in options.chosen(("train",), folder)}
    usual = [split for split in ("train", "val") if split in lists]
    wanted = options.chosen(lists, folder) if options.splits or not usual else usual
    return {split: (list(dict.fromkeys(read_list(lists[split]))), lists[split]) for split in wanted}


def check_named(names: list[str], files: Mapping[str, Path], path: Path, folder: Path) -> None:
    """Checks that a folder has the files of a list.

    Raises:
        DataError: names the list, the folder and the first that is missing.
    """
    lost = [name for name in names if name not in files]
    if lost:
        raise DataError(f"{len(lost)} of {len(names)} names of {path} are not in {folder}, first {lost[0]}; fetch them")


def read_voc(classes: Path, objects: Path | None = None) -> AnnotatedMap:
    """Reads the two maps of a picture. An object's class is that of most of its pixels.

    Raises:
        DataError: a map that cannot be read, another size, a class outside 0..20, or an object without class.
    """
    labels = read_labels(classes)
    wrong = labels[(labels >= len(CLASSES)) & (labels != VOID)]
    if wrong.size:
        raise unknown_label(classes, int(wrong[0]), range(len(CLASSES)))
    if objects is None:
        return map_of_keys(labels, lambda label: None if label == VOID else (label, False), classes)
    numbers = read_labels(objects)
    same_size(objects, numbers, classes, labels)
    return with_objects(labels, numbers, objects, range(1, len(CLASSES)), VOID)


def with_objects(
    labels: np.ndarray, numbers: np.ndarray, path: Path, things: Container[int], void: int
) -> AnnotatedMap:
    """Divides classes by objects: object -> segment of the class that most of its pixels have.

    Args:
        labels: classes, int32 [H, W]; 0 is background, `void` void.
        numbers: objects, int32 [H, W]; 0 none, 255 the border, which is void.
        path: of the objects, for errors.
        things: classes that have objects.
        void: a label.

    Returns:
        The map. Pixels of a thing class without object are a crowd.

    Raises:
        DataError: an object whose pixels have no class.
    """
    owner: dict[int, int] = {}
    mixed = 0
    keys = np.where(labels == void, 0, 1 + labels)  # 1 + class: without object
    for number in np.unique(numbers).tolist():
        if number in (0, VOID):
            continue
        mask = numbers == number
        counts = np.bincount(labels[mask][labels[mask] != void], minlength=1)
        counts[0] = 0
        if not counts.any():
            raise DataError(f"{path}: object {number} has no class; do the two maps belong together?")
        owner[number] = int(counts.argmax())
        mixed += int(mask.sum()) - int(counts.max())
        keys[mask] = 1000 + number
    keys[numbers == VOID] = 0

    def meaning(key: int) -> tuple[int, bool] | None:
        if key == 0:
            return None
        return (owner[key - 1000], False) if key >= 1000 else (key - 1, key - 1 in things)

    return map_of_keys(keys, meaning, path, left_out={MIXED: mixed} if mixed else {})
