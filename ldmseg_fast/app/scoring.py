"""Scores one map against the truth, and shows where it is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.data.pictures import read_content
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.formats.label_maps import labels_of
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.panoptic.format import MAX_ID, MAX_PIXELS, check_ids, read_panoptic_png
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes
from ldmseg_fast.reports.error_entry import PageEntry, descriptions
from ldmseg_fast.reports.error_pictures import pictures

MAX_SEGMENTS = 5000  # of an uploaded map: a photograph taken for a map has a million "segments"
_PNG, _RGB = b"\x89PNG\r\n\x1a\n", 2  # what a PNG begins with; its colour type of RGB


@dataclass(frozen=True)
class Score:
    """Holds how a map fares against the truth, class-agnostic.

    Attributes:
        pq, sq, rq: fractions (Kirillov et al., CVPR 2019, equation 1); NaN where the truth has no segment and none is
            predicted.
        found, missed, false: numbers of segments.
        truth, prediction, errors: pictures for the eye, uint8 [h, w, 3]; found segments have one colour in both maps.
        segments: a line of text for each segment of the truth, the largest first, then for those of the prediction.
    """

    pq: float
    sq: float
    rq: float
    found: int
    missed: int
    false: int
    truth: np.ndarray
    prediction: np.ndarray
    errors: np.ndarray
    segments: tuple[list[str], list[str]]

    def numbers(self) -> dict[str, Any]:
        """Returns what JSON holds: `pq`, `sq`, `rq` as fractions or null, and counts."""
        shares = {name: getattr(self, name) for name in ("pq", "sq", "rq")}
        return {name: None if math.isnan(value) else value for name, value in shares.items()} | {
            name: getattr(self, name) for name in ("found", "missed", "false")
        }


def read_truth(truth: Any, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads the ids of a true map, int32 [H, W], 0 void.

    Args:
        truth: an array of ids; the path of a panoptic PNG in colours (id = R + 256 G + 65536 B), or of a grey or
            palette picture without loss, whose values are the ids.
        max_pixels: of a map; larger ones are refused before they are decoded.

    Raises:
        DataError, PanopticFormatError: no such map, or one of over MAX_SEGMENTS segments; the file is named.
    """
    if not isinstance(truth, str | Path):
        return np.ascontiguousarray(check_ids(np.asarray(truth)), np.int32)
    content = read_content(truth)
    if content.startswith(_PNG) and len(content) > 25 and content[25] == _RGB:
        return of_few_segments(read_panoptic_png(truth, max_pixels=max_pixels), truth)
    labels = labels_of(content, truth)
    if labels.size > max_pixels:
        raise DataError(f"{truth}: {labels.shape[1]}x{labels.shape[0]} is over {max_pixels} pixels: scale it down")
    return of_few_segments(labels, truth)


def of_few_segments(ids: np.ndarray, name: Any) -> np.ndarray:
    """Returns a map, int32 [H, W], whose segments are few enough to be listed.

    Args:
        ids: the map.
        name: of it, for the error.

    Raises:
        DataError: over MAX_SEGMENTS segments.
    """
    seen = np.zeros(MAX_ID + 1, bool)
    seen[check_ids(ids)] = True
    if (count := int(seen[1:].sum())) > MAX_SEGMENTS:
        raise DataError(
            f"{name}: {count} segments, this app takes {MAX_SEGMENTS}: give a map, whose colours are ids, not a picture"
        )
    return ids


def score(predicted: PanopticResult | np.ndarray, truth: np.ndarray, view: np.ndarray | None = None) -> Score:
    """Scores a map against the truth by panoptic quality without categories.

    Args:
        predicted: a result, or ids [H, W].
        truth: ids [H, W], 0 void.
        view: the picture, uint8 [h, w, 3], below the errors; None: grey.

    Raises:
        ArgumentError: maps of different sizes.
        PanopticFormatError: ids outside 0..2^24-1.
    """
    ids = predicted.segmentation if isinstance(predicted, PanopticResult) else check_ids(np.asarray(predicted))
    if ids.shape != truth.shape:
        raise ArgumentError(
            f"the truth has {truth.shape[1]} x {truth.shape[0]} pixels, the map {ids.shape[1]} x {ids.shape[0]}: give "
            f"the truth of this picture, at its size"
        )
    scores = {}
    if isinstance(predicted, PanopticResult):
        scores = {
            segment["id"]: {"score": segment["score"]} for segment in predicted.segments_info if "score" in segment
        }
    gt_segments, pred_segments = (
        [{**shape, "category_id": 1, "iscrowd": 0} for shape in segment_shapes(each)] for each in (truth, ids)
    )
    quality = PanopticQuality(class_agnostic=True)
    matches = quality.add(truth, gt_segments, ids, pred_segments)
    total = quality.compute()["class_agnostic"]
    if view is not None and view.shape[:2] != truth.shape:
        view = np.asarray(Image.fromarray(view).resize(truth.shape[::-1], Image.Resampling.BILINEAR))
    listed = [segment | scores.get(segment["id"], {}) for segment in pred_segments]
    entry = PageEntry("picture", view, truth, gt_segments, ids, listed, matches)
    _, truth_picture, predicted_picture, errors = pictures(entry)
    truth_lines, predicted_lines = (list(each.values()) for each in descriptions(entry))
    counted = total["tp"] + total["fn"] + total["fp"] > 0
    pq, sq, rq = (float(total[name]) if counted else math.nan for name in ("pq", "sq", "rq"))
    return Score(
        pq,
        sq,
        rq,
        int(total["tp"]),
        int(total["fn"]),
        int(total["fp"]),
        truth_picture,
        predicted_picture,
        errors,
        (truth_lines, predicted_lines),
    )
