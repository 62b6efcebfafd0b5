"""Segmentations that look at no picture: what any trained model has to beat."""

from __future__ import annotations

import numpy as np


def one_segment(height: int, width: int) -> np.ndarray:
    """The whole picture as one segment, int32 [H, W]."""
    return np.ones((height, width), np.int32)


def halves(height: int, width: int) -> np.ndarray:
    """Upper and lower half, int32 [H, W]."""
    return grid(height, width, 2, 1)


def grid(height: int, width: int, rows: int = 3, columns: int = 3) -> np.ndarray:
    """rows x columns equal cells, int32 [H, W]."""
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    return (row[:, None] * columns + column[None, :] + 1).astype(np.int32)


BASELINES = {"one segment": one_segment, "halves": halves, "grid 3x3": grid}


def segments_of(segmentation: np.ndarray) -> list[dict]:
    """Class-agnostic `segments_info` of a map whose ids are 1..n."""
    return [{"id": int(i), "category_id": 1, "iscrowd": 0} for i in np.unique(segmentation) if i]
