"""Reads PASCAL Context: trainval/*.mat with the pictures of VOC 2010.

The format is https://cs.stanford.edu/~roozbeh/pascal-context/: `LabelMap` has labels from 1 to 459, whose names stand
in labels.txt as "NUMBER: NAME"; 59_labels.txt has the names of the 59 most frequent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats import voc
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import map_of_keys, read_labels, same_size, unknown_label
from ldmseg_fast.formats.matlab import label_matrix, read_mat
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.source_files import by_stem, files_below, first_folder, read_list

RARE = "pixels of classes beyond the 59, which are void"
_ROOTS = ("", "VOC2010/", "VOCdevkit/VOC2010/")
# what the list of 59 and VOC call otherwise than labels.txt, whose names are compared without spaces
_OTHERWISE = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads PASCAL Context with all classes, or with `options.version` "59" the most frequent alone.

    Where VOC's SegmentationObject lies beside the pictures, its 20 classes are things: in a picture that has objects
    they divide the labels, and what has none is a crowd. Without that folder all is stuff. Splits are the lists
    train.txt and val.txt in SRC or in ImageSets/Main; without them all maps are `trainval`.

    Raises:
        DataError: no such folders, a list of labels that cannot be read, or maps without picture. An entry's `read`
            raises it for labels that have no name.
        ArgumentError: another version.
    """
    version = options.one_version(("59", "459"), "PASCAL Context", "459")
    maps = first_folder(source, ("trainval",), "PASCAL Context's maps")
    root = first_folder(source, tuple(f"{root}JPEGImages" for root in _ROOTS), "the pictures of VOC 2010").parent
    names = _names(source / "labels.txt")
    chosen = set(names)
    if version == "59":
        frequent = _names(source / "59_labels.txt").values()
        found = {name: _label_of(name, names) for name in frequent}
        if missing := [name for name in frequent if found[name] is None]:
            raise DataError(f"{source / '59_labels.txt'}: {missing[0]} is not in {source / 'labels.txt'}")
        chosen = {label for label in found.values() if label is not None}
    objects_in = root / "SegmentationObject"
    objects = by_stem(files_below(objects_in, (".png",)), objects_in) if objects_in.is_dir() else {}
    of_voc = (_label_of(name, names) for name in voc.CLASSES[1:] if objects)
    things = {label for label in of_voc if label is not None}
    mats = by_stem(files_below(maps, (".mat",)), maps)
    pictures = by_stem(files_below(root / "JPEGImages", (".jpg", ".jpeg", ".png")), root / "JPEGImages")
    splits = {}
    for split, (stems, path) in _splits(source, root, mats, options).items():
        voc.check_named(stems, pictures, path, root / "JPEGImages")
        splits[split] = [
            Entry(
                pictures[stem].relative_to(root / "JPEGImages").as_posix(),
                pictures[stem],
                partial(read_context, mats[stem], objects.get(stem), names, chosen, things),
                sources=(mats[stem], *((objects[stem],) if stem in objects else ())),
            )
            for stem in stems
        ]
    categories = [
        {"id": label, "name": name, "isthing": int(label in things)} for label, name in names.items() if label in chosen
    ]
    return DataSet(categories, splits)


def read_context(
    path: Path, objects: Path | None, names: Mapping[int, str], chosen: set[int], things: set[int]
) -> AnnotatedMap:
    """Reads a .mat, and the objects of its picture where there are some.

    Args:
        path: of the .mat.
        objects: VOC's PNG of objects.
        names: of all labels.
        chosen: labels that are categories; others are void.
        things: labels that have objects.

    Raises:
        DataError: a file that cannot be read, or a label without name.
    """
    labels = label_matrix(read_mat(path, "LabelMap"), path, "LabelMap")
    present = np.unique(labels).tolist()
    if unknown := [label for label in present if label and label not in names]:
        raise unknown_label(path, unknown[0], names)
    rare = np.isin(labels, [label for label in present if label and label not in chosen])
    labels = np.where(rare, 0, labels)
    left_out = {RARE: int(rare.sum())} if rare.any() else {}
    if objects is None:
        return map_of_keys(labels, lambda label: (label, label in things) if label else None, path, left_out=left_out)
    numbers = read_labels(objects)
    same_size(objects, numbers, path, labels)
    numbers = np.where(np.isin(labels, list(things)), numbers % 255, 0)  # objects divide their own classes alone
    found = voc.with_objects(labels, numbers, objects, things, 0)
    return AnnotatedMap(found.ids, found.segments, left_out | found.left_out)


def _names(path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for line in read_list(path):
        number, _, name = (part.strip() for part in line.partition(":"))
        if not number.isdecimal() or not name or not 1 <= int(number) <= 459:
            raise DataError(f"{path}: {line[:100]!r}: NUMBER: NAME expected, with a number in 1..459")
        if names.setdefault(int(number), name) != name:
            raise DataError(f"{path}: {line[:100]!r}: {number} is {names[int(number)]!r} already; give it one name")
    if not names:
        raise DataError(f"{path}: no labels")
    return names


def _label_of(name: str, names: Mapping[int, str]) -> int | None:
    """Finds the label that a list of another origin calls `name`."""
    labels = {each.replace(" ", ""): label for label, each in names.items()}
    short = name.replace(" ", "")
    return labels.get(short, labels.get(_OTHERWISE.get(short, "")))


def _splits(
    source: Path, root: Path, maps: Mapping[str, Path], options: ReadOptions
) -> dict[str, tuple[list[str], Path]]:
    """Returns the pictures of each split, of those that have a map, and where the list stands."""
    found = {}
    for split in ("train", "val"):
        for path in (source / f"{split}.txt", root / "ImageSets" / "Main" / f"{split}.txt"):
            if split not in found and path.is_file():
                found[split] = (list(dict.fromkeys(name for name in read_list(path) if name in maps)), path)
    if not found or "trainval" in options.splits:
        found["trainval"] = (sorted(maps), source / "trainval")
    return {split: found[split] for split in options.chosen(found, source)}
