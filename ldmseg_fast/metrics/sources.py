"""Opens what holds the segments of a data set: a panoptic JSON with PNGs, annotations with masks, or a folder of PNGs.

Which of them a path is its content tells. The formats are those of https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.files import open_file
from ldmseg_fast.metrics.annotation_index import index_annotations, index_streamed
from ldmseg_fast.metrics.mask_files import MaskFile, StreamedMasks, open_mask_file
from ldmseg_fast.metrics.mask_maps import MaskMap, Size
from ldmseg_fast.metrics.matching import segment_table
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import load_panoptic_json, read_panoptic_png
from ldmseg_fast.panoptic.near_files import NearFiles, is_file


@dataclass(frozen=True)
class Source:
    """Holds one side of a comparison.

    Attributes:
        path: what was opened.
        image_ids: in the order of the file.
        categories: empty where there are none.
        used_categories: ids that segments have.
        lists_images: whether an image that is not among `image_ids` is missing. A list of results names images with a
            segment alone: others are empty.
        read: read(k, size, things) gives the map of image k, a PNG's path or painted masks, and its table (see
            `segment_table`). `size` is the other side's, where this one has none; `things` are category ids.
        size: (H, W) of image k, None where only the other side can tell.
        name: the file name of image k without its ending, by which a folder of PNGs is matched.
        details: the `segments_info` of image k with all that the file says of them.
        pictures: file names of pictures by image id.
        is_masks: whether maps are painted of masks.
        is_folder: whether there are PNGs alone.
        streamed: the masks, where C++ indexes them.
    """

    path: Path
    image_ids: list[int | str]
    categories: list[dict[str, Any]]
    used_categories: set[int]
    lists_images: bool
    read: Callable[[int, Size | None, Collection[int]], tuple[Path | MaskMap, np.ndarray]]
    size: Callable[[int], Size | None]
    name: Callable[[int], str]
    details: Callable[[int], Sequence[dict[str, Any]]]
    pictures: Callable[[], dict[int | str, Any]]
    is_masks: bool = False
    is_folder: bool = False
    streamed: StreamedMasks | None = None


def open_source(
    path: str | Path, folder: str | Path | None = None, *, predictions: bool = False, class_agnostic: bool = False
) -> Source:
    """Opens one side.

    Args:
        path: a COCO panoptic JSON, COCO instances or results with RLE or polygons, or a folder of panoptic PNGs.
        folder: of the PNGs of a panoptic JSON, see `png_folder`.
        predictions: `images` and `categories` may be missing.
        class_agnostic: a folder of PNGs, which has no categories, will do.

    Raises:
        PanopticFormatError: names the file, the entry and the cure.
        OSError: a file that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, class_agnostic)
    index = index_streamed(path, predictions)
    if index is None:
        masks = open_mask_file(path, predictions=predictions or class_agnostic)
        if masks is not None:
            return _of_masks(masks)
        index = index_annotations(path, predictions=predictions)
    found = index
    root: list[Path] = []

    def place() -> Path:
        if not root:  # late: predictions of no image need no folder
            root.append(png_folder(path, folder))
        return root[0]

    if found.image_ids:
        place()

    def read(k: int, size: Size | None, things: Collection[int]) -> tuple[Path, np.ndarray]:
        name, table = found.annotation(k)
        return place() / name, table

    content = cache(lambda: load_panoptic_json(path, predictions=predictions))
    return Source(
        path,
        found.image_ids,
        found.categories,
        found.used_categories,
        True,
        read,
        lambda k: png_size(place() / found.annotation(k)[0]),
        lambda k: PurePosixPath(found.annotation(k)[0]).stem,
        lambda k: content()["annotations"][k]["segments_info"],
        lambda: {image["id"]: image.get("file_name") for image in content().get("images", ())},
    )


def _of_masks(masks: MaskFile | StreamedMasks) -> Source:
    return Source(
        masks.path,
        masks.image_ids,
        masks.categories,
        masks.used_categories,
        masks.lists_images,
        masks.read,
        masks.size,
        lambda k: PurePosixPath(str(masks.names.get(masks.image_ids[k]) or masks.image_ids[k])).stem,
        masks.details,
        lambda: masks.names,
        is_masks=True,
        streamed=masks if isinstance(masks, StreamedMasks) else None,
    )


def _open_folder(folder: Path, class_agnostic: bool) -> Source:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(".png"))
    if not names:
        raise PanopticFormatError(f"{folder}: no PNG in this folder; give a panoptic JSON, or the folder of its PNGs")
    if not class_agnostic:
        near = [path for path in (folder.with_name(f"{folder.name}.json"),) if path.is_file()]
        cure = f"give {near[0]}" if near else "give the JSON that lists its segments"
        raise PanopticFormatError(
            f"{folder}: a folder of PNGs has no categories; {cure}, or count all segments alike with --class-agnostic"
        )

    def read(k: int, size: Size | None = None, things: Collection[int] = ()) -> tuple[MaskMap, np.ndarray]:
        ids = read_panoptic_png(folder / names[k])
        present = [{"id": number, "category_id": 1} for number in np.unique(ids).tolist() if number]
        return on_its_side(ids), segment_table(present, True)

    def details(k: int) -> list[dict[str, Any]]:
        return [{"id": row[0], "category_id": row[1], "iscrowd": row[2]} for row in read(k)[1].tolist()]

    stems: list[int | str] = [PurePosixPath(name).stem for name in names]
    return Source(
        folder,
        stems,
        [],
        {1},
        True,
        read,
        lambda k: png_size(folder / names[k]),
        lambda k: str(stems[k]),
        details,
        lambda: {},
        is_folder=True,
    )


def on_its_side(ids: np.ndarray) -> MaskMap:
    """Turns a map, int32 [H, W], into the form of painted masks."""
    columns = np.ascontiguousarray(ids.T)
    return MaskMap((ids.shape[0], ids.shape[1]), columns if _C is None else _C.RunMap(columns), [], 0)


def png_size(path: Path) -> Size | None:
    """Returns (H, W) of a PNG's header; None where it is none."""
    try:
        with open_file(path, PanopticFormatError, "PNG file") as file:
            header = file.read(24)
    except (OSError, PanopticFormatError):
        return None
    if len(header) < 24 or header[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", header[16:24])
    return height, width


def png_folder(json_path: str | Path, given: str | Path | None = None) -> Path:
    """Finds the folder with the PNGs of a panoptic JSON.

    Raises:
        PanopticFormatError: there is none; the message names the places looked at.
    """
    path = Path(json_path)
    places = [path.parent / path.stem, path.parent.parent / path.stem] if given is None else [Path(given)]
    for place in places:
        if place.is_dir():
            return place
    tried = ", ".join(map(str, places))
    raise PanopticFormatError(f"{json_path}: no folder of PNGs at {tried}; name it with --gt-folder or --pred-folder")


def lost_png(path: Path) -> str:
    """Describes a PNG that is listed but not there; "" where it is there."""
    if is_file(path):
        return ""
    near = NearFiles(path.parent).nearest(path.name) or "fetch or predict it again"
    return f"{path}: the JSON lists this PNG but there is no such file; {near}"
