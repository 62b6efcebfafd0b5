"""Reads Mapillary Vistas 1.2 and 2.0: {training,validation}/ with images/, and maps by version.

The format is the README of the data set (https://www.mapillary.com/dataset/vistas): a pixel of instances/*.png, of 16
bits, is 256 times the label plus the number of the instance; panoptic/*.png and panoptic/panoptic_YEAR.json are
COCO's. The labels stand in config.json, or config_vVERSION.json. Their ids are their places in it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import map_of_keys, read_labels, unknown_label
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.panoptic_json import read_panoptic
from ldmseg_fast.formats.source_files import (
    WITHOUT,
    by_stem,
    check_folder,
    files_below,
    paired,
    pictures_below,
    read_object,
)

_VERSIONS = ("1.2", "2.0")
_SPLITS = ("training", "validation", "testing")


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads Mapillary Vistas, by default the newest version that is there; labels that are not evaluated are void.

    Of 2.0 the panoptic maps are read, or its instances where these are not there; of 1.2 the instances. Folders are
    SPLIT/vVERSION/instances, or SPLIT/instances of the older download.

    Raises:
        DataError: no such folders, a configuration that cannot be read, or maps without picture. An entry's `read`
            raises it for labels that the configuration does not have.
        PanopticFormatError: a panoptic JSON that breaks the format.
        ArgumentError: another version.
    """
    version = options.one_version(_VERSIONS, "Mapillary Vistas")
    check_folder(source)
    splits = [split for split in _SPLITS if (source / split / "images").is_dir()]
    if not splits:
        raise DataError(f"{source}: no folders training/images or validation/images; is this Mapillary Vistas?")
    if not version:
        newest = any((source / split / "v2.0").is_dir() for split in splits)
        version = "2.0" if newest else "1.2"
    found: dict[str, Any] = {}
    categories: list[dict[str, Any]] = []
    without = 0
    for split in options.chosen(splits, source):
        pictures = source / split / "images"
        folder = source / split / f"v{version}"
        folder = folder if folder.is_dir() or version == "2.0" else source / split
        if version == "2.0" and (folder / "panoptic").is_dir():
            part = _panoptic(folder / "panoptic", split, pictures)
            found[split], categories = part.splits[split], part.categories
        elif (folder / "instances").is_dir():
            labels = _labels(source, version)
            maps = folder / "instances"
            pairs, more = paired(
                by_stem(pictures_below(pictures), pictures), by_stem(files_below(maps, (".png",)), maps), pictures
            )
            without += more
            found[split] = [
                Entry(
                    picture.relative_to(pictures).as_posix(),
                    picture,
                    partial(read_instances, path, labels),
                    sources=(path,),
                )
                for _, picture, path in pairs
            ]
            categories = [label for label in labels if label is not None]
        else:
            without += len(pictures_below(pictures))
    if not found:
        raise DataError(
            f"{source}: no maps of version {version}; SPLIT/v{version}/ with instances/ or panoptic/ expected"
        )
    return DataSet(categories, found, {WITHOUT: without})


def read_instances(path: Path, labels: list[dict[str, Any] | None]) -> AnnotatedMap:
    """Reads a map of instances.

    Args:
        path: of the map.
        labels: the category of each label, None: void.

    Raises:
        DataError: a map that cannot be read, or a label that there is not.
    """

    def meaning(key: int) -> tuple[int, bool] | None:
        if key // 256 >= len(labels):
            raise unknown_label(path, key // 256, range(len(labels)))
        label = labels[key // 256]
        return None if label is None else (label["id"], False)

    return map_of_keys(read_labels(path), meaning, path)


def _labels(source: Path, version: str) -> list[dict[str, Any] | None]:
    path = source / f"config_v{version}.json"
    path = path if path.is_file() or version == "2.0" else source / "config.json"
    listed = read_object(path, ("labels",))["labels"]
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{path}: `labels` must be a list with entries")
    labels: list[dict[str, Any] | None] = []
    for number, label in enumerate(listed):
        name = label.get("readable") or label.get("name") if isinstance(label, dict) else None
        if not isinstance(name, str):
            raise DataError(f"{path}: label {number} has no name, got {label!r:.80}")
        flags = label.get("instances", False), label.get("evaluate", True)
        if any(flag not in (0, 1) for flag in flags):
            raise DataError(f"{path}: label {number}: instances and evaluate must be true or false, got {flags!r:.80}")
        category = {"id": number, "name": name, "isthing": int(flags[0])}
        category |= {"color": label["color"]} if isinstance(label.get("color"), list) else {}
        labels.append(category if flags[1] else None)
    return labels


def _panoptic(folder: Path, split: str, pictures: Path) -> DataSet:
    jsons = sorted(folder.glob("panoptic*.json"))
    if not jsons:
        raise DataError(f"{folder}: no panoptic_YEAR.json")
    known = by_stem(pictures_below(pictures), pictures)

    def find(name: str) -> Path:
        stem = str(Path(name).with_suffix("")) if Path(name).name else name
        if stem not in known:
            raise DataError(f"{jsons[-1]}: no picture {name} in {pictures}; fetch it")
        return known[stem]

    return read_panoptic(jsons[-1], folder, split, find, pictures)
