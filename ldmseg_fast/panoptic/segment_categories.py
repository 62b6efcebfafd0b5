"""Says what a map's segments are: a category for each slot, and one segment for all stuff of a category.

Slots and categories come from one decoder. A segment's category is the one that its pixels make likeliest, each pixel
weighed by the probability that it is the segment's:

    votes[q, c] = sum over pixels p of softmax_q(slot logits)[q, p] * softmax_c(category logits)[c, p]

on the slots' own grid, where categories of a coarser one are those of the nearest pixel. Kirillov et al., "Panoptic
Segmentation", CVPR 2019, say what things and stuff are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.kernels.backend import exporting
from ldmseg_fast.panoptic.results import PanopticResult

CACHED = 2**20  # logits whose probabilities a CPU keeps in its cache


def slot_categories(
    mask_logits: Tensor, category_logits: Tensor, slots: Tensor | None = None, *, factor: int = 0
) -> tuple[Tensor, Tensor]:
    """Finds the category of each slot.

    Args:
        mask_logits: float [B, Q, h, w].
        category_logits: float [B, C + 1, h / f, w / f], f a whole number; category 0 is void, which no segment is.
        slots: int64 [K], those of which it is asked; None: all Q.
        factor: f; 0: that of the shapes.

    Returns:
        The category's number in 1..C, int64 [B, K], and the mean probability that the slot's pixels give it, float32
        [B, K].
    """
    factor = factor or mask_logits.shape[-1] // category_logits.shape[-1]
    categories = category_logits.float().permute(0, 2, 3, 1)  # [B, h / f, w / f, C + 1]
    pixels = mask_logits.float().permute(0, 2, 3, 1)  # [B, h, w, Q]; channels_last, which decoders give, is that
    if exporting() or mask_logits.device.type != "cpu" or pixels.numel() + categories.numel() <= CACHED:
        votes = _votes(pixels, categories, slots, factor)
    else:
        rows = max(1, CACHED * categories.shape[1] // (pixels.numel() + categories.numel()))
        parts = zip(pixels.split(rows * factor, 1), categories.split(rows, 1))
        votes = reduce(torch.add, (_votes(*part, slots, factor) for part in parts))
    most, number = votes[..., 1:].max(-1)  # [B, K]
    return number + 1, most / votes.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


def _votes(pixels: Tensor, categories: Tensor, slots: Tensor | None, factor: int) -> Tensor:
    """Adds up the votes, float32 [B, K, C + 1], of slot logits [B, h, w, Q] and category logits [B, h/f, w/f, C + 1].

    Votes of pixels that share a category's pixel are added up first: the product is f^2 times smaller.
    """
    of_slots = pixels.softmax(-1)
    of_slots = of_slots if slots is None else of_slots.index_select(3, slots)
    if factor > 1:
        of_slots = of_slots.unflatten(2, (-1, factor)).sum(3).unflatten(1, (-1, factor)).sum(2)
    return of_slots.flatten(1, 2).transpose(1, 2) @ categories.flatten(1, 2).softmax(-1)


def name_segments(
    result: PanopticResult, numbers: Sequence[int], scores: Sequence[float], table: CategoryTable, *, fuse: bool = True
) -> PanopticResult:
    """Gives each segment its slot's category, and makes one segment of all stuff of one category.

    The one takes the lowest of their ids, and their mean scores over its pixels.

    Args:
        result: of slots, int32 [H, W]; ids are slot + 1.
        numbers: of each slot's category, 1..C [Q].
        scores: of each slot's category, [Q].
        table: what the numbers stand for.
        fuse: whether stuff of one category becomes one segment.

    Returns:
        The map, int32 [H, W], and its segments, with `category_id`, `label_id`, `name`, `isthing` and
        `category_score`; `was_fused` tells which were made of several.
    """
    segments: list[dict[str, Any]] = []
    of_stuff: dict[int, dict[str, Any]] = {}
    moved: dict[int, int] = {}
    for segment in result.segments_info:
        number, score = int(numbers[segment["id"] - 1]), float(scores[segment["id"] - 1])
        category = table[number]
        named = {
            **segment,
            "category_id": category.id,
            "label_id": category.id,
            "name": category.name,
            "isthing": category.isthing,
            "category_score": score,
        }
        first = None if category.isthing or not fuse else of_stuff.setdefault(number, named)
        if first is None or first is named:
            segments.append(named)
        else:
            moved[segment["id"]] = first["id"]
            _join(first, named)
    if not moved:
        return PanopticResult(result.segmentation, segments)
    new_ids = np.arange(int(result.segmentation.max()) + 1, dtype=np.int32)
    new_ids[list(moved)] = list(moved.values())
    return PanopticResult(new_ids[result.segmentation], segments)


def _join(first: dict[str, Any], other: dict[str, Any]) -> None:
    """Adds a segment to another of its category, in place."""
    area = first["area"] + other["area"]
    for key in ("score", "category_score"):
        first[key] = (first[key] * first["area"] + other[key] * other["area"]) / area
    (x, y, width, height), (left, top, other_width, other_height) = first["bbox"], other["bbox"]
    right, bottom = max(x + width, left + other_width), max(y + height, top + other_height)
    first["bbox"] = [min(x, left), min(y, top), right - min(x, left), bottom - min(y, top)]
    first["area"], first["was_fused"] = area, True
