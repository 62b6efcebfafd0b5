"""Measures a map's segments (areas, boxes, COCO run lengths), and removes specks and pinholes."""

from typing import Any

import numpy as np

from ldmseg_fast.native import _C, warn_slow
from ldmseg_fast.panoptic.format import check_ids


def segment_shapes(ids: np.ndarray, rle: bool = False) -> list[dict[str, Any]]:
    """Lists the segments of a map, integer [H, W], in ascending id.

    Each has `id`, `area` (pixels) and `bbox` [x, y, width, height] (pixels). With `rle` it also has `segmentation`,
    {"size": [H, W], "counts": str}, as pycocotools writes and reads it.

    Raises:
        PanopticFormatError: no such map, or ids outside 0..2^24-1.
    """
    ids = np.ascontiguousarray(check_ids(ids), np.int32)
    if _C is None:
        warn_slow()
        segment_ids, areas, boxes, counts = _segment_shapes_numpy(ids, rle)
    else:
        segment_ids, areas, boxes, counts = _C.segment_shapes(ids, rle)
    shapes: list[dict[str, Any]] = [
        {"id": segment_id, "area": area, "bbox": box}
        for segment_id, area, box in zip(segment_ids.tolist(), areas.tolist(), boxes.tolist())
    ]
    for shape, text in zip(shapes, counts):
        shape["segmentation"] = {"size": list(ids.shape), "counts": text.decode("ascii")}
    return shapes


def clean_segments(ids: np.ndarray, min_island: int = 0, max_hole: int = 0) -> np.ndarray:
    """Removes specks and pinholes from a map, integer [H, W], and returns a new one, int32 [H, W].

    4-connected pieces of a segment under `min_island` pixels become void. Then pieces of void of at most `max_hole`
    pixels that touch one segment alone, and not the image's edge, are given to that segment.

    Raises:
        PanopticFormatError: no such map, or ids outside 0..2^24-1.
    """
    ids = np.ascontiguousarray(check_ids(ids), np.int32)
    if _C is not None:
        return _C.clean_segments(ids, min_island, max_hole)
    warn_slow()
    return _clean_segments_numpy(ids, min_island, max_hole)


def _segment_shapes_numpy(ids: np.ndarray, rle: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[bytes]]:
    segment_ids, areas = (column[np.unique(ids) != 0] for column in np.unique(ids, return_counts=True))
    boxes, counts = np.empty((len(segment_ids), 4), np.int32), []
    for box, segment_id in zip(boxes, segment_ids):
        mask = ids == segment_id
        y, x = np.nonzero(mask)
        box[:] = x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1
        if rle:
            flat = np.concatenate([[0], mask.T.ravel(), [0]])
            ends = np.concatenate([[0], np.flatnonzero(np.diff(flat)), [mask.size]])
            runs = np.diff(ends)
            counts.append(compress_counts(runs[: len(runs) - (runs[-1] == 0)].tolist()))
    return segment_ids, areas, boxes, counts


def compress_counts(counts: list[int]) -> bytes:
    """Writes COCO's compressed run lengths.

    They are differences to the count before last, five bits a character, lowest first; bit 5 says that more follow.
    """
    text = bytearray()
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            character, value = value & 0x1F, value >> 5
            more = value != (-1 if character & 0x10 else 0)
            text.append((character | 0x20 if more else character) + 48)
    return bytes(text)


def _clean_segments_numpy(ids: np.ndarray, min_island: int, max_hole: int) -> np.ndarray:
    ids = ids.copy()
    piece, area = pieces(ids)
    ids[(area[piece] < min_island) & (ids != 0)] = 0
    piece, area = pieces(ids)
    for hole in np.unique(piece[(ids == 0) & (area[piece] <= max_hole)]):
        inside = np.pad(piece == hole, 1)
        ring = np.zeros_like(inside)
        for axis in (0, 1):
            for step in (-1, 1):
                ring |= np.roll(inside, step, axis)
        around = np.unique(np.pad(ids, 1, constant_values=-1)[ring & ~inside])
        if len(around) == 1 and around[0] > 0:
            ids[piece == hole] = around[0]
    return ids


def pieces(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the 4-connected pieces of equal id, by where each begins in the order of reading.

    Args:
        ids: integer [H, W].

    Returns:
        The numbers int [H, W] in 0..H W - 1, and the area int [H W] of each number, in pixels.
    """
    piece = np.arange(ids.size).reshape(ids.shape)
    before = None
    while before is None or (before != piece).any():
        before = piece.copy()
        for one, other in ((np.s_[1:, :], np.s_[:-1, :]), (np.s_[:, 1:], np.s_[:, :-1])):
            lowest = np.where(ids[one] == ids[other], np.minimum(piece[one], piece[other]), -1)
            piece[one] = np.where(lowest >= 0, lowest, piece[one])
            piece[other] = np.where(lowest >= 0, np.minimum(lowest, piece[other]), piece[other])
        piece = piece.ravel()[piece]  # each pixel's number is a pixel of its piece: take over what that one has
    return piece, np.bincount(piece.ravel(), minlength=ids.size)
