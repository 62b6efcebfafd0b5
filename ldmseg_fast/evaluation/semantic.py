"""Measures the mean intersection over union of categories (PASCAL VOC's measure; Everingham et al., IJCV 2010)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldmseg_fast.metrics.class_vote import category_map
from ldmseg_fast.metrics.matching import joint_histogram


class SemanticIoU:
    """Accumulates panoptic maps as maps of categories; the result does not depend on their order or on the ranks.

    Pixels whose ground truth is void do not count. A predicted void is no category, and so misses the true one.

    Args:
        categories: COCO entries with `id`.
    """

    def __init__(self, categories: Sequence[Mapping[str, Any]]) -> None:
        self.numbers = {int(category["id"]): number for number, category in enumerate(categories, 1)}
        self.pixels: Counter[tuple[int, int]] = Counter()  # (true, predicted) number

    def add(
        self,
        gt_ids: np.ndarray,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_ids: np.ndarray,
        pred_segments: Sequence[Mapping[str, Any]],
    ) -> None:
        """Counts one image: two maps, integer [H, W] with 0 void, and their `segments_info`."""
        truth, guess = (
            category_map(ids, [{"id": s["id"], "category_id": self.numbers[s["category_id"]]} for s in segments])
            for ids, segments in ((gt_ids, gt_segments), (pred_ids, pred_segments))
        )
        for pair, count in joint_histogram(truth, guess).items():
            if pair[0]:
                self.pixels[pair] += count

    def merge(self, other: SemanticIoU) -> SemanticIoU:
        """Adds another rank's part to this one and returns this one."""
        self.pixels.update(other.pixels)
        return self

    def result(self) -> dict[str, Any]:
        """Returns `miou`, the mean over the categories that are true or predicted somewhere, and `per_category`.

        Both are fractions; `per_category` has category id -> IoU.
        """
        true, predicted = Counter[int](), Counter[int]()
        for (truth, guess), count in self.pixels.items():
            true[truth] += count
            predicted[guess] += count
        found = {}
        for category_id, number in self.numbers.items():
            both = self.pixels[number, number]
            union = true[number] + predicted[number] - both
            if union:
                found[category_id] = both / union
        return {"miou": math.fsum(found.values()) / len(found) if found else 0.0, "per_category": found}
