"""Holds what is given of a map that is to be completed, and puts it back into the completed one.

Shapes: H W the picture's own size, S the network's side, Q slots (slot 0 is void).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.transforms import TABLE_SIZE, make_remap_table, resize_ids
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes


@dataclass(frozen=True)
class Given:
    """Holds what is known of one image's map.

    Attributes:
        segmentation: int32 [H, W], the given ids; 0 where nothing is given, and where void is.
        known: bool [H, W], given pixels, void among them.
        covered: bool [S, S], `known` at the network's size.
        slots: uint8 [S, S] at the network's size, 0 where nothing (or void) is given.
        ids: slot -> given id.
        numbers: given id -> number of its category, where it is known.
        assumed: the same, with what the draft has for the others.
        categories: int16 [S, S], numbers of categories at the network's size, 0 where none is known.
    """

    segmentation: np.ndarray
    known: np.ndarray
    covered: np.ndarray
    slots: np.ndarray
    ids: dict[int, int]
    numbers: dict[int, int] = field(default_factory=dict)
    assumed: dict[int, int] = field(default_factory=dict)
    categories: np.ndarray | None = None


def prepare(
    segmentation: np.ndarray,
    known: np.ndarray,
    size: int,
    num_slots: int,
    scheme: str,
    rng: np.random.Generator,
    name: str = "image",
    draft: np.ndarray | None = None,
    known_categories: Mapping[int, int] | None = None,
    draft_categories: np.ndarray | None = None,
) -> Given:
    """Finds slots for the given segments of one image: those of `draft`, or by the scheme of the model's training.

    Of more than `num_slots` - 1 segments the largest get one; the others stay as they are but cannot grow, which a
    warning says. So do segments that vanish at the network's size.

    Args:
        segmentation: integer ids [H, W], 0..2^24-1.
        known: bool [H, W].
        size: S.
        num_slots: Q.
        scheme: of `data.transforms.ID_SCHEMES`.
        rng: of scheme "random".
        name: of the image, in the warning.
        draft: slots [S, S] that the model predicts from the same noise without knowing the map. The scheme cannot know
            of segments that are hidden; the draft shows what the model would call each one.
        known_categories: given id -> number of its category, where it is known.
        draft_categories: numbers [S, S] that the model predicts with the draft: what it mostly has on a given segment
            of unknown category stands for it while sampling.
    """
    given = np.where(known, segmentation, 0).astype(np.int32)
    small = resize_ids(given, size)
    values, counts = np.unique(small[small > 0], return_counts=True)
    kept = values
    if len(values) >= num_slots:
        kept = np.sort(values[np.argsort(-counts, kind="stable")[: num_slots - 1]])
        warnings.warn(
            f"{name}: {len(values)} given segments, the model has {num_slots - 1} slots; the {len(values) - len(kept)} "
            f"smallest stay as they are given and cannot grow",
            stacklevel=2,
        )
    numbers = np.zeros(len(values) + 1, np.uint8)
    numbers[1 + np.searchsorted(values, kept)] = np.arange(1, len(kept) + 1)
    numbered = numbers[np.searchsorted(values, small, side="right") * (small > 0)]  # 1..n in order of the ids
    table = make_remap_table(numbered, len(kept), num_slots, scheme, rng)
    if draft is not None:
        table = follow_draft(numbered, len(kept), draft, num_slots)
    ids = {int(table[number]): int(value) for number, value in enumerate(kept, start=1)}
    covered = resize_ids(known.astype(np.uint8), size) > 0
    assumed = dict(known_categories or {})
    if draft_categories is not None:
        for value in values.tolist():
            votes = np.bincount(draft_categories[small == value])
            if value not in assumed and votes[1:].any():
                assumed[value] = 1 + int(votes[1:].argmax())
    of_value = np.array([0, *(assumed.get(value, 0) for value in values.tolist())], np.int16)
    categories = of_value[np.searchsorted(values, small, side="right") * (small > 0)]
    categories[table[numbered] == 0] = 0
    return Given(given, known, covered, table[numbered], ids, dict(known_categories or {}), assumed, categories)


def follow_draft(numbered: np.ndarray, count: int, draft: np.ndarray, num_slots: int) -> np.ndarray:
    """Gives each numbered segment the slot that the draft has for it.

    Pairs of segment and predicted slot are taken in falling order of their IoU where the map is given; the segments
    that are left get slots that the draft does not use.

    Args:
        numbered: uint8 [S, S] with 1..count, 0 where nothing is given.
        count: of segments.
        draft: integer [S, S] slots, 0 void.
        num_slots: Q.

    Returns:
        Number -> slot, uint8 [256].
    """
    inside = numbered > 0
    overlap = np.zeros((count + 1, num_slots))
    np.add.at(overlap, (numbered[inside], draft[inside]), 1)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    iou = overlap / np.maximum(union, 1)
    iou[:, 0] = 0  # void is no segment
    table = np.zeros(TABLE_SIZE, np.uint8)
    for _ in range(count):
        number, slot = divmod(int(iou.argmax()), num_slots)
        if iou[number, slot] == 0:
            break
        table[number] = slot
        iou[number], iou[:, slot] = 0, 0
    used = np.zeros(num_slots, bool)
    used[[0, *np.unique(draft)]] = True
    free = [slot for slot in np.argsort(used, kind="stable") if slot and slot not in set(table)]  # unused ones first
    left = 1 + np.flatnonzero(table[1 : count + 1] == 0)
    table[left] = free[: len(left)]
    return table


def complete(
    result: PanopticResult, given: Given, min_area: int, categories: CategoryTable | None = None
) -> PanopticResult:
    """Puts the given pixels back into the predicted map, and every segment under its final id.

    A predicted segment whose slot is a given one's takes that one's id; so does one that lies, where pixels are given,
    mostly on one given segment. The others get the smallest unused ids, and become void where fewer than `min_area`
    of their pixels are left. Predicted stuff of a category that a given segment has takes that one's id; what is left
    of a category of stuff becomes one segment.

    Args:
        result: the predicted map, int32 [H, W]; its stuff is not fused yet.
        given: what is known of it.
        min_area: in pixels.
        categories: of models with categories. A given segment of known category keeps it.

    Returns:
        The map, int32 [H, W]. `segments_info` has "given" beside the usual entries: whether the id is one of the map
        that was given. A segment without predicted pixels has score 1.
    """
    predicted = result.segmentation
    final, taken = {}, set(np.unique(given.segmentation).tolist()) | {0}
    for segment in result.segments_info:
        known_ids = given.segmentation[(predicted == segment["id"]) & (given.segmentation > 0)]
        values, counts = np.unique(known_ids, return_counts=True)
        if len(values) and 2 * counts.max() > len(known_ids):
            final[segment["id"]] = int(values[counts.argmax()])
        elif segment["id"] - 1 in given.ids:
            final[segment["id"]] = given.ids[segment["id"] - 1]
    stuff = {} if categories is None else _given_stuff(given, categories)
    fresh = (number for number in range(1, 2**24) if number not in taken)
    for segment in result.segments_info:
        if segment["id"] in final:
            continue
        if segment.get("category_id") in stuff:
            final[segment["id"]] = stuff[segment["category_id"]]
            continue
        same = [segment["id"]]
        if categories is not None and not segment["isthing"]:
            same = [s["id"] for s in result.segments_info if s["category_id"] == segment["category_id"]]
            same = [number for number in same if number not in final]
        left = int((np.isin(predicted, same) & ~given.known).sum())
        final |= dict.fromkeys(same, next(fresh) if left >= min_area else 0)
    table = np.zeros(int(predicted.max(initial=0)) + 1, np.int32)
    for before, after in final.items():
        table[before] = after
    segmentation = np.where(given.known, given.segmentation, table[predicted])

    parts_of: dict[int, list[dict[str, Any]]] = {}
    for segment in result.segments_info:
        parts_of.setdefault(final[segment["id"]], []).append(segment)
    usual = {"category_id": 1, "label_id": 1, "isthing": True, "iscrowd": 0, "was_fused": False}
    info = []
    for shape in segment_shapes(segmentation):
        parts = parts_of.get(shape["id"], [])
        entry = {"id": shape["id"], **usual, **shape, "score": _mean(parts, "score"), "given": shape["id"] in taken}
        if categories is not None:
            entry |= _category(parts, shape["id"], given, categories)
            entry["was_fused"] = len(parts) > 1 and not entry["isthing"]
        info.append(entry)
    return PanopticResult(segmentation, info)


def _given_stuff(given: Given, categories: CategoryTable) -> dict[int, int]:
    """The lowest given id of each category of stuff, by the category's id."""
    found: dict[int, int] = {}
    for segment_id in sorted(set(given.numbers) & set(np.unique(given.segmentation).tolist())):
        category = categories[given.numbers[segment_id]]
        if not category.isthing:
            found.setdefault(category.id, segment_id)
    return found


def _category(
    parts: Sequence[Mapping[str, Any]], segment_id: int, given: Given, categories: CategoryTable
) -> dict[str, Any]:
    """Says what a completed segment is: what was given, else what the largest of its predicted parts is.

    A given segment of unknown category of which nothing was predicted is what the draft has there, with a score of 0;
    where there was no draft either it stays without a name, of category 0.
    """
    if segment_id not in given.numbers and parts:
        largest = max(parts, key=lambda part: part["area"])
        named = {key: largest[key] for key in ("category_id", "name", "isthing", "category_score")}
    elif segment_id in given.assumed:
        category, score = categories[given.assumed[segment_id]], float(segment_id in given.numbers)
        named = {"category_id": category.id, "name": category.name, "isthing": category.isthing}
        named["category_score"] = score
    else:
        named = {"category_id": 0, "isthing": True, "category_score": 0.0}
    return named | {"label_id": named["category_id"]}


def _mean(parts: Sequence[Mapping[str, Any]], key: str) -> float:
    """The mean of a value over the pixels of predicted parts; 1 where there are none."""
    return sum(part[key] * part["area"] for part in parts) / sum(part["area"] for part in parts) if parts else 1.0
