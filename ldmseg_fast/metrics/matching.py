"""Matches ground-truth and predicted segments of one image by panopticapi's rules.

A pair matches when IoU > 0.5, where the union leaves out the predicted segment's void pixels (Kirillov et al.,
"Panoptic Segmentation", CVPR 2019, section 4.1). Crowd regions never match. An unmatched prediction that lies by more
than half on void and on a crowd of its own category is no false positive.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.native import _C, warn_slow
from ldmseg_fast.panoptic.annotations import MAX_ID, MAX_NUMBER
from ldmseg_fast.panoptic.format import check_ids

TRUE_POSITIVE, FALSE_NEGATIVE, FALSE_POSITIVE, FALSE_POSITIVE_ONE_CROWD = 0, 1, 2, 3

# One row per segment that counts. `area` is the ground truth's, for false positives the prediction's.
# FALSE_POSITIVE_ONE_CROWD: false only because panopticapi remembers one crowd region per category and image (the last).
MATCH_DTYPE = np.dtype(
    [
        ("image", np.int32),
        ("category_id", np.int32),
        ("outcome", np.int32),
        ("gt_id", np.int32),
        ("pred_id", np.int32),
        ("area", np.int64),
        ("iou", np.float64),
        ("boundary_iou", np.float64),
    ],
    align=True,
)


def segment_table(segments: Sequence[Mapping[str, Any]], class_agnostic: bool, use_area: bool = False) -> np.ndarray:
    """Turns `segments_info` into int64 [S, 4]: id, category id (1 if class-agnostic), iscrowd, area (-1: count it).

    Raises:
        PanopticFormatError: no list of mappings; a value that is no whole number or out of range, with its segment.
    """
    if not isinstance(segments, Sequence) or not all(isinstance(segment, Mapping) for segment in segments):
        raise PanopticFormatError(f"segments_info: a list of objects with an `id` expected, got {segments!r:.80}")
    table = np.empty((len(segments), 4), np.int64)
    for row, segment in enumerate(segments):
        category = 1 if class_agnostic else segment.get("category_id")
        area = segment.get("area", -1) if use_area else -1
        values: tuple[Any, ...] = segment.get("id"), category, segment.get("iscrowd", 0), area
        if not all(_is_number(value) for value in values):
            raise PanopticFormatError(
                f"segment {values[0]!r}: `category_id` {category!r}, `iscrowd` {values[2]!r} and `area` {area!r} "
                f"must be whole numbers from 0 to {MAX_NUMBER}"
            )
        if values[2] not in (0, 1):
            raise PanopticFormatError(f"segment {values[0]!r}: `iscrowd` must be 0 or 1, got {values[2]!r}")
        table[row] = values
    return table


def _is_number(value: Any) -> bool:
    try:
        return -1 <= value <= MAX_NUMBER and value == int(value)
    except (TypeError, ValueError):
        return False


def match_segments(
    gt_ids: np.ndarray, gt_segments: np.ndarray, pred_ids: np.ndarray, pred_segments: np.ndarray, boundary: bool = False
) -> np.ndarray:
    """Matches the segments of two id maps, integer [H, W].

    Args:
        gt_ids, pred_ids: the maps, 0 void.
        gt_segments, pred_segments: their tables, int64 [S, 4] (see `segment_table`).
        boundary: also compute each match's boundary IoU (see `boundary_mask`); it is NaN otherwise.

    Returns:
        One row of `MATCH_DTYPE` per segment that counts, [M]; `image` is 0.

    Raises:
        PanopticFormatError: maps and tables that disagree.
    """
    if _C is None:
        warn_slow()
    else:
        try:
            gt, pred = _C.RunMap(int32_map(gt_ids)), _C.RunMap(int32_map(pred_ids))
            distance = boundary_distance(*gt.shape) if boundary else 0
            return _C.match_segments(gt, gt_segments, pred, pred_segments, distance)
        except (ValueError, TypeError):
            pass  # the numpy twin names the fault
    return _match_numpy(gt_ids, gt_segments, pred_ids, pred_segments, boundary)


def int32_map(ids: np.ndarray) -> np.ndarray:
    """Makes a map what the C++ helpers want: C-contiguous int32 [H, W].

    Raises:
        PanopticFormatError: values that int32 could cut off.
    """
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32:
        check_map(ids, "map")
    return np.ascontiguousarray(ids, np.int32)


def boundary_mask(ids: np.ndarray, distance: int) -> np.ndarray:
    """Marks pixels, bool [H, W], whose (2 distance + 1)^2 window holds another id or reaches over the image's edge.

    This is each segment minus its erosion: the boundary region of Cheng et al., "Boundary IoU", CVPR 2021.

    ids: integer [H, W]. distance: at least 1 pixel.
    """
    if _C is not None:
        return _C.boundary_mask(_C.RunMap(int32_map(ids)), distance).view(bool)
    return _boundary_mask_numpy(ids, distance)


def _boundary_mask_numpy(ids: np.ndarray, distance: int) -> np.ndarray:
    window = 2 * distance + 1
    interior = np.pad(ids, distance, constant_values=-1)
    low = sliding_window_view(sliding_window_view(interior, window, axis=1).min(-1), window, axis=0).min(-1)
    high = sliding_window_view(sliding_window_view(interior, window, axis=1).max(-1), window, axis=0).max(-1)
    return low != high


def boundary_distance(height: int, width: int) -> int:
    """Returns the width of the boundary region: 2 % of the image's diagonal (the paper's choice), at least 1 pixel."""
    return max(1, round(0.02 * math.sqrt(height * height + width * width)))


def _match_numpy(
    gt_ids: np.ndarray, gt_segments: np.ndarray, pred_ids: np.ndarray, pred_segments: np.ndarray, boundary: bool
) -> np.ndarray:
    check_map(gt_ids, "ground truth")
    check_map(pred_ids, "prediction")
    if gt_ids.shape != pred_ids.shape:
        raise PanopticFormatError(
            f"ground truth is {_size(gt_ids)}, prediction is {_size(pred_ids)}; sizes must be equal"
        )
    overlap = _joint_histogram(gt_ids, pred_ids)
    gt_area = _areas(gt_ids, gt_segments, "ground truth")
    pred_area = _areas(pred_ids, pred_segments, "prediction")
    gt_area |= {int(i): int(area) for i, _, _, area in gt_segments if area >= 0}
    gt_info = {int(i): (int(category), int(crowd)) for i, category, crowd, _ in gt_segments}
    pred_category = {int(i): int(category) for i, category, _, _ in pred_segments}

    rows, gt_matched, pred_matched = [], set(), set()
    for (gt_id, pred_id), intersection in overlap.items():
        if gt_id == 0 or pred_id == 0 or gt_info[gt_id] != (pred_category[pred_id], 0):
            continue
        union = pred_area[pred_id] + gt_area[gt_id] - intersection - overlap.get((0, pred_id), 0)
        if union < intersection:
            raise PanopticFormatError(
                f"ground-truth segment {gt_id}: area {gt_area[gt_id]} in the JSON cannot be right"
            )
        if intersection / union > 0.5:
            gt_matched.add(gt_id)
            pred_matched.add(pred_id)
            row = (pred_category[pred_id], TRUE_POSITIVE, gt_id, pred_id, gt_area[gt_id], intersection / union)
            rows.append(row)
    last_crowd = {category: gt_id for gt_id, (category, crowd) in gt_info.items() if crowd}
    for gt_id, (category, crowd) in gt_info.items():
        if gt_id not in gt_matched and not crowd:
            rows.append((category, FALSE_NEGATIVE, gt_id, 0, gt_area[gt_id], 0.0))
    for pred_id, category in pred_category.items():
        if pred_id in pred_matched:
            continue
        void = overlap.get((0, pred_id), 0)
        one_crowd = void + overlap.get((last_crowd.get(category, -1), pred_id), 0)
        crowds = void + sum(overlap.get((g, pred_id), 0) for g, info in gt_info.items() if info == (category, 1))
        if one_crowd / pred_area[pred_id] <= 0.5:
            outcome = FALSE_POSITIVE if crowds / pred_area[pred_id] <= 0.5 else FALSE_POSITIVE_ONE_CROWD
            rows.append((category, outcome, 0, pred_id, pred_area[pred_id], 0.0))

    matches = np.array([(0, *row, np.nan) for row in rows], MATCH_DTYPE)
    if boundary:
        _set_boundary_iou(matches, gt_ids, pred_ids)
    return matches


def _set_boundary_iou(matches: np.ndarray, gt_ids: np.ndarray, pred_ids: np.ndarray) -> None:
    distance = boundary_distance(*gt_ids.shape)
    gt_edge, pred_edge = _boundary_mask_numpy(gt_ids, distance), _boundary_mask_numpy(pred_ids, distance)
    overlap = _joint_histogram(gt_ids[gt_edge & pred_edge], pred_ids[gt_edge & pred_edge])
    gt_area = dict(zip(*np.unique(gt_ids[gt_edge], return_counts=True)))
    pred_area = dict(zip(*np.unique(pred_ids[pred_edge & (gt_ids != 0)], return_counts=True)))
    for match in matches[matches["outcome"] == TRUE_POSITIVE]:
        intersection = overlap.get((int(match["gt_id"]), int(match["pred_id"])), 0)
        union = gt_area[match["gt_id"]] + pred_area.get(match["pred_id"], 0) - intersection
        matches["boundary_iou"][matches["gt_id"] == match["gt_id"]] = intersection / union


def joint_histogram(gt_ids: np.ndarray, pred_ids: np.ndarray) -> dict[tuple[int, int], int]:
    """Counts the pixels of each (ground-truth id, predicted id) that occurs in two maps, integer [H, W].

    Raises:
        PanopticFormatError: maps of different sizes, or ids outside 0..2^24-1.
    """
    check_map(gt_ids, "ground truth")
    check_map(pred_ids, "prediction")
    if gt_ids.shape != pred_ids.shape:
        raise PanopticFormatError(
            f"ground truth is {_size(gt_ids)}, prediction is {_size(pred_ids)}; sizes must be equal"
        )
    if _C is None:
        warn_slow()
        return _joint_histogram(gt_ids, pred_ids)
    overlaps = _C.joint_histogram(_C.RunMap(int32_map(gt_ids)), _C.RunMap(int32_map(pred_ids)))
    pairs = zip(overlaps["gt_id"].tolist(), overlaps["pred_id"].tolist())
    return dict(zip(pairs, overlaps["pixels"].tolist()))


def _joint_histogram(gt_ids: np.ndarray, pred_ids: np.ndarray) -> dict[tuple[int, int], int]:
    pairs, counts = np.unique(gt_ids.astype(np.int64) << 24 | pred_ids, return_counts=True)
    return {(int(pair) >> 24, int(pair) & MAX_ID): int(count) for pair, count in zip(pairs, counts)}


def _areas(ids: np.ndarray, segments: np.ndarray, name: str) -> dict[int, int]:
    """Counts the pixels of each segment id; map and table must list the same ids."""
    areas = dict(zip(*(column.tolist() for column in np.unique(ids, return_counts=True))))
    areas.pop(0, None)
    listed = segments[:, 0].tolist()
    if len(set(listed)) != len(listed):
        raise PanopticFormatError(f"{name}: segments_info lists an id twice: {_some(listed)}")
    if unlisted := sorted(areas.keys() - set(listed)):
        raise PanopticFormatError(
            f"{name}: ids in the map but not in segments_info: {_some(unlisted)}; add or void them"
        )
    if absent := sorted(set(listed) - areas.keys()):
        raise PanopticFormatError(
            f"{name}: ids in segments_info but not in the map: {_some(absent)}; remove the entries"
        )
    return areas


def check_map(ids: np.ndarray, name: str) -> None:
    """Checks that `ids` is an integer map [H, W] with values in 0..2^24-1.

    Raises:
        PanopticFormatError: it is not; `name` says which map.
    """
    try:
        check_ids(ids)
    except PanopticFormatError as error:
        raise PanopticFormatError(f"{name}: {error}") from None


def _size(ids: np.ndarray) -> str:
    return f"{ids.shape[1]}x{ids.shape[0]}"


def _some(values: list[int], limit: int = 20) -> str:
    return ", ".join(map(str, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")
