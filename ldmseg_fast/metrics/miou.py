"""Averages the intersection over union of segments whose ids are known, such as the slots of a reconstruction.

IoU is the PASCAL VOC measure of segmentation (Everingham et al., IJCV 2010). Here each segment of each image has one.
"""

import math
from collections import Counter

import numpy as np

from ldmseg_fast.metrics.matching import joint_histogram


class MeanIoU:
    """Accumulates maps; the result does not depend on their order or on how ranks shared them.

    Each ground-truth segment has one IoU, with the pixels of the same id in the same image. Pixels whose ground truth
    is void (0) do not count.
    """

    def __init__(self) -> None:
        self._ious: list[float] = []

    def add(self, gt_ids: np.ndarray, pred_ids: np.ndarray) -> None:
        """Counts one pair of maps, integer [H, W], ids in 0..2^24-1.

        Raises:
            PanopticFormatError: maps that are none, or of different sizes.
        """
        overlap = joint_histogram(gt_ids, pred_ids)
        gt: Counter[int] = Counter()
        pred: Counter[int] = Counter()
        for (gt_id, pred_id), pixels in overlap.items():
            if gt_id != 0:
                gt[gt_id] += pixels
                pred[pred_id] += pixels
        for key in gt:
            intersection = overlap.get((key, key), 0)
            self._ious.append(intersection / (gt[key] + pred[key] - intersection))

    def merge(self, other: "MeanIoU") -> "MeanIoU":
        """Adds another rank's part to this one and returns this one."""
        self._ious += other._ious
        return self

    def result(self) -> dict[str, float]:
        """Returns `miou` (a fraction) and `n`, the number of segments."""
        return {"miou": math.fsum(self._ious) / len(self._ious) if self._ious else 0.0, "n": len(self._ious)}
