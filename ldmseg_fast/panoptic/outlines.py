"""Traces the outlines of a map's segments along pixel edges, and fills outlines again.

Corners are counted in pixels from the upper left corner of the picture: pixel (0, 0) is the square from (0, 0) to
(1, 1). Polygons of COCO, LabelMe, CVAT, Label Studio and GeoJSON have these coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ldmseg_fast.native import _C, warn_slow
from ldmseg_fast.panoptic.format import check_ids
from ldmseg_fast.panoptic.shapes import pieces

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up, as (x, y)


@dataclass(frozen=True)
class Ring:
    """Holds one closed line.

    Attributes:
        points: int32 [N, 2], x and y of its corners, N >= 4; the last is joined to the first. As seen on the screen
            an outer ring runs clockwise, a hole counter-clockwise.
        hole: whether it bounds a hole, not the outside.
    """

    points: np.ndarray
    hole: bool = False


def outlines(ids: np.ndarray) -> dict[int, list[Ring]]:
    """Traces every segment of a map, integer [H, W], in ascending id.

    Each 4-connected piece of a segment gives its outer ring followed by its holes. A ring has a corner only where it
    turns, never crosses itself and passes no corner twice: a piece is a valid polygon of the Simple Features standard
    (OGC 06-103r4, section 6.1.11). `fill` of all rings of a segment gives its pixels back.

    Raises:
        PanopticFormatError: no such map, or ids outside 0..2^24-1.
    """
    ids = np.ascontiguousarray(check_ids(ids), np.int32)
    if _C is None:
        warn_slow()
        points, ends, ring_ids, ring_pieces = _outlines_numpy(ids)
    else:
        points, ends, ring_ids, ring_pieces = _C.outlines(ids)
    found: dict[int, list[Ring]] = {}
    before = (0, 0)
    rings = np.split(points, ends[:-1])
    for ring in np.lexsort((ring_pieces, ring_ids)):  # stable: an outer ring was found before its holes
        segment, piece = int(ring_ids[ring]), int(ring_pieces[ring])
        found.setdefault(segment, []).append(Ring(rings[ring], hole=(segment, piece) == before))
        before = segment, piece
    return found


def fill(rings: Iterable[Ring | np.ndarray], height: int, width: int) -> np.ndarray:
    """Paints the pixels, bool [H, W], whose centres an odd number of rings surrounds.

    Args:
        rings: each a `Ring` or its points, integer or finite float [N, 2] as x and y; they may leave the picture.
        height, width: of the picture.
    """
    toggled = [_crossings(ring.points if isinstance(ring, Ring) else ring, height, width) for ring in rings]
    mask = np.zeros((height, width), bool)
    row, column = (np.concatenate(each) for each in zip(*toggled)) if toggled else (np.zeros(0, int),) * 2
    if len(row):
        top, left = row.min(), column.min()
        shape = row.max() + 1 - top, column.max() + 1 - left
        places = (row - top) * shape[1] + column - left
        counts = np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape).astype(np.uint8)
        inside = np.bitwise_xor.accumulate(counts & 1, axis=1).astype(bool)
        mask[top : top + shape[0], left : left + shape[1]] = inside[:, : width - left]
    return mask


def _crossings(points: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and in each the first column whose centre lies to the right of an edge; `width` where none does."""
    start = np.asarray(points, np.float64).reshape(-1, 2)
    end = np.roll(start, -1, axis=0)
    down = (start[:, 1] < end[:, 1])[:, None]
    (x0, y0), (x1, y1) = np.where(down, start, end).T, np.where(down, end, start).T
    first, last = (np.clip(np.ceil(y - 0.5), 0, height).astype(np.int64) for y in (y0, y1))
    count = last - first  # rows whose centre an edge passes
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    slope = (x1 - x0)[edge] / (y1 - y0)[edge]
    column = np.ceil(x0[edge] + slope * (row + 0.5 - y0[edge]) - 0.5)
    return row, np.clip(column, 0, width).astype(np.int64)


def polygons_of(rings: Iterable[Ring]) -> list[list[Ring]]:
    """Groups the rings of one segment by piece: its outer ring, then its holes."""
    polygons: list[list[Ring]] = []
    for ring in rings:
        if ring.hole:
            polygons[-1].append(ring)
        else:
            polygons.append([ring])
    return polygons


def without_holes(polygon: list[Ring]) -> np.ndarray:
    """Opens the holes of a polygon by upright slits of no width, and returns it as one ring, int32 [N, 2].

    For formats whose polygons have no holes. Filled by the even-odd rule, or as pycocotools fills, it has the same
    pixels.

    Args:
        polygon: an outer ring and its holes, as `polygons_of` gives it.
    """
    rings = [polygon[0].points, *(np.roll(hole.points, -_top(hole.points), axis=0) for hole in polygon[1:])]
    holes_at: dict[int, list[int]] = {}  # corner, counted through all rings -> holes below the edge that it begins
    for hole, corner in enumerate(_edges_above(rings).tolist(), 1):
        holes_at.setdefault(corner, []).append(hole)
    first = np.cumsum([0, *map(len, rings)]).tolist()

    def steps(ring: int) -> Iterator[list[int] | int]:
        """Goes around a ring, from its first corner back to it: corners, and numbers of the holes to go around."""
        points = rings[ring].tolist()
        for place, point in enumerate(points):
            yield point
            leftwards = points[(place + 1) % len(points)][0] < point[0]
            for hole in sorted(
                holes_at.get(first[ring] + place, ()), key=lambda each: int(rings[each][0, 0]), reverse=leftwards
            ):
                meeting = [int(rings[hole][0, 0]), point[1]]
                yield meeting
                yield hole
                yield meeting
        yield points[0]

    line: list[list[int]] = []
    under_way = [steps(0)]
    while under_way:
        step = next(under_way[-1], None)
        if step is None:
            under_way.pop()
        elif isinstance(step, int):
            under_way.append(steps(step))
        else:
            line.append(step)
    corners = np.array(line, np.int32)
    return corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]


def _top(points: np.ndarray) -> int:
    """Finds the left end of a ring's uppermost edge."""
    return int(np.lexsort((points[:, 0], points[:, 1]))[0])


def _edges_above(rings: list[np.ndarray]) -> np.ndarray:
    """Finds for the first corner of every ring but the first the level edge above it, by the corner that it begins at.

    That edge belongs to a ring that begins further up, so that all lead to the first in the end.
    """
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    level = np.flatnonzero(start[:, 1] == end[:, 1])
    left = np.minimum(start[level, 0], end[level, 0])
    count = np.abs(start[level, 0] - end[level, 0]) + 1  # corners of pixels on an edge, with both ends
    edge = np.repeat(level, count)
    x = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(left, count)
    rows = int(start[:, 1].max()) + 1
    keys = x.astype(np.int64) * rows + start[edge, 1]
    order = np.argsort(keys, kind="stable")
    tops = np.array([ring[0] for ring in rings[1:]], np.int64).reshape(-1, 2)
    return edge[order[np.searchsorted(keys[order], tops[:, 0] * rows + tops[:, 1]) - 1]]


def _outlines_numpy(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    piece = np.pad(np.where(ids == 0, 0, pieces(ids)[0] + 1), 1)  # a border that belongs to nothing
    upper = (piece[1:-1, 1:-1] != piece[:-2, 1:-1]) & (ids != 0)
    walked: set[tuple[int, int]] = set()
    points: list[tuple[int, int]] = []
    ends, ring_ids, ring_pieces = [], [], []
    for top, begin in np.argwhere(upper).tolist():
        if (begin, top) in walked:
            continue
        own = piece[top + 1, begin + 1]
        x, y, turn = begin, top, 0
        while True:  # the piece lies on the right hand
            points.append((x, y))
            straight = True
            while straight:
                if turn == 0:
                    walked.add((x, y))
                dx, dy = _STEPS[turn]
                x, y = x + dx, y + dy
                # the pixels ahead of the corner; the one to its lower right is [y + 1, x + 1] of the padded map
                left = piece[y + 1 - (turn in (0, 3)), x + 1 - (turn in (2, 3))]
                right = piece[y + 1 - (turn in (2, 3)), x + 1 - (turn in (1, 2))]
                straight = left != own and right == own
            turn = (turn + (3 if left == own else 1)) % 4
            if (x, y, turn) == (begin, top, 0):
                break
        ends.append(len(points))
        ring_ids.append(ids[top, begin])
        ring_pieces.append(own)
    return np.array(points, np.int32).reshape(-1, 2), np.array(ends), np.array(ring_ids), np.array(ring_pieces)
