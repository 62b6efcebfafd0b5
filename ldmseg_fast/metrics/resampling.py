"""Resamples images: an interval of PQ, and the paired comparison of two methods on the same images."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.metrics.matching import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE
from ldmseg_fast.metrics.pq import PanopticQuality

LEVEL = 0.95


@dataclass(frozen=True)
class _Cells:
    """Holds the sums of each image and category that occur together: places of both, weight and IoU, [N] each."""

    images: int
    categories: int
    image: np.ndarray
    category: np.ndarray
    weight: np.ndarray
    iou: np.ndarray

    def quality(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums weight and IoU by category, each cell `times` [N] over."""
        total = np.bincount(self.category, times * self.weight, self.categories)
        return total, np.bincount(self.category, times * self.iou, self.categories)


def check_draws(replicates: int, seed: int) -> None:
    """Checks what random draws are made by.

    Raises:
        ArgumentError: names what is no whole number of at least 0.
    """
    for name, value in (("replicates", replicates), ("seed", seed)):
        if not isinstance(value, Integral) or value < 0:
            raise ArgumentError(f"{name}={value!r}: a whole number of at least 0 expected")


def bootstrap_interval(
    stat: PanopticQuality, replicates: int = 1000, seed: int = 0, level: float = LEVEL
) -> dict[str, Any] | None:
    """Returns the percentile interval of PQ when images are drawn anew with replacement; None without images.

    It does not depend on the order in which images were added. Source: Efron, "Bootstrap methods: another look at the
    jackknife", 1979.
    """
    check_draws(replicates, seed)
    if not len(stat.image_ids) or not len(stat.matches()) or not replicates:
        return None
    cells = _cells(stat)
    generator, values = np.random.default_rng(seed), []
    for _ in range(replicates):
        times = np.bincount(generator.integers(0, cells.images, cells.images), minlength=cells.images)[cells.image]
        values.append(_mean_quality(*cells.quality(times)))
    low, high = np.percentile(values, [50 * (1 - level), 100 - 50 * (1 - level)])
    return {"pq": [float(low), float(high)], "level": level, "replicates": replicates, "seed": seed}


def compare(
    first: PanopticQuality, second: PanopticQuality, replicates: int = 1000, seed: int = 0, level: float = LEVEL
) -> dict[str, Any]:
    """Compares two methods on the same images.

    The interval is that of the paired bootstrap: both methods on the same images drawn anew. The p-value is that of a
    permutation test: if the methods were alike, it would not matter which of them has made the prediction of an image,
    so that these are exchanged image by image at random, and differences as large as the one found are counted (two-
    sided; Good, "Permutation Tests", 2000; Koehn, "Statistical significance tests for machine translation evaluation",
    2004).

    Args:
        first, second: statistics over the same categories and images.
        replicates: of each kind. The smallest p-value is 1 / (replicates + 1).

    Returns:
        `difference` of PQ (second - first, fractions), `interval`, `p_value`, `pq` of both, `replicates`, `seed`,
        `level`, and `changed`: image_id, pq of both and their difference, by the size of the difference.

    Raises:
        ArgumentError: statistics over other images or categories, replicates or a seed below 0.
    """
    if first.categories != second.categories or set(first.image_ids) != set(second.image_ids):
        raise ArgumentError("methods are compared on the same images and categories: evaluate both on one ground truth")
    if not len(first.image_ids):
        raise ArgumentError("there are no images to compare methods on")
    check_draws(replicates, seed)
    one, two = _cells(first), _cells(second)
    ones = [np.ones(len(cells.image)) for cells in (one, two)]
    pq = [_mean_quality(*cells.quality(times)) for cells, times in zip((one, two), ones)]
    found = pq[1] - pq[0]
    generator, drawn, extreme = np.random.default_rng(seed), [], 0
    for _ in range(replicates):
        times = np.bincount(generator.integers(0, one.images, one.images), minlength=one.images)
        drawn.append(_mean_quality(*two.quality(times[two.image])) - _mean_quality(*one.quality(times[one.image])))
        swapped = generator.integers(0, 2, one.images)
        a, b, c, d = (cells.quality(chosen[cells.image]) for chosen in (1 - swapped, swapped) for cells in (one, two))
        mixed = _mean_quality(b[0] + c[0], b[1] + c[1]) - _mean_quality(a[0] + d[0], a[1] + d[1])
        extreme += abs(mixed) >= abs(found) * (1 - 1e-12)
    tail = 50 * (1 - level)
    return {
        "difference": found,
        "pq": pq,
        "interval": [float(value) for value in np.percentile(drawn, [tail, 100 - tail])] if drawn else None,
        "p_value": (1 + int(extreme)) / (1 + replicates),
        "level": level,
        "replicates": replicates,
        "seed": seed,
        "changed": _changed(first, second),
    }


def sums(matches: np.ndarray, group: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sums tp, fp and fn, int64, and IoU, float64, per group, each [count].

    matches: `KEPT_DTYPE` [M]. group: whole numbers below `count`, [M]. Source: panopticapi's counts, see `metrics.pq`.
    """
    outcome = matches["outcome"]
    tp, fp, fn = (
        np.bincount(group[chosen], minlength=count)
        for chosen in (outcome == TRUE_POSITIVE, outcome >= FALSE_POSITIVE, outcome == FALSE_NEGATIVE)
    )
    iou = np.zeros(count)
    order = np.lexsort((matches["iou"], group))  # the same sum whatever order images came in
    np.add.at(iou, group[order], matches["iou"][order])
    return tp, fp, fn, iou


def _cells(stat: PanopticQuality) -> _Cells:
    matches, count = stat.matches(), len(stat.image_ids)
    by_id = np.empty(count, np.int64)
    by_id[sorted(range(count), key=lambda index: str(stat.image_ids[index]))] = np.arange(count)
    categories = np.fromiter(stat.categories, np.int64)
    order = np.argsort(categories)
    category = order[np.searchsorted(categories, matches["category_id"], sorter=order)]
    cells, cell = np.unique(by_id[matches["image"]] * len(categories) + category, return_inverse=True)
    del category
    tp, fp, fn, iou = sums(matches, cell, len(cells))
    image, place = np.divmod(cells, max(1, len(categories)))
    return _Cells(count, len(categories), image, place, tp + 0.5 * fp + 0.5 * fn, iou)


def _mean_quality(total: np.ndarray, quality: np.ndarray) -> float:
    present = total > 0
    return float(np.mean(quality[present] / total[present])) if present.any() else 0.0


def _changed(first: PanopticQuality, second: PanopticQuality) -> list[dict[str, Any]]:
    """Lists images by the change of their PQ, the largest first; an image without segments has none."""
    qualities = []
    for stat in (first, second):
        matches = stat.matches()
        tp, fp, fn, iou = sums(matches, matches["image"], len(stat.image_ids))
        weight = tp + 0.5 * fp + 0.5 * fn
        pq = np.divide(iou, weight, out=np.zeros(len(iou)), where=weight > 0)
        qualities.append({image_id: (float(q), bool(w)) for image_id, q, w in zip(stat.image_ids, pq, weight > 0)})
    rows = []
    for image_id in first.image_ids:
        (before, counted), (after, also) = (quality[image_id] for quality in qualities)
        if counted or also:
            rows.append({"image_id": image_id, "pq": [before, after], "difference": after - before})
    return sorted(rows, key=lambda row: (-abs(row["difference"]), str(row["image_id"])))
