"""Accumulates panoptic quality in memory: add images, merge ranks, read the result.

PQ = sum of matched IoU / (TP + FP/2 + FN/2) per category, averaged over the categories that occur (Kirillov et al.,
"Panoptic Segmentation", CVPR 2019, equation 1).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ldmseg_fast.errors import ArgumentError, PanopticFormatError
from ldmseg_fast.metrics.matching import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    FALSE_POSITIVE_ONE_CROWD,
    TRUE_POSITIVE,
    match_segments,
    segment_table,
)

OBJECT_CATEGORY: dict[str, Any] = {"id": 1, "name": "object", "isthing": 1}
SIZE_BINS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # COCO's areas, in pixels


# What is kept of a row of MATCH_DTYPE; the whole set of images is held at once.
KEPT_DTYPE = np.dtype(
    [("image", "i4"), ("category_id", "i4"), ("area", "i4"), ("outcome", "i1"), ("iou", "f8"), ("boundary_iou", "f8")]
)


class PQStat:
    """Accumulates matches of images; the result does not depend on the order of images or on how ranks shared them.

    A segment that counts takes 29 bytes.

    Args:
        categories: COCO entries with `id` and `isthing`.
        class_agnostic: makes every segment one category ("object") and ignores `categories`; `result()` then also holds
            the crowd-correct numbers.
        boundary: also computes boundary PQ.
    """

    def __init__(self, categories: Iterable[Mapping[str, Any]], class_agnostic: bool = False, boundary: bool = False):
        self.class_agnostic = class_agnostic
        self.boundary = boundary
        chosen = [OBJECT_CATEGORY] if class_agnostic else categories
        self.categories = {int(category["id"]): dict(category) for category in chosen}
        self.image_ids: list[int | str] = []
        self._rows, self._count = np.empty(0, KEPT_DTYPE), 0  # with room for more

    def add(
        self,
        gt_ids: np.ndarray,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_ids: np.ndarray,
        pred_segments: Sequence[Mapping[str, Any]],
        image_id: int | str | None = None,
        use_gt_area: bool = False,
    ) -> np.ndarray:
        """Matches one image: two maps, integer [H, W] with 0 void, and their `segments_info`.

        Args:
            image_id: by default the number of images so far; needed where ranks are merged.
            use_gt_area: takes the ground truth's areas from `gt_segments`, as panopticapi does, instead of counting
                pixels.

        Returns:
            The image's rows of `MATCH_DTYPE`, [M].

        Raises:
            PanopticFormatError: maps and `segments_info` that disagree; the message names the image.
        """
        image_id = len(self.image_ids) if image_id is None else image_id
        try:
            gt_table = segment_table(gt_segments, self.class_agnostic, use_gt_area)
            pred_table = segment_table(pred_segments, self.class_agnostic)
            self.check_categories(gt_table, "ground truth")
            self.check_categories(pred_table, "prediction")
            matches = match_segments(gt_ids, gt_table, pred_ids, pred_table, self.boundary)
        except PanopticFormatError as error:
            raise PanopticFormatError(f"image {image_id}: {error}") from None
        self.add_matches(image_id, matches)
        return matches

    def check_categories(self, table: np.ndarray, name: str) -> None:
        """Checks the categories of a segment table, int64 [S, 4].

        Raises:
            PanopticFormatError: a category that is not among the categories; `name` says which table.
        """
        if unknown := set(table[:, 1].tolist()) - self.categories.keys():
            raise PanopticFormatError(f"{name}: category ids {sorted(unknown)} are not among the categories")

    def add_matches(self, image_id: int | str, matches: np.ndarray) -> None:
        """Adds the rows of one image, `MATCH_DTYPE` [M], that `match_segments` returned."""
        kept = self._more(len(matches))
        kept["image"] = len(self.image_ids)
        kept["area"] = np.minimum(matches["area"], np.iinfo(np.int32).max)
        for name in ("category_id", "outcome", "iou", "boundary_iou"):
            kept[name] = matches[name]
        self.image_ids.append(image_id)

    def merge(self, other: "PQStat") -> "PQStat":
        """Adds the images of `other` (another rank's part) to this one and returns this one.

        Raises:
            ArgumentError: other categories, or an image that both have counted.
        """
        if self.categories != other.categories or self.class_agnostic != other.class_agnostic:
            raise ArgumentError("statistics over different categories cannot be merged")
        if both := set(self.image_ids) & set(other.image_ids):
            raise ArgumentError(f"images counted twice, give each rank its own: {sorted(both, key=str)[:20]}")
        theirs = self._more(other._count)
        theirs[:] = other.matches()
        theirs["image"] += len(self.image_ids)
        self.image_ids += other.image_ids
        return self

    def _more(self, count: int) -> np.ndarray:
        """Makes room for `count` rows and returns them to be filled in."""
        if self._count + count > len(self._rows):
            rows = np.empty((self._count + count) * 3 // 2, KEPT_DTYPE)
            rows[: self._count] = self.matches()
            self._rows = rows
        self._count += count
        return self._rows[self._count - count : self._count]

    def result(self) -> dict[str, Any]:
        """Returns panopticapi's fractions: `All`, `Things`, `Stuff` -> pq, sq, rq, n.

        `per_category`, keyed by str(id), has tp, fp, fn, iou, pq, sq, rq of the categories that occur. `sizes` has the
        averages over small, medium and large segments. There a match or a miss counts at the ground truth's area, a
        false positive at its own.

        With `boundary`, each also has `boundary_pq`: a match needs min(IoU, boundary IoU) > 0.5 and adds that minimum.

        Class-agnostic results add `class_agnostic` (with tp, fp, fn, iou), and `crowd_correct` and `pq_crowd_correct`.
        These excuse false positives on every crowd region instead of panopticapi's last one per category.
        """
        matches = self.matches()
        per_category = self._per_category(matches)
        result = self._averages(per_category)
        result["per_category"] = {
            str(key): entry
            | {"name": self.categories[key].get("name", str(key)), "isthing": self.categories[key].get("isthing", 1)}
            for key, entry in per_category.items()
        }
        result["images"] = len(self.image_ids)
        result["sizes"] = {
            name: self._averages(self._per_category(matches[(matches["area"] >= low) & (matches["area"] < high)]))[
                "All"
            ]
            for name, (low, high) in SIZE_BINS.items()
        }
        if self.class_agnostic:
            correct = self._per_category(matches[matches["outcome"] != FALSE_POSITIVE_ONE_CROWD])
            result["class_agnostic"] = self._total(per_category)
            result["crowd_correct"] = self._total(correct)
            result["pq_crowd_correct"] = result["All"]["pq_crowd_correct"] = result["crowd_correct"]["pq"]
        return result

    def matches(self) -> np.ndarray:
        """Returns all rows so far, `KEPT_DTYPE` [M]: a view that must not be written to.

        `image` is the place in `image_ids`.
        """
        return self._rows[: self._count]

    def _per_category(self, matches: np.ndarray) -> dict[int, dict[str, Any]]:
        """Computes counts and qualities of the categories that occur, in the order of `categories`."""
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

    def _averages(self, per_category: dict[int, dict[str, Any]]) -> dict[str, Any]:
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

    def _total(self, per_category: dict[int, dict[str, Any]]) -> dict[str, Any]:
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


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
