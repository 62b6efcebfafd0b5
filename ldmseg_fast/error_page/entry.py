"""One image of the page, and how its segments fared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldmseg_fast.metrics.matching import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE


@dataclass(frozen=True)
class PageEntry:
    """One image. image: uint8 [H, W, 3], None where there is no picture. gt_ids, pred_ids: [H, W], 0 void.

    matches: rows of `MATCH_DTYPE` as `PQStat.add` returns them. categories: names by id; empty if class-agnostic.
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
        """Predicted id of each ground-truth segment that was found."""
        found = self.matches[self.matches["outcome"] == TRUE_POSITIVE]
        return dict(zip(found["gt_id"].tolist(), found["pred_id"].tolist()))

    def missed(self) -> set[int]:
        """Ground-truth ids without a match."""
        return set(self.matches["gt_id"][self.matches["outcome"] == FALSE_NEGATIVE].tolist())

    def false(self) -> set[int]:
        """Predicted ids without a match."""
        return set(self.matches["pred_id"][self.matches["outcome"] >= FALSE_POSITIVE].tolist())


def image_quality(matches: np.ndarray) -> float:
    """PQ of one image over its segments of all categories, a fraction; NaN where nothing counts."""
    outcome = matches["outcome"]
    weight = np.count_nonzero(outcome == TRUE_POSITIVE) + 0.5 * np.count_nonzero(outcome != TRUE_POSITIVE)
    return math.fsum(matches["iou"][outcome == TRUE_POSITIVE].tolist()) / weight if weight else math.nan
