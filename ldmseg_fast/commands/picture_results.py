"""Writes the results of pictures: map PNG, overlay PNG and JSON beside each other."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.picture_folders import FoundPicture
from ldmseg_fast.data.pictures import Picture
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import real_path, replacing
from ldmseg_fast.inference.ensemble import EnsembleResult
from ldmseg_fast.outputs import check_replaced
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.reports.draw import enlarge, overlay
from ldmseg_fast.reports.labels import named_overlay

OVERLAY_SIDE = 2048
LONGEST_NAME = 255  # bytes
SMALL_SIDE = 512  # overlays of small pictures are enlarged to about this side
ENDINGS = (".png", "_overlay.png", "_agreement.png", ".json")  # of a picture's results


def check_results(pictures: Sequence[FoundPicture], out: Path, keep: Sequence[Path] = ()) -> None:
    """Checks that no result of `pictures` in the folder `out` replaces something.

    Raises:
        ArgumentError: results would replace each other, one of the pictures, or one of the files to `keep`, or have
            names that no file system takes.
    """
    folder = real_path(out)
    read = dict.fromkeys((*(picture.source() for picture in pictures), *keep))
    inputs = {real_path(file): file for file in read}
    names: dict[Path, Path] = {}
    for picture in pictures:
        for ending in ENDINGS:
            name = picture.folder / (picture.file.stem + ending)
            if len(os.fsencode(name.name)) > LONGEST_NAME:
                raise ArgumentError(
                    f"{picture.file}: the name of its result, {name.name[:20]}...{ending}, has over {LONGEST_NAME} "
                    "bytes, which file systems do not take; rename the picture"
                )
            other = names.setdefault(name, picture.file)
            if other != picture.file:
                raise ArgumentError(
                    f"{picture.file} and {other} would both be written as {name}; segment them into two folders"
                )
            if folder / name in inputs:
                raise ArgumentError(
                    f"{inputs[folder / name]} would be replaced by the result of {picture.file}; choose another --out"
                )
    for picture in pictures:
        for folder_name in (picture.folder, *picture.folder.parents):
            if folder_name in names:
                raise ArgumentError(
                    f"{picture.file} has its results in a folder {folder_name}, which the result of "
                    f"{names[folder_name]} is called; segment them into two folders"
                )
    check_replaced(map(out.joinpath, names), read)


def image_id(file: Path) -> str:
    """Returns what a picture's noise is drawn by: its name without the ending, which need not be text."""
    return os.fsencode(file.stem).decode("utf-8", "backslashreplace")


def preview_of(picture: Picture) -> np.ndarray:
    """Scales a picture down to what an overlay shows: uint8 [h, w, 3], at most OVERLAY_SIDE pixels long."""
    height, width = picture.size
    longest = max(height, width)
    if longest <= OVERLAY_SIDE:
        return np.asarray(picture.pixels)
    height, width = (max(1, round(side * OVERLAY_SIDE / longest)) for side in (height, width))
    pixels = picture.pixels if isinstance(picture.pixels, Image.Image) else Image.fromarray(picture.pixels)
    return np.asarray(pixels.resize((width, height), Image.Resampling.BOX))


def save_overlay(
    path: Path, preview: np.ndarray, result: PanopticResult, categories: CategoryTable | None = None
) -> None:
    """Writes a picture, uint8 [h, w, 3] of `preview_of`, and its map, int32 [H, W], as one PNG for the eye.

    Pixels of small pictures are enlarged, or their segments' edges would hide them. Of a model with categories it has
    names on the segments and a legend.
    """
    segmentation = result.segmentation
    height, width = preview.shape[:2]
    if segmentation.shape == (height, width):
        preview, segmentation = enlarge(preview, SMALL_SIDE), enlarge(segmentation, SMALL_SIDE)
    else:
        rows, columns = (
            ((np.arange(few) + 0.5) * (many / few)).astype(np.intp)
            for few, many in zip((height, width), segmentation.shape)
        )
        segmentation = segmentation[rows[:, None], columns]
    if categories is None:
        _save_png(path, overlay(preview, segmentation))
    else:
        _save_png(path, named_overlay(preview, segmentation, result.segments_info, categories))


def write_result(
    out: Path,
    picture: FoundPicture,
    preview: np.ndarray,
    result: PanopticResult,
    categories: CategoryTable | None = None,
) -> Path:
    """Writes a picture's result: NAME.png, NAME_overlay.png and NAME.json in its folder below OUT.

    NAME.png holds the ids as COCO colours. An ensemble's result also gets NAME_agreement.png.

    Args:
        out: the folder of all results.
        picture: whose name without the ending is NAME.
        preview: the picture, uint8 [h, w, 3] of `preview_of`.
        result: its map, int32 [H, W], and segments.
        categories: of models with categories.

    Returns:
        The JSON.

    Raises:
        OSError: names the file that cannot be written.
    """
    folder, stem = out / picture.folder, picture.file.stem
    folder.mkdir(parents=True, exist_ok=True)
    write_panoptic_png(folder / f"{stem}.png", result.segmentation)
    save_overlay(folder / f"{stem}_overlay.png", preview, result, categories)
    height, width = result.segmentation.shape
    record: dict[str, Any] = {
        "image": picture.file.name,
        "file_name": f"{stem}.png",
        "height": height,
        "width": width,
        "segments_info": result.segments_info,
    }
    if isinstance(result, EnsembleResult):
        agreement = np.rint(255.0 * result.agreement).astype(np.uint8)
        _save_png(folder / f"{stem}_agreement.png", agreement)
        record["agreement_file_name"] = f"{stem}_agreement.png"
    path = folder / f"{stem}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _save_png(path: Path, picture: np.ndarray) -> None:
    buffer = io.BytesIO()  # Pillow's own error does not tell a full disk from another fault
    Image.fromarray(picture).save(buffer, "PNG")
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
