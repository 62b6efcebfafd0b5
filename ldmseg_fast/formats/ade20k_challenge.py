"""Reads ADE20K as the scene parsing challenge has it: 150 classes in images/, annotations/ and objectInfo150.txt.

The formats are https://github.com/CSAILVision/sceneparsing and, with instances,
https://github.com/CSAILVision/placeschallenge/tree/master/instancesegmentation: a pixel of annotations/SPLIT/*.png is
a class from 1 to 150, 0 is void; of annotations_instance/SPLIT/*.png R is one of 100 thing classes and G the instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import map_of_keys, read_colours, read_labels, same_size, unknown_label
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.source_files import WITHOUT, by_stem, files_below, first_folder, paired, read_list

_MAPPINGS = ("categoryMapping.txt", "ade20k_instance_catid_mapping.txt")
_INSTANCE = 1000  # keys of instances lie above those of the 150 classes


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads the challenge's ADE20K.

    With annotations_instance/ its 100 classes are things: instances lie over the semantic map, and pixels of a thing
    class without instance are a crowd. Which class of the 150 each is, says categoryMapping.txt in SRC or in
    annotations_instance/. Without instances all is stuff.

    Raises:
        DataError: no such folders or lists, or maps without picture. An entry's `read` raises it for classes that
            there are not, and for maps of other sizes.
    """
    options.one_version((), "ADE20K of the challenge")
    maps = first_folder(source, ("annotations",), "the challenge's semantic maps")
    pictures = first_folder(source, ("images",), "the challenge's pictures")
    names = _names(source / "objectInfo150.txt")
    instances = source / "annotations_instance"
    things = _mapping(source, instances, names) if instances.is_dir() else {}
    splits: dict[str, list[Entry]] = {}
    without = 0
    for split in options.chosen(sorted(path.name for path in maps.iterdir() if path.is_dir()), source):
        found = by_stem(files_below(pictures / split, (".jpg", ".jpeg", ".png")), pictures / split)
        pairs, more = paired(found, by_stem(files_below(maps / split, (".png",)), maps / split), pictures / split)
        without += more
        splits[split] = []
        for name, picture, path in pairs:
            both = (path, instances / split / f"{name}.png") if things else (path,)
            reader = partial(read_challenge, *both, names=names, things=things)
            splits[split].append(Entry(picture.relative_to(pictures / split).as_posix(), picture, reader, sources=both))
    if not splits:
        raise DataError(f"{maps}: no folders training or validation with maps")
    of_things = set(things.values())
    categories = [{"id": number, "name": name, "isthing": int(number in of_things)} for number, name in names.items()]
    return DataSet(categories, splits, {WITHOUT: without})


def read_challenge(
    path: Path, instances: Path | None = None, *, names: Mapping[int, str], things: Mapping[int, int]
) -> AnnotatedMap:
    """Reads a semantic map, and the instances of its picture where there are some.

    Args:
        path: of the semantic map.
        instances: of the instances.
        names: of the 150 classes, from 1.
        things: class among the 100 -> class among the 150.

    Raises:
        DataError: a map that cannot be read, of another size, or with a class that there is not.
    """
    keys = read_labels(path)
    of_things = set(things.values())
    if instances is not None:
        colours = read_colours(instances).astype(np.int32)
        same_size(instances, colours, path, keys)
        objects = colours[..., 0] * 256 + colours[..., 1]
        keys = np.where(colours[..., 1] > 0, _INSTANCE + objects, keys)

    def meaning(key: int) -> tuple[int, bool] | None:
        if key == 0:
            return None
        if key < _INSTANCE:
            if key not in names:
                raise unknown_label(path, key, names)
            return key, key in of_things
        number = (key - _INSTANCE) // 256
        if number not in things:
            raise unknown_label(instances or path, number, things)
        return things[number], False

    return map_of_keys(keys, meaning, path)


def _names(path: Path) -> dict[int, str]:
    """Reads objectInfo150.txt: Idx first and Name last, with tabs and other columns between them, below a heading."""
    names = {}
    for line in read_list(path)[1:]:
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) < 2 or not parts[0].isdecimal() or not parts[-1]:
            raise DataError(f"{path}: {line[:100]!r}: Idx first and Name last expected, with tabs between")
        if int(parts[0]) in names:
            raise DataError(f"{path}: {line[:100]!r}: Idx {parts[0]} is there twice; give each class its own")
        names[int(parts[0])] = parts[-1]
    if not names:
        raise DataError(f"{path}: no classes")
    return names


def _mapping(source: Path, instances: Path, names: Mapping[int, str]) -> dict[int, int]:
    """Reads a class among the 100 -> class among the 150, the first two columns below a heading."""
    found: Any = (folder / name for name in _MAPPINGS for folder in (source, instances) if (folder / name).is_file())
    path = next(found, None)
    if path is None:
        raise DataError(f"{instances}: no {_MAPPINGS[0]} in it or beside it, which tells what its classes are")
    things = {}
    for line in read_list(path)[1:]:
        parts = line.split()
        if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()) or int(parts[1]) not in names:
            raise DataError(f"{path}: {line[:100]!r}: two classes expected, the second one of objectInfo150.txt")
        things[int(parts[0])] = int(parts[1])
    return things
