"""Weighs categories by how rare they are in the training set, for a loss that is not the large ones' alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import DataError


def category_weights(
    sets: Sequence[CocoPanoptic], table: CategoryTable, balance: float, draws: Sequence[float] = ()
) -> np.ndarray:
    """Makes the weights of the categories' cross-entropy.

    A category with the share s of the labelled pixels has a weight proportional to s^-balance (at balance 1 inverse
    frequencies; Cui et al., arXiv 1901.05555, compare such weights). The mean over labelled pixels is 1, so that the
    term keeps its size. Pixels are the areas that `segments_info` has; what is void in training does not count. The
    shares of several sets are averaged as often as each set is drawn from.

    Args:
        sets: training splits.
        table: the model's categories, C of them.
        balance: in [0, 1].
        draws: how often each set is drawn from, relative to the others; empty: as often as it has items.

    Returns:
        float32 [C + 1] by the categories' numbers; 0 for void, 1 for a category without pixels.

    Raises:
        DataError: a segment without `area`, categories that do not fit the table, or no labelled pixel at all.
    """
    shares = np.zeros(len(table) + 1)
    for dataset, often in zip(sets, draws or [len(each) for each in sets], strict=True):
        pixels = _pixels(dataset, table)
        shares += often * pixels / max(pixels.sum(), 1.0)
    if not shares.any():
        sources = ", ".join(str(each.folders.annotations) for each in sets)
        raise DataError(f"{sources}: no labelled pixels to balance categories by; set loss.category_balance=0")
    shares /= shares.sum()
    there = shares > 0
    weights = np.ones(len(shares))
    weights[there] = shares[there] ** -balance / (shares[there] ** (1.0 - balance)).sum()
    weights[0] = 0.0
    return weights.astype(np.float32)


def _pixels(dataset: CocoPanoptic, table: CategoryTable) -> np.ndarray:
    """Counts the pixels of each category that training sees in pictures as they are stored, float64 [C + 1]."""
    if dataset.class_agnostic:
        return np.zeros(len(table) + 1)
    source = str(dataset.folders.annotations)
    numbers = table.numbers_of(dataset.categories, source)
    pixels = np.zeros(len(table) + 1)
    for index in range(len(dataset)):
        for segment in dataset.segments_info(index):
            if segment.get("iscrowd", 0):
                continue
            if "area" not in segment:
                raise DataError(
                    f"{source}: segment {segment['id']} of {dataset.describe(index)} has no area, by which "
                    f"loss.category_balance weighs categories; count its pixels, or set loss.category_balance=0"
                )
            if segment["area"] >= dataset.min_area:
                pixels[numbers[segment["category_id"]]] += segment["area"]
    return pixels
