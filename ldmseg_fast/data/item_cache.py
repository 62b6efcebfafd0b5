"""Keeps decoded pictures and maps in memory."""

from __future__ import annotations

import numpy as np

# rgb uint8 [P, P, 3], ids uint8 [S, S], categories [S, S] where there are any, number of segments, original H and W
Item = tuple[np.ndarray, np.ndarray, np.ndarray | None, int, tuple[int, int]]


def category_type(num_categories: int) -> type[np.uint8] | type[np.int16]:
    """Tells the least type of category numbers."""
    return np.uint8 if num_categories <= 255 else np.int16


def item_bytes(picture_side: int, map_side: int, num_categories: int) -> int:
    """Tells how many bytes `ItemCache` needs for an item."""
    categories = np.dtype(category_type(num_categories)).itemsize if num_categories else 0
    return 16 + 3 * picture_side**2 + (1 + categories) * map_side**2


class ItemCache:
    """Holds items of one size by their index.

    Args:
        count: of all items; memory is taken as they come.
        picture_side: P, 0 without pictures.
        map_side: S.
        num_categories: 0 without categories.
    """

    def __init__(self, count: int, picture_side: int, map_side: int, num_categories: int) -> None:
        self._facts = np.zeros((count, 4), np.int32)  # 1 once there, number of segments, H, W
        self._rgb = np.zeros((count, picture_side, picture_side, 3), np.uint8)
        self._ids = np.zeros((count, map_side, map_side), np.uint8)
        self._categories = None
        if num_categories:
            self._categories = np.zeros(self._ids.shape, category_type(num_categories))

    def get(self, index: int) -> Item | None:
        """Returns rgb uint8 [P, P, 3], ids uint8 [S, S] and the rest of an item as they lie here; None before `put`."""
        there, num_segments, height, width = self._facts[index].tolist()
        if not there:
            return None
        categories = None if self._categories is None else self._categories[index]
        return self._rgb[index], self._ids[index], categories, num_segments, (height, width)

    def put(self, index: int, item: Item) -> None:
        """Copies an item: rgb uint8 [P, P, 3], ids uint8 [S, S], and the rest."""
        rgb, ids, categories, num_segments, original_size = item
        self._rgb[index], self._ids[index] = rgb, ids
        if self._categories is not None and categories is not None:
            self._categories[index] = categories
        self._facts[index] = 1, num_segments, *original_size
