"""Mean intersection over union, of classes over a data set or of segments whose ids are known."""

import math
from collections import Counter
from typing import Any

import numpy as np

from ldmseg_fast.metrics.matching import joint_histogram


class MeanIoU:
    """Accumulates maps; the result does not depend on their order or on how ranks shared them.

    By default an id means the same in every image (a category): intersections and unions are summed over all images,
    and the mean is over the ids that the ground truth has. With `per_segment` an id means something in its own image
    only (the slots of a reconstruction): each ground-truth segment has one IoU, and the mean is over all segments.
    Pixels whose ground truth is void (0) do not count.
    """

    def __init__(self, per_segment: bool = False):
        self.per_segment = per_segment
        self._intersection: Counter[int] = Counter()
        self._gt: Counter[int] = Counter()
        self._pred: Counter[int] = Counter()
        self._ious: list[float] = []

    def add(self, gt_ids: np.ndarray, pred_ids: np.ndarray) -> None:
        """Counts one pair of maps [H, W] of ids in 0..2^24-1; `PanopticFormatError` where they are no such maps."""
        intersection: Counter[int] = Counter()
        gt: Counter[int] = Counter()
        pred: Counter[int] = Counter()
        for (gt_id, pred_id), pixels in joint_histogram(gt_ids, pred_ids).items():
            if gt_id != 0:
                gt[gt_id] += pixels
                pred[pred_id] += pixels
                intersection[gt_id] += pixels * (gt_id == pred_id)
        if self.per_segment:
            self._ious += _ious(intersection, gt, pred).values()
        else:
            self._intersection += intersection
            self._gt += gt
            self._pred += pred

    def merge(self, other: "MeanIoU") -> "MeanIoU":
        """Adds another rank's part."""
        if self.per_segment != other.per_segment:
            raise ValueError("a mean over classes and one over segments cannot be merged")
        self._intersection += other._intersection
        self._gt += other._gt
        self._pred += other._pred
        self._ious += other._ious
        return self

    def result(self) -> dict[str, Any]:
        """`miou` (a fraction), `n` (ids or segments) and, over classes, `per_id` keyed by str(id)."""
        if self.per_segment:
            return {"miou": _mean(self._ious), "n": len(self._ious)}
        ious = _ious(self._intersection, self._gt, self._pred)
        per_id = {str(key): ious[key] for key in sorted(ious)}
        return {"miou": _mean(list(ious.values())), "n": len(ious), "per_id": per_id}


def _ious(intersection: Counter[int], gt: Counter[int], pred: Counter[int]) -> dict[int, float]:
    return {key: intersection[key] / (gt[key] + pred[key] - intersection[key]) for key in gt}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
