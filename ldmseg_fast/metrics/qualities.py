"""Turns matches of segments into qualities by category and their averages.

PQ = sum of matched IoU / (TP + FP/2 + FN/2) per category, averaged over the categories that occur (Kirillov et al.,
"Panoptic Segmentation", CVPR 2019, equation 1). LRP = (sum over matches of (1 - IoU) / (1 - 0.5) + FP + FN) /
(TP + FP + FN), an error: 0 is best (Oksuz et al., "One Metric to Measure them All: Localisation Recall Precision (LRP)
for Evaluating Visual Detection Tasks", TPAMI 2021, equation 3 and section 6).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldmseg_fast.metrics.matching import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE

OBJECT_CATEGORY: dict[str, Any] = {"id": 1, "name": "object", "isthing": 1}
MATCH_IOU = 0.5  # above which a pair matches
LRP_PARTS = ("lrp", "lrp_loc", "lrp_fp", "lrp_fn")


@dataclass(frozen=True)
class Qualities:
    """Computes qualities of matches: rows of `pq.KEPT_DTYPE`, [M].

    Attributes:
        categories: COCO entries by id.
        boundary: also computes boundary PQ.
    """

    categories: Mapping[int, Mapping[str, Any]]
    boundary: bool

    def per_category(self, matches: np.ndarray) -> dict[int, dict[str, Any]]:
        """Computes counts and qualities of the categories that occur, in the order of `categories`.

        Args:
            matches: `pq.KEPT_DTYPE` [M].
        """
        entries = {}
        for category_id in self.categories:
            rows = matches[matches["category_id"] == category_id]
            if len(rows):
                entries[category_id] = self._quality(rows)
        return entries

    def _quality(self, rows: np.ndarray) -> dict[str, Any]:
        matched = rows[rows["outcome"] == TRUE_POSITIVE]
        tp, fn = len(matched), int((rows["outcome"] == FALSE_NEGATIVE).sum())
        fp = int((rows["outcome"] >= FALSE_POSITIVE).sum())
        quality = {"tp": tp, "fp": fp, "fn": fn, **_ratios(tp, fp, fn, math.fsum(matched["iou"].tolist()))}
        if self.boundary:
            minimum = np.minimum(matched["iou"], matched["boundary_iou"])
            kept = minimum[minimum > 0.5].tolist()
            lost = tp - len(kept)
            quality["boundary_pq"] = _ratios(len(kept), fp + lost, fn + lost, math.fsum(kept))["pq"]
        return quality

    def averages(self, per_category: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """Averages them over all categories, things and stuff: pq, sq, rq, n, and where asked for boundary_pq."""
        groups = {
            "All": list(per_category),
            "Things": [key for key in per_category if self.categories[key].get("isthing", 1) == 1],
            "Stuff": [key for key in per_category if self.categories[key].get("isthing", 1) != 1],
        }
        names = ("pq", "sq", "rq") + (("boundary_pq",) if self.boundary else ())
        return {
            group: {name: _mean([per_category[key][name] for key in keys]) for name in names} | {"n": len(keys)}
            for group, keys in groups.items()
        }

    def lrp(self, per_category: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """Computes the errors of LRP in the same groups, and by category as `per_category`."""
        errors = {key: _lrp_of(entry) for key, entry in per_category.items()}
        groups = {"All": None, "Things": True, "Stuff": False}
        averages: dict[str, Any] = {}
        for group, things in groups.items():
            chosen = [errors[key] for key in errors if things in (None, self.categories[key].get("isthing", 1) == 1)]
            parts = {name: [error[name] for error in chosen] for name in LRP_PARTS}
            averages[group] = {
                name: _mean([value for value in values if value is not None]) for name, values in parts.items()
            }
        return averages | {"per_category": {str(key): error for key, error in errors.items()}}

    def of_all(self, matches: np.ndarray) -> dict[str, Any]:
        """Averages the qualities of matches, `pq.KEPT_DTYPE` [M], over all their categories."""
        averages: dict[str, Any] = self.averages(self.per_category(matches))["All"]
        return averages


def total(per_category: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns the one category of class-agnostic counting in the shape of an average."""
    entry = per_category.get(OBJECT_CATEGORY["id"]) or {"tp": 0, "fp": 0, "fn": 0, **_ratios(0, 0, 0, 0.0)}
    return {"n": len(per_category), **entry}


def _ratios(tp: int, fp: int, fn: int, iou: float) -> dict[str, float]:
    weight = tp + 0.5 * fp + 0.5 * fn
    return {
        "iou": iou,
        "pq": iou / weight if weight else 0.0,
        "sq": iou / tp if tp else 0.0,
        "rq": tp / weight if weight else 0.0,
    }


def _lrp_of(entry: Mapping[str, Any]) -> dict[str, float | None]:
    tp, fp, fn = entry["tp"], entry["fp"], entry["fn"]
    return {
        "lrp": ((tp - entry["iou"]) / (1 - MATCH_IOU) + fp + fn) / (tp + fp + fn),
        "lrp_loc": (tp - entry["iou"]) / tp if tp else None,
        "lrp_fp": fp / (tp + fp) if tp + fp else None,
        "lrp_fn": fn / (tp + fn) if tp + fn else None,
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
