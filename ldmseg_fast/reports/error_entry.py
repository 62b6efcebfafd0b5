"""Describes one image of the page of errors, and how its segments fared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldmseg_fast.metrics.matching import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE, joint_histogram


@dataclass(frozen=True)
class PageEntry:
    """Holds one image of the page.

    Attributes:
        name: what the page calls it.
        image: uint8 [H, W, 3], None where there is no picture.
        gt_ids, pred_ids: integer [H, W], 0 void.
        gt_segments, pred_segments: the `segments_info` of the maps.
        matches: rows of `MATCH_DTYPE` as `PanopticQuality.add` returns them.
        categories: names by id; empty if class-agnostic.
    """

    name: str
    image: np.ndarray | None
    gt_ids: np.ndarray
    gt_segments: Sequence[Mapping[str, Any]]
    pred_ids: np.ndarray
    pred_segments: Sequence[Mapping[str, Any]]
    matches: np.ndarray
    categories: Mapping[int, str] = field(default_factory=dict)

    def pairs(self) -> dict[int, int]:
        """Returns the predicted id of each ground-truth segment that was found."""
        found = self.matches[self.matches["outcome"] == TRUE_POSITIVE]
        return dict(zip(found["gt_id"].tolist(), found["pred_id"].tolist()))

    def missed(self) -> set[int]:
        """Returns the ground-truth ids without a match."""
        return set(self.matches["gt_id"][self.matches["outcome"] == FALSE_NEGATIVE].tolist())

    def false(self) -> set[int]:
        """Returns the predicted ids without a match."""
        return set(self.matches["pred_id"][self.matches["outcome"] >= FALSE_POSITIVE].tolist())


def image_quality(matches: np.ndarray) -> float:
    """Computes the PQ of one image over its segments of all categories, a fraction; NaN where nothing counts.

    matches: its rows, `MATCH_DTYPE` [M].
    """
    outcome = matches["outcome"]
    weight = np.count_nonzero(outcome == TRUE_POSITIVE) + 0.5 * np.count_nonzero(outcome != TRUE_POSITIVE)
    return math.fsum(matches["iou"][outcome == TRUE_POSITIVE].tolist()) / weight if weight else math.nan


def nearest(ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a map, [H, W] of any dtype, to [height, width]: the ids at the centres of its pixels."""
    rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip((height, width), ids.shape))
    return ids[rows.astype(int)[:, None], columns.astype(int)[None, :]]


CELLS = 200  # of the longer side of the grid


def descriptions(entry: PageEntry) -> tuple[dict[int, str], dict[int, str]]:
    """Writes a line for each segment, by id: of the truth and of the prediction, largest first."""
    pairs, missed, false = entry.pairs(), entry.missed(), entry.false()
    overlap = joint_histogram(entry.gt_ids, entry.pred_ids)
    gt_area: dict[int, int] = {}
    pred_area: dict[int, int] = {}
    for (gt_id, pred_id), pixels in overlap.items():
        gt_area[gt_id] = gt_area.get(gt_id, 0) + pixels
        pred_area[pred_id] = pred_area.get(pred_id, 0) + pixels
    best_gt: dict[int, float] = {}
    best_pred: dict[int, float] = {}
    for (gt_id, pred_id), pixels in overlap.items():
        if gt_id and pred_id:
            iou = pixels / (gt_area[gt_id] + pred_area[pred_id] - pixels - overlap.get((0, pred_id), 0))
            best_gt[gt_id] = max(best_gt.get(gt_id, 0.0), iou)
            best_pred[pred_id] = max(best_pred.get(pred_id, 0.0), iou)
    partners = {pred: gt for gt, pred in pairs.items()}

    def line(segment: Mapping[str, Any], area: int, outcome: str) -> str:
        name = entry.categories.get(segment["category_id"])
        score = f"score {segment['score']:.2f}" if "score" in segment else ""
        parts = [name or f"segment {segment['id']}", f"{area} px", outcome, score]
        return ", ".join(part for part in parts if part)

    truth, prediction = {}, {}
    for segment in sorted(entry.gt_segments, key=lambda s: -gt_area.get(s["id"], 0)):
        key = segment["id"]
        outcome = f"found, IoU {best_gt.get(key, 0.0):.2f}" if key in pairs else "crowd, not counted"
        outcome = f"missed, best IoU {best_gt.get(key, 0.0):.2f}" if key in missed else outcome
        truth[key] = line(segment, gt_area.get(key, 0), outcome)
    for segment in sorted(entry.pred_segments, key=lambda s: -pred_area.get(s["id"], 0)):
        key = segment["id"]
        outcome = f"right, IoU {best_pred.get(key, 0.0):.2f}" if key in partners else "on void or a crowd, not counted"
        outcome = f"false, best IoU {best_pred.get(key, 0.0):.2f}" if key in false else outcome
        prediction[key] = line(segment, pred_area.get(key, 0), outcome)
    return truth, prediction


def lookup(entry: PageEntry, truth: Mapping[int, str], prediction: Mapping[int, str]) -> dict[str, Any]:
    """Returns what the page's script reads.

    That is a small grid of (truth, prediction) pairs as run lengths, and the lines of text.
    """
    height, width = entry.gt_ids.shape
    scale = min(1.0, CELLS / max(height, width))
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    places = [{0: 0} | {key: place for place, key in enumerate(lines, start=1)} for lines in (truth, prediction)]
    grids = [
        _renumbered(nearest(ids, height, width), {key: place for key, place in numbers.items() if key})
        for ids, numbers in zip((entry.gt_ids, entry.pred_ids), places)
    ]
    codes, cells = np.unique(np.stack([grid.ravel() for grid in grids]), axis=1, return_inverse=True)
    cells = cells.ravel()
    starts = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]]))
    lengths = np.diff(starts, append=cells.size)
    return {
        "size": [width, height],
        "runs": np.stack([cells[starts], lengths], axis=1).ravel().tolist(),
        "pairs": codes.T.tolist(),
        "truth": ["void", *truth.values()],
        "prediction": ["nothing", *prediction.values()],
    }


def _renumbered(ids: np.ndarray, numbers: Mapping[int, int]) -> np.ndarray:
    """Gives a map [H, W] new ids; void stays void. Every other id needs a number."""
    keys = np.array([0, *sorted(numbers)])
    values = np.array([0, *(numbers[key] for key in sorted(numbers))], np.int32)
    return values[np.searchsorted(keys, ids)]
