"""Reads Hugging Face data sets whose rows have an image, a panoptic map and `segments_info`.

`datasets` (https://huggingface.co/docs/datasets) reads them: a folder of `save_to_disk`, a folder or file of parquet,
or a name on the Hub. A map is an RGB picture with COCO's ids (R + 256 G + 65536 B) or a grey one whose values are ids.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ldmseg_fast.data.pictures import open_checked
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import read_file, without_repeats
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.label_maps import colours_of, labels_of
from ldmseg_fast.formats.libraries import library
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.panoptic_json import with_segments
from ldmseg_fast.formats.source_files import read_any_json
from ldmseg_fast.panoptic.annotations import MAX_ID
from ldmseg_fast.panoptic.format import MAX_PIXELS, rgb_to_ids

PICTURE, SEGMENTS = "image", "segments_info"
MAPS = ("label", "annotation", "mask", "panoptic", "panoptic_map", "segmentation", "map", "labels")
ALL = "train"  # the split of a data set without splits
_IDS = ("image_id", "id")
_LISTS = ("categories.json", "id2label.json")
_MAGIC = (
    (b"\xff\xd8", ".jpg"),
    (b"RIFF", ".webp"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*", ".tif"),
    (b"MM", ".tif"),
)
_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


class _Rows(Sequence):
    """Gives a split's entries; a row is read when its picture or map is asked for."""

    def __init__(self, rows: Any, split: str, column: str, categories: frozenset[int], names: list[str]) -> None:
        self._rows, self._split, self._column, self._categories, self._names = rows, split, column, categories, names
        self._ids = next((ids for key in _IDS if (ids := _ids_in(rows, key))), None)
        self._sources = tuple(Path(file["filename"]) for file in rows.cache_files)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        where = f"{self._split}[{index}]"
        return Entry(
            self._names[index],
            partial(_bytes_of, self._rows, index, PICTURE, where),
            partial(read_row, self._rows, index, self._column, self._categories, where),
            None if self._ids is None else self._ids[index],
            self._sources,
        )


def _ids_in(rows: Any, column: str) -> list[int | str]:
    """Returns the ids in a column; none where they cannot tell the pictures apart."""
    ids = list(rows[column]) if column in rows.column_names else []
    usable = all((type(each) is int or isinstance(each, str)) and each != "" for each in ids)
    return ids if usable and len(set(ids)) == len(ids) else []


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads a data set with the columns `image` and `segments_info` and a column of maps, one of `MAPS`.

    The names of the categories come from a class label of `segments_info`, or from categories.json or id2label.json in
    SRC; else categories are called after their ids. All are things but those whose segments say `isthing` false.
    `options.version` is the name of a configuration.

    Raises:
        DataError: `datasets` is not installed or cannot read this, or a column is missing. An entry's `read` raises it
            for a row whose map and segments do not fit.
    """
    splits = _load(source, options.version)
    chosen = {split: splits[split] for split in options.chosen(splits, source)}
    columns = {split: _column_of_maps(rows, source, split) for split, rows in chosen.items()}
    undecoded = {split: _undecoded(rows, columns[split]) for split, rows in chosen.items()}
    categories = _categories(source, undecoded)
    ids = frozenset(category["id"] for category in categories)
    return DataSet(
        categories,
        {split: _Rows(rows, split, columns[split], ids, _names_of(rows)) for split, rows in undecoded.items()},
    )


def read_row(rows: Any, index: int, column: str, categories: frozenset[int], where: str) -> AnnotatedMap:
    """Reads the map of one row.

    Args:
        rows: the split, a `datasets.Dataset` that decodes no images.
        index: of the row.
        column: of the maps.
        categories: ids of all categories.
        where: names the row in errors.

    Raises:
        DataError: a map that cannot be read, an id that segments_info does not have, or a segment without usable id or
            category.
    """
    content, name = _bytes_of(rows, index, column, where), f"{where} {column}"
    with open_checked(name, content, MAX_PIXELS) as image:
        has_colours = image.mode in ("RGB", "RGBA")
    ids = rgb_to_ids(colours_of(content, name)) if has_colours else labels_of(content, name)
    if ids.max() > MAX_ID:
        raise DataError(f"{name}: id {ids.max()} is not in 1..{MAX_ID}; renumber it")
    infos = _segments(rows[index][SEGMENTS], where)
    seen = set()
    for info in infos:
        if type(info.get("id")) is not int or not 1 <= info["id"] <= MAX_ID or info["id"] in seen:
            raise DataError(f"{where}: segment id {info.get('id')!r}: whole numbers in 1..{MAX_ID} expected, each once")
        if info.get("category_id") not in categories:
            raise DataError(f"{where}: segment {info['id']} has unknown category_id {info.get('category_id')!r}")
        seen.add(info["id"])
    return with_segments(ids, [{**info, "iscrowd": info.get("iscrowd") or 0} for info in infos], name)


def _load(source: Path, version: str) -> dict[str, Any]:
    """Loads all splits by `datasets`, which maps files into memory."""
    datasets = library("datasets", "a Hugging Face data set")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name = source.as_posix()
    if source.is_dir() and any((source / file).is_file() for file in ("dataset_dict.json", "state.json")):
        load: Callable[[], Any] = partial(datasets.load_from_disk, name)
    elif source.is_file():
        load = partial(datasets.load_dataset, "parquet", data_files={ALL: name})
    elif source.is_dir() or _ON_HUB.fullmatch(name):
        load = partial(datasets.load_dataset, name, version or None)
    else:
        raise DataError(f"{source}: no such folder, and no name of a data set on the Hub (ORGANISATION/NAME)")
    try:
        found = load()
    except Exception as error:  # what datasets raises for missing, damaged or unreachable data is nowhere listed
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{source}: datasets cannot load it ({why})") from error
    return dict(found) if isinstance(found, dict) else {ALL: found}


def _column_of_maps(rows: Any, source: Path, split: str) -> str:
    datasets = library("datasets", "a Hugging Face data set")
    features = rows.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    where = f"{source}, split {split}"
    if PICTURE not in images or SEGMENTS not in features:
        has = ", ".join(features)
        raise DataError(f"{where}: columns {PICTURE} (of images) and {SEGMENTS} expected; it has {has}")
    column = next((name for name in MAPS if name in images), None)
    if column is None:
        raise DataError(
            f"{where}: no column of maps ({', '.join(MAPS)}); its columns of images are {', '.join(images)}"
        )
    return column


def _undecoded(rows: Any, column: str) -> Any:
    datasets = library("datasets", "a Hugging Face data set")
    for name in (PICTURE, column):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _names_of(rows: Any) -> list[str]:
    """Names pictures after their files where all have one of their own, else after their places in the split."""
    cut = library("pyarrow.compute", "a Hugging Face data set").binary_slice
    paths: list[str | None] = []
    heads: list[bytes | None] = []
    for batch in rows.select_columns([PICTURE]).with_format("arrow").iter(1000):
        for chunk in batch.column(PICTURE).chunks:
            paths += chunk.field("path").to_pylist()
            heads += cut(chunk.field("bytes"), 0, 4).to_pylist()
    names = [PurePosixPath(path.replace("\\", "/")).name if path else "" for path in paths]
    if names and all(names) and len(set(names)) == len(names):
        return names
    endings = [next((end for magic, end in _MAGIC if head and head.startswith(magic)), ".png") for head in heads]
    return [f"{place:08}{PurePosixPath(name).suffix or end}" for place, (name, end) in enumerate(zip(names, endings))]


def _bytes_of(rows: Any, index: int, column: str, where: str) -> bytes:
    cell = rows[index][column]
    content, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if content is None and path:
        try:
            return read_file(path, DataError, "picture")
        except FileNotFoundError:
            raise DataError(f"{where}: {path}: no such picture") from None
    if content is None:
        raise DataError(f"{where}: no {column}")
    return content


def _segments(value: Any, where: str) -> list[dict[str, Any]]:
    """Returns segments, which older versions of `datasets` give as an object of lists, and some data sets as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {SEGMENTS} is no JSON ({error}); write it again") from None
    if isinstance(value, dict):
        columns = list(value.values())
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise DataError(f"{where}: {SEGMENTS} must have lists of one length, got {value!r:.80}; write it again")
        value = [dict(zip(value, row)) for row in zip(*columns)]
    if not isinstance(value, list) or not all(isinstance(info, dict) for info in value):
        raise DataError(f"{where}: {SEGMENTS} must be a list of segments, got {value!r:.80}")
    return value


def _categories(source: Path, splits: dict[str, Any]) -> list[dict[str, Any]]:
    names: dict[int, str] = {}
    listed = next((source / name for name in _LISTS if (source / name).is_file()), None)
    if listed is not None:
        return _listed(listed)
    stuff, used = set[int](), set[int]()
    for split, rows in splits.items():
        names |= dict(enumerate(_class_names(rows.features[SEGMENTS])))
        for index, value in enumerate(rows.select_columns([SEGMENTS])[SEGMENTS]):
            for info in _segments(value, f"{split}[{index}]"):
                if type(info.get("category_id")) is int and info["category_id"] >= 0:
                    used.add(info["category_id"])
                    if info.get("isthing") in (False, 0) and info.get("isthing") is not None:
                        stuff.add(info["category_id"])
    return [
        {"id": number, "name": names.get(number, f"class {number}"), "isthing": int(number not in stuff)}
        for number in sorted(names.keys() | used)
    ]


def _listed(path: Path) -> list[dict[str, Any]]:
    """Reads an object id -> name, a list of names, or COCO's entries."""
    content = read_any_json(path)
    if isinstance(content, dict) and all(key.isdecimal() for key in content):
        content = [{"id": int(key), "name": name} for key, name in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path}: an object id -> name or a list of categories expected")
    entries = [each if isinstance(each, dict) else {"id": number, "name": each} for number, each in enumerate(content)]
    kept = ("id", "name", "isthing", "supercategory", "color")
    return [{"isthing": 1} | {key: each[key] for key in kept if key in each} for each in entries]


def _class_names(feature: Any) -> list[str]:
    """Returns the names of a class label in the feature of segments, wherever `datasets` has put it."""
    inner = getattr(feature, "feature", feature)
    inner = inner[0] if isinstance(inner, list) and inner else inner
    label = inner.get("category_id") if isinstance(inner, dict) else None
    return list(getattr(getattr(label, "feature", label), "names", None) or [])
