"""Measures a map's segments (areas, boxes, COCO run lengths), and splits them into connected pieces."""

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


def split_segments(ids: np.ndarray, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Makes each 4-connected piece of a segment a segment of its own; pieces under `least` pixels become void.

    Args:
        ids: integer [H, W], 0 void.
        least: pixels.

    Returns:
        A new map, int32 [H, W], whose P pieces are numbered from 1 in the order of reading, and the id in `ids` that
        each is of, int32 [P].

    Raises:
        PanopticFormatError: no such map, or ids outside 0..2^24-1.
    """
    ids = np.ascontiguousarray(check_ids(ids), np.int32)
    if _C is not None:
        return _C.split_segments(ids, least)
    warn_slow()
    return _split_segments_numpy(ids, least)


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


def _split_segments_numpy(ids: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    piece, area = pieces(ids)
    kept, new_ids = np.unique(np.where((ids != 0) & (area[piece] >= least), piece, -1), return_inverse=True)
    void = int(kept[0] == -1) if kept.size else 1
    return (new_ids.reshape(ids.shape) + 1 - void).astype(np.int32), ids.ravel()[kept[void:]]


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
