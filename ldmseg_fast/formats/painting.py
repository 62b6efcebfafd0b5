"""Paints masks that may overlap into one map: the one rule for all formats whose segments are not disjoint.

Stuff comes first, then crowds, then things. In each group the larger comes before the smaller, so that a small segment
lies on top of a large one. A format with an order of its own (CVAT's `z_order`; LabelMe and Label Studio, where what
was drawn later lies above) is painted in that order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap

HIDDEN = "segments wholly under others"
EMPTY = "segments without a pixel"
OVERLAP = "pixels of several segments, given to the upper one"


@dataclass(frozen=True)
class Mask:
    """Holds one segment before it is painted.

    Attributes:
        pixels: bool [H, W].
        category_id: of the category.
        isthing: False: all stuff of one category becomes one segment.
        iscrowd: whether it stands for several instances.
        score: of a prediction.
        name: what the source calls it, for errors.
    """

    pixels: np.ndarray
    category_id: int
    isthing: bool = True
    iscrowd: bool = False
    score: float | None = None
    name: str = ""


@dataclass(frozen=True)
class _Cut:
    """Holds a mask cut to its box, which needs no memory for the rest of the picture."""

    mask: Mask
    box: tuple[slice, slice]
    pixels: np.ndarray
    area: int


def paint(masks: Iterable[Mask], height: int, width: int, *, ordered: bool = False) -> AnnotatedMap:
    """Paints masks into a map, int32 [height, width].

    Segments have the ids 1, 2, ... in the order of `masks`, without gaps.

    Args:
        masks: may come from a generator; of each only its box is kept.
        height, width: of the picture, in pixels.
        ordered: later masks lie above earlier ones, whatever they are.

    Returns:
        The map. `left_out` counts pixels that several masks want, masks that are empty, and masks that lie wholly under
        others.

    Raises:
        DataError: a mask of another size.
    """
    cuts, left_out = [], {EMPTY: 0, HIDDEN: 0, OVERLAP: 0}
    for mask in masks:
        if mask.pixels.shape != (height, width):
            found = "x".join(map(str, mask.pixels.shape[::-1]))
            raise DataError(f"{mask.name or 'a mask'} is {found}, its picture {width}x{height}; draw it anew")
        rows, columns = np.flatnonzero(mask.pixels.any(1)), np.flatnonzero(mask.pixels.any(0))
        if not len(rows):
            left_out[EMPTY] += 1
            continue
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        pixels = mask.pixels[box].astype(bool)
        bare = Mask(pixels[:0], mask.category_id, mask.isthing, mask.iscrowd, mask.score, mask.name)
        cuts.append(_Cut(bare, box, pixels, int(np.count_nonzero(pixels))))
    owner = _numbers(cuts)
    places = list(range(len(cuts)))
    if not ordered:
        places.sort(key=lambda place: (_group(cuts[place].mask), -cuts[place].area))
    ids = np.zeros((height, width), np.int32)
    for place in places:
        under = ids[cuts[place].box]
        taken = under[cuts[place].pixels]
        left_out[OVERLAP] += int(np.count_nonzero((taken != 0) & (taken != owner[place])))
        under[cuts[place].pixels] = owner[place]
    return _numbered(ids, cuts, owner, left_out)


def _group(mask: Mask) -> int:
    return 1 if mask.iscrowd else 2 if mask.isthing else 0


def _numbers(cuts: list[_Cut]) -> list[int]:
    """Numbers the masks from 1; stuff of one category shares the number of its first mask."""
    stuff: dict[int, int] = {}
    numbers = []
    for number, cut in enumerate(cuts, 1):
        alone = cut.mask.isthing or cut.mask.iscrowd
        numbers.append(number if alone else stuff.setdefault(cut.mask.category_id, number))
    return numbers


def _numbered(ids: np.ndarray, cuts: list[_Cut], owner: list[int], left_out: dict[str, int]) -> AnnotatedMap:
    """Closes the gaps that hidden masks leave in the numbers."""
    seen = np.bincount(ids.ravel(), minlength=len(cuts) + 1)[1:] > 0
    table = np.concatenate([[0], np.where(seen, np.cumsum(seen), 0)]).astype(np.int32)
    segments = []
    for number, cut in enumerate(cuts, 1):
        if owner[number - 1] != number:
            continue
        if not seen[number - 1]:
            left_out[HIDDEN] += 1
            continue
        segment: dict[str, Any] = {"id": int(table[number]), "category_id": cut.mask.category_id}
        segment["iscrowd"] = int(cut.mask.iscrowd)
        if cut.mask.score is not None:
            segment["score"] = cut.mask.score
        segments.append(segment)
    return AnnotatedMap(table[ids], segments, {reason: count for reason, count in left_out.items() if count})
