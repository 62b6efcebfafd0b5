"""Categories for class-agnostic segments, by majority vote of a category map.

The map comes from a semantic prediction or, for the upper bound of any classifier, from the ground truth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldmseg_fast.metrics.matching import joint_histogram


def category_map(ids: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The category id of each pixel, int32 [H, W], 0 = void, from a panoptic map and its `segments_info`."""
    listed = np.array([0] + [segment["id"] for segment in segments])
    categories = np.array([0] + [segment["category_id"] for segment in segments], np.int32)
    order = np.argsort(listed)
    place = np.clip(np.searchsorted(listed[order], ids), 0, len(listed) - 1)
    found = listed[order][place] == ids
    return np.where(found, categories[order][place], 0).astype(np.int32)


def vote_categories(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], categories: np.ndarray
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The map and its segments with the `category_id` that most of each segment's pixels have in `categories` [H, W].

    Void pixels (0) do not vote; of equal counts the lower category wins. A segment without any vote becomes void.
    """
    votes: dict[int, tuple[int, int]] = {}  # segment id -> (pixels, -category)
    for (category, segment_id), pixels in joint_histogram(categories, ids).items():
        if category and segment_id:
            votes[segment_id] = max(votes.get(segment_id, (0, 0)), (pixels, -category))
    voted = [{**segment, "category_id": -votes[segment["id"]][1]} for segment in segments if segment["id"] in votes]
    return np.where(np.isin(ids, list(votes)), ids, 0), voted
