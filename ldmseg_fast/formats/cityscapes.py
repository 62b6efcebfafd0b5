"""Reads Cityscapes: leftImg8bit/ with gtFine/ or gtCoarse/.

The format is https://github.com/mcordts/cityscapesScripts: a pixel of *_instanceIds.png is a label, or 1000 times a
label plus the number of an instance; `preparation/createPanopticImgs.py` makes the panoptic PNGs and their JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.cityscapes_labels import CITYSCAPES
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import map_of_keys, read_labels, unknown_label
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.panoptic_json import read_panoptic
from ldmseg_fast.formats.source_files import WITHOUT, by_stem, files_below, first_folder, paired

_PICTURE = "_leftImg8bit"
_BY_ID = {label.id: label for label in CITYSCAPES}
_LICENSE_PLATE = 65_535  # label -1 in 16 bits
_VERSIONS = {
    "fine": "instances of gtFine",
    "coarse": "instances of gtCoarse",
    "panoptic": "gtFine/cityscapes_panoptic_SPLIT.json",
    "panoptic-trainId": "gtFine/cityscapes_panoptic_SPLIT_trainId.json",
}


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads Cityscapes, whose categories are the 19 classes that are evaluated; all other labels are void.

    A pixel of a thing class without instance is part of a crowd, as in Cityscapes' own conversion. `options.version`
    is fine, coarse, panoptic or panoptic-trainId; by default fine, and panoptic where there are no instances.

    Raises:
        DataError: no such folders, or annotations without picture. An entry's `read` raises it for labels that
            Cityscapes does not have.
        PanopticFormatError: a panoptic JSON that breaks the format.
        ArgumentError: another version.
    """
    version = options.one_version(_VERSIONS, "Cityscapes")
    pictures = first_folder(source, ("leftImg8bit",), "pictures of Cityscapes")
    if not version:
        version = "fine" if next((source / "gtFine").rglob("*_instanceIds.png"), None) is not None else "panoptic"
    if version in ("panoptic", "panoptic-trainId"):
        return _panoptic(source, pictures, version.removeprefix("panoptic").replace("-", "_"), options)
    annotations = first_folder(source, ("gtFine" if version == "fine" else "gtCoarse",), "annotations of Cityscapes")
    ending = f"_{annotations.name}_instanceIds"
    splits, without = {}, 0
    for split in _splits(annotations, options):
        found = by_stem(files_below(annotations / split, (f"{ending}.png".lower(),)), annotations / split, _cut(ending))
        in_folder = by_stem(
            files_below(pictures / split, (f"{_PICTURE}.png".lower(),)), pictures / split, _cut(_PICTURE)
        )
        pairs, more = paired(in_folder, found, pictures / split)
        without += more
        splits[split] = [
            Entry(
                picture.relative_to(pictures / split).as_posix(),
                picture,
                partial(read_instance_ids, path),
                Path(name).name,
                (path,),
            )
            for name, picture, path in pairs
        ]
    return DataSet([label.category() for label in CITYSCAPES if label.train_id is not None], splits, {WITHOUT: without})


def read_instance_ids(path: Path) -> AnnotatedMap:
    """Reads a map of instance ids; its segments have the ids that Cityscapes' own conversion gives them.

    Raises:
        DataError: a map that cannot be read, or a label that Cityscapes does not have.
    """

    def meaning(key: int) -> tuple[int, bool] | None:
        if key == _LICENSE_PLATE:
            return None
        label = _BY_ID.get(key if key < 1000 else key // 1000)
        if label is None:
            raise unknown_label(path, key, _BY_ID)
        return None if label.train_id is None else (label.id, label.isthing and key < 1000)

    return map_of_keys(read_labels(path), meaning, path, keep=True)


def _splits(annotations: Path, options: ReadOptions) -> list[str]:
    found = sorted(path.name for path in annotations.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [name for name in found if not name.startswith("cityscapes_panoptic_")]
    if not found:
        raise DataError(f"{annotations}: no folders train, val or test; is this the right folder?")
    return options.chosen(found, annotations)


def _panoptic(source: Path, pictures: Path, ending: str, options: ReadOptions) -> DataSet:
    """Reads what createPanopticImgs.py has made; it names pictures without their city and with _gtFine in them."""
    annotations = first_folder(source, ("gtFine",), "annotations of Cityscapes")
    jsons = {}
    for path in sorted(annotations.glob("cityscapes_panoptic_*.json")):
        split = path.stem.removeprefix("cityscapes_panoptic_")
        if split.endswith("_trainId") == bool(ending):
            jsons[split.removesuffix("_trainId")] = path
    if not jsons:
        raise DataError(
            f"{annotations}: neither *_instanceIds.png nor cityscapes_panoptic_SPLIT{ending}.json, which "
            f"cityscapesscripts' createPanopticImgs makes"
        )
    parts = []
    for split in options.chosen(jsons, source):
        path = jsons[split]
        below = by_stem(files_below(pictures / split, (f"{_PICTURE}.png".lower(),)), pictures / split, _name_only)
        parts.append(read_panoptic(path, path.with_suffix(""), split, partial(_found, below, path), pictures / split))
    return DataSet(
        parts[0].categories if parts else [], {split: each for part in parts for split, each in part.splits.items()}
    )


def _found(below: dict[str, Path], json: Path, name: str) -> Path:
    stem = name.removesuffix(".png").removesuffix(_PICTURE).removesuffix("_gtFine")
    if stem not in below:
        raise DataError(f"{json}: no picture {stem}{_PICTURE}.png below leftImg8bit; fetch it")
    return below[stem]


def _cut(ending: str) -> Callable[[str], str]:
    return lambda stem: stem.removesuffix(ending)


def _name_only(stem: str) -> str:
    return stem.rpartition("/")[2].removesuffix(_PICTURE)
