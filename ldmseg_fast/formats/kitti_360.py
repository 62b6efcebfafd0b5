"""Reads KITTI-360's panoptic labels: data_2d_semantics/ beside data_2d_raw/.

The format is https://github.com/autonomousvision/kitti360Scripts and
https://www.cvlibs.net/datasets/kitti-360/documentation.php: a pixel of DRIVE/image_00/instance/FRAME.png, of 16 bits,
is 1000 times the label plus the number of the instance.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.cityscapes_labels import KITTI_360
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import map_of_keys, read_labels, unknown_label
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.source_files import files_below, first_folder, read_list

_BY_ID = {label.id: label for label in KITTI_360}
_THINGS = [label.id for label in KITTI_360 if label.isthing]
_VOID = {label.id for label in KITTI_360 if label.group == "void"}
_FRAMES = "2013_05_28_drive_{}_frames.txt"


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads KITTI-360. Its own lists divide the frames into train and val; without them all are `train`.

    Labels of the group "void" are void. A pixel of a thing class whose instance is 0 is part of a crowd.

    Raises:
        DataError: no such folders, frames without picture, or a list that names what is not there. An entry's `read`
            raises it for labels that KITTI-360 does not have.
    """
    options.one_version((), "KITTI-360")
    labels = first_folder(source, ("data_2d_semantics",), "labels of KITTI-360")
    pictures = first_folder(source, ("data_2d_raw",), "pictures of KITTI-360")
    train = labels / "train"
    lists = {split: train / _FRAMES.format(split) for split in ("train", "val")}
    lists = {split: path for split, path in lists.items() if path.is_file()}
    if lists:
        maps = {split: _listed(lists[split], source) for split in options.chosen(lists, source)}
    else:
        found = [path for path in files_below(train, (".png",)) if path.parent.name == "instance"]
        maps = {"train": found}
    splits = {}
    for split in options.chosen(maps, source):
        splits[split] = [_entry(path, pictures) for path in maps[split]]
        _check(splits[split], pictures)
    if not any(maps.values()):
        raise DataError(f"{train}: no DRIVE/image_00/instance/FRAME.png; is this the right folder?")
    return DataSet([label.category() for label in KITTI_360 if label.id not in _VOID], splits)


def read_instances(path: Path) -> AnnotatedMap:
    """Reads a map of instances.

    Raises:
        DataError: a map that cannot be read, or a label that KITTI-360 does not have.
    """

    def meaning(key: int) -> tuple[int, bool] | None:
        label = _BY_ID.get(key // 1000)
        if label is None:
            raise unknown_label(path, key // 1000, _BY_ID)
        return None if label.id in _VOID else (label.id, label.isthing and key % 1000 == 0)

    labels = read_labels(path)
    classes = labels // 1000
    keys = np.where(np.isin(classes, _THINGS), labels, classes * 1000)  # stuff is one segment, whatever its number
    return map_of_keys(keys, meaning, path, keep=True)


def _entry(path: Path, pictures: Path) -> Entry:
    drive, camera, _, frame = path.parts[-4:]
    picture = pictures / drive / camera / "data_rect" / frame
    return Entry(picture.relative_to(pictures).as_posix(), picture, partial(read_instances, path), sources=(path,))


def _listed(path: Path, source: Path) -> list[Path]:
    """Reads a list, whose lines name a picture and its semantic map; the instances lie beside the latter."""
    found = []
    for line in read_list(path):
        parts = line.split()
        if len(parts) != 2 or Path(parts[1]).parent.name != "semantic" or len(Path(parts[1]).parts) < 5:
            raise DataError(f"{path}: {line[:100]!r}: a picture and its semantic map expected")
        semantic = source / parts[1]
        instance = semantic.parent.parent / "instance" / semantic.name
        if not instance.is_file():
            raise DataError(f"{instance}: no such file, which {path} names; fetch it, or take it out of the list")
        found.append(instance)
    return found


def _check(entries: list[Entry], pictures: Path) -> None:
    lost = [entry.name for entry in entries if not (pictures / entry.name).is_file()]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(entries)} frames have no picture, first {pictures / lost[0]}; fetch data_2d_raw"
        )
