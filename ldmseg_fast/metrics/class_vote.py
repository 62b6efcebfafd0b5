"""Categories for class-agnostic segments, by majority vote of a category map.

The map comes from a semantic prediction or, for the upper bound of any classifier, from the ground truth.
"""

from collections.abc import Collection, Mapping, Sequence
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


def merge_stuff(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], stuff: Collection[int]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The map and its segments with one segment for each category in `stuff`, under the lowest of the ids.

    Stuff has no instances (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 3.1), so that class-agnostic
    segments of one stuff category are one segment. `score` becomes the mean over the pixels; `area` and `bbox` are
    those of the whole.
    """
    groups: dict[int, list[Mapping[str, Any]]] = {}  # id that stays -> segments
    of_category: dict[int, int] = {}
    for segment in sorted(segments, key=lambda segment: segment["id"]):
        category = segment["category_id"]
        key = of_category.setdefault(category, segment["id"]) if category in stuff else segment["id"]
        groups.setdefault(key, []).append(segment)
    merged_ids, merged = ids.copy(), []
    for key, group in groups.items():
        if len(group) == 1:
            merged.append(dict(group[0]))
            continue
        parts = [(segment, ids == segment["id"]) for segment in group]
        mask = np.logical_or.reduce([part for _, part in parts])
        merged_ids[mask] = key
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        area = int(mask.sum())
        left, top, right, bottom = (int(edge) for edge in (columns[0], rows[0], columns[-1], rows[-1]))
        entry = {**group[0], "area": area, "was_fused": True}
        entry["bbox"] = [left, top, right - left + 1, bottom - top + 1]
        if all("score" in segment for segment in group):
            entry["score"] = sum(segment["score"] * int(part.sum()) for segment, part in parts) / area
        merged.append(entry)
    return merged_ids, merged
