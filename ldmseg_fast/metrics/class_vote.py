"""Gives class-agnostic segments a category by majority vote of a category map.

The map comes from a semantic prediction or, for the upper bound of any classifier, from the ground truth. Segments,
stuff and `segments_info` are those of Kirillov et al., "Panoptic Segmentation", CVPR 2019; the vote is this project's
own.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ldmseg_fast.metrics.matching import joint_histogram


def category_map(ids: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Looks up the category of each pixel: int32 [H, W], 0 void.

    ids: a panoptic map, integer [H, W], with its `segments_info`. Ids that it does not list become void.
    """
    listed = np.array([0] + [segment["id"] for segment in segments])
    categories = np.array([0] + [segment["category_id"] for segment in segments], np.int32)
    order = np.argsort(listed)
    place = np.clip(np.searchsorted(listed[order], ids), 0, len(listed) - 1)
    found = listed[order][place] == ids
    return np.where(found, categories[order][place], 0).astype(np.int32)


def vote_categories(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], categories: np.ndarray
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Gives each segment the `category_id` that most of its pixels have.

    Void pixels (0) do not vote; of equal counts the lower category wins. A segment without any vote becomes void.

    Args:
        ids: a panoptic map, integer [H, W], with its `segments_info`.
        categories: the category of each pixel, integer [H, W].

    Returns:
        The map, in the dtype of `ids` [H, W], and its segments.

    Raises:
        PanopticFormatError: maps of different sizes or with ids outside 0..2^24-1.
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
    """Makes one segment of all segments of a category in `stuff`, under the lowest of their ids.

    Stuff has no instances (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 3.1), so class-agnostic
    segments of one stuff category are one segment. `score` becomes the mean over the pixels; `area` and `bbox` are
    those of the whole.

    Returns:
        A new map, in the dtype of `ids` [H, W], and its segments.
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
