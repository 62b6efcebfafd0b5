"""Segments without a model, which any trained one has to beat. The baselines are this project's own."""

from __future__ import annotations

import numpy as np


def one_segment(height: int, width: int) -> np.ndarray:
    """Makes the whole picture one segment: int32 [H, W], all 1."""
    return np.ones((height, width), np.int32)


def halves(height: int, width: int) -> np.ndarray:
    """Makes the upper and the lower half one segment each: int32 [H, W], ids 1 and 2."""
    return grid(height, width, 2, 1)


def grid(height: int, width: int, rows: int = 3, columns: int = 3) -> np.ndarray:
    """Makes rows x columns equal cells: int32 [H, W], ids 1..rows * columns in raster order."""
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    return (row[:, None] * columns + column[None, :] + 1).astype(np.int32)


BASELINES = {"one segment": one_segment, "halves": halves, "grid 3x3": grid}


def segments_of(segmentation: np.ndarray) -> list[dict]:
    """Lists the ids of a map, integer [H, W], but 0 as class-agnostic `segments_info`."""
    return [{"id": i, "category_id": 1, "iscrowd": 0} for i in ids_in(segmentation) if i]


def ids_in(segmentation: np.ndarray) -> list[int]:
    """Lists the ascending ids of a map, integer [H, W], 0 included.

    Maps have few runs, and sorting those is quicker than sorting pixels.
    """
    flat = segmentation.ravel()
    return np.unique(flat[np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))]).tolist()


def fill_nearest(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Gives each unknown pixel the id of the nearest known one by city-block distance.

    The distance is found in two passes, along columns and then along rows (Rosenfeld and Pfaltz, "Sequential operations
    in digital picture processing", JACM 1966). Of several nearest pixels always the same one is taken.

    Args:
        ids: integer [H, W].
        known: bool [H, W], where `ids` holds.

    Returns:
        int32 [H, W]; void (0) everywhere where no pixel is known.
    """
    height, width = ids.shape
    if not known.any():
        return np.zeros((height, width), np.int32)
    far = height + width
    kind = np.int32 if (far + width) * width < 2**31 else np.int64  # holds a distance and a column
    rows, columns = np.arange(height, dtype=kind)[:, None], np.arange(width, dtype=kind)[None, :]
    # down each column: the nearest known row above or below
    above = np.maximum.accumulate(np.where(known, rows, kind(-far)), axis=0)
    below = np.minimum.accumulate(np.where(known, rows, kind(2 * far))[::-1], axis=0)[::-1]
    row = np.where(rows - above <= below - rows, above, below)
    distance = np.minimum(np.abs(row - rows), far)
    # along each row: the column whose known pixel is nearest in all; a distance carries its column with it
    left = np.minimum.accumulate((distance - columns + width) * width + columns, axis=1)
    right = np.minimum.accumulate(((distance + columns) * width + columns)[:, ::-1], axis=1)[:, ::-1]
    from_left, from_right = left // width - width + columns, right // width - columns
    column = np.where(from_left <= from_right, left % width, right % width)
    return ids[np.take_along_axis(row, column, axis=1), column].astype(np.int32)
