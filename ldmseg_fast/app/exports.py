"""Writes results as one zip, in any format that the package writes."""

from __future__ import annotations

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.app.segments import Segments
from ldmseg_fast.data.orientation import turned
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import replacing
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.export import export
from ldmseg_fast.formats.kinds import KINDS
from ldmseg_fast.formats.options import WriteOptions
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.panoptic.results import PanopticResult

MAPS = "maps"  # NAME.png, NAME.json and NAME_overlay.png, as `ldmseg predict` writes them
EXPORTS = (MAPS, *(name for name, kind in KINDS.items() if kind.writes and name != "cityscapes-results"))
CITYSCAPES = "cityscapes-results"  # of models with Cityscapes' categories only
_SPLIT = "predicted"
_UNSAFE = re.compile(r"[^\w.+=@ ()-]+")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)")  # no file's name under Windows
LONGEST = 100  # characters of a file's name without its ending
_BYTES = 180  # of it in UTF-8: file systems take 255, and endings and numbers follow
_OVERLAY = "_overlay"  # NAME_overlay.png stands beside NAME.png


@dataclass(frozen=True)
class Exported:
    """Describes one picture that is written.

    Attributes:
        name: the picture's file name; `safe_name` makes it one that every system takes.
        picture: the file's path, or its encoded bytes.
        result: its map as the picture is shown, and its segments.
        orientation: EXIF orientation of the file, 1 to 8.
        overlay: gives the picture for the eye, uint8 [h, w, 3].
    """

    name: str
    picture: Path | bytes
    result: PanopticResult
    orientation: int = 1
    overlay: Callable[[], np.ndarray] | None = None

    @classmethod
    def of(
        cls, name: str, picture: Path | bytes, segments: Segments, view: np.ndarray, orientation: int = 1
    ) -> Exported:
        """Describes an edited result whose overlay is drawn on `view`, uint8 [h, w, 3]."""
        return cls(name, picture, segments.result(), orientation, lambda: segments.overlay(view))


def safe_name(name: str, usual: str = "picture") -> str:
    """Makes a file name that every system takes: no folders, no control characters, no reserved word, not hidden."""
    last = PurePosixPath(name.replace("\\", "/")).name
    stem, dot, ending = last.rpartition(".")
    if not dot or not ending.isalnum() or len(ending) > 8:
        stem, ending = last, ""
    stem = _UNSAFE.sub("_", stem).strip(" .")[:LONGEST]
    stem = stem.encode("utf-8", "replace")[:_BYTES].decode("utf-8", "ignore").rstrip(" .")
    if not stem.strip("_"):
        stem = usual
    if _RESERVED.fullmatch(stem):
        stem = f"_{stem}"
    return f"{stem}.{ending}" if ending else stem


def different_names(names: Iterable[str]) -> list[str]:
    """Makes safe names (see `safe_name`) whose stems all differ, in upper and lower case too: picture-2.png, ...

    No stem is that of another's overlay either.
    """
    taken: set[str] = set()
    found = []
    for name in map(safe_name, names):
        stem, dot, ending = name.rpartition(".") if "." in name else (name, "", "")
        number, chosen = 1, stem
        while taken & (files := {chosen.casefold(), f"{chosen}{_OVERLAY}".casefold()}):
            number += 1
            chosen = f"{stem}-{number}"
        taken |= files
        found.append(f"{chosen}{dot}{ending}")
    return found


def check_kind(kind: str, *, cityscapes: bool = False) -> None:
    """Checks the name of an export format.

    Raises:
        ArgumentError: none of EXPORTS; it lists them. `cityscapes` adds CITYSCAPES.
    """
    known = (*EXPORTS, CITYSCAPES) if cityscapes else EXPORTS
    if kind not in known:
        raise ArgumentError(f"format={kind!r}: one of {', '.join(known)} expected")


def write_zip(
    items: Sequence[Exported], kind: str, categories: Sequence[Mapping[str, Any]], path: str | Path, reports: str = ""
) -> Path:
    """Writes results as one zip, which appears when all of it is there.

    Args:
        items: at least one; their names may be unsafe and repeat.
        kind: one of EXPORTS, or CITYSCAPES.
        categories: COCO entries of all categories that the results have.
        path: of the zip.
        reports: text of a file left-out.txt beside the results; "": no such file.

    Raises:
        ArgumentError: no such format, or no results.
        DataError: results that the format cannot hold.
        OSError: a file that cannot be written.
    """
    check_kind(kind, cityscapes=True)
    if not items:
        raise ArgumentError("no results to download: segment a picture first")
    names = different_names(item.name for item in items)
    if kind != MAPS:
        entries = [_entry(name, item) for name, item in zip(names, items)]
        return zip_data_set(DataSet([dict(each) for each in categories], {_SPLIT: entries}), kind, path, reports)
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix="export-") as folder:
        for name, item in zip(names, items):
            write_maps(Path(folder), name, item)
        return zip_folder(Path(folder), path, reports)


def zip_data_set(data_set: DataSet, kind: str, path: str | Path, reports: str = "") -> Path:
    """Writes a data set as one zip in a format of `formats.kinds`.

    Raises:
        ArgumentError, DataError, OSError: see `formats.export.export`.
    """
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix="export-") as folder:
        out = Path(folder) / "results"
        export(data_set, kind, out, WriteOptions(copy=True))
        return zip_folder(out, path, reports)


def zip_folder(folder: Path, path: str | Path, reports: str = "") -> Path:
    """Packs a folder's files as one zip, which appears when all of it is there.

    Args:
        folder: whose files are packed.
        path: of the zip.
        reports: text of a file left-out.txt beside them; "": no such file.

    Raises:
        OSError: a file that cannot be written.
    """
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as zipped,
    ):
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            zipped.write(file, file.relative_to(folder).as_posix())
        if reports:
            zipped.writestr("left-out.txt", reports)
    return Path(path)


def _entry(name: str, item: Exported) -> Entry:
    def read() -> AnnotatedMap:
        ids = item.result.segmentation
        if item.orientation != 1:  # data sets hold pictures and maps as they are stored
            ids = np.asarray(turned(Image.fromarray(ids), item.orientation, exif=False, by_itself=True), np.int32)
        keys = ("id", "category_id", "iscrowd", "score")
        return AnnotatedMap(
            ids, [{key: each[key] for key in keys if key in each} for each in item.result.segments_info]
        )

    return Entry(name, item.picture, read)


def write_maps(out: Path, name: str, item: Exported) -> None:
    """Writes NAME.png, NAME.json and NAME_overlay.png into a folder, as `ldmseg predict` does.

    Args:
        out: the folder.
        name: of the picture, safe.
        item: its result.

    Raises:
        OSError: a file that cannot be written.
    """
    stem = name.rpartition(".")[0] or name
    write_panoptic_png(out / f"{stem}.png", item.result.segmentation)
    if item.overlay is not None:
        buffer = io.BytesIO()
        Image.fromarray(item.overlay()).save(buffer, "PNG")
        (out / f"{stem}{_OVERLAY}.png").write_bytes(buffer.getbuffer())
    height, width = item.result.segmentation.shape
    record = {"image": name, "file_name": f"{stem}.png", "height": height, "width": width}
    content = json.dumps(record | {"segments_info": item.result.segments_info}, indent=2)
    (out / f"{stem}.json").write_text(content + "\n", encoding="utf-8")
