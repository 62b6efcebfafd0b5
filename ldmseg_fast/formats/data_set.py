"""Describes a data set on its way from one format to another.

A reader makes a `DataSet` of a folder and decodes nothing. A writer asks its entries for their maps one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class AnnotatedMap:
    """Holds one picture's map.

    Attributes:
        ids: int32 [H, W] at the size of the stored picture, 0 void.
        segments: one entry for each id, in ascending id, with `id`, `category_id` and `iscrowd`, and `score` where the
            source has one. Of an id that no pixel has there is none.
        left_out: what of the source the map does not hold: reason -> how many, such as
            {"pixels of several instances, given to the smaller one": 12}.
    """

    ids: np.ndarray
    segments: list[dict[str, Any]]
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """Describes one picture and how its map is had.

    Attributes:
        name: the picture's file in the split's folder, with `/` between folders.
        picture: the file itself, or of one that lies in no file of its own the encoded bytes, or what gives them, which
            any thread may call.
        read: reads the map. It raises `DataError`, which names the file and the cure, and may be called by any thread.
        image_id: the source's own, None: the writer numbers.
        sources: the files that `read` reads. An import that goes on reads an entry again where one has changed since,
            and always where none is named.
    """

    name: str
    picture: Path | bytes | Callable[[], bytes]
    read: Callable[[], AnnotatedMap]
    image_id: int | str | None = None
    sources: tuple[Path, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """Holds what a reader has found.

    Attributes:
        categories: COCO entries with `id`, `name` and `isthing`, and `supercategory` and `color` where there are any.
        splits: the entries of each split, in the order in which they are written.
        left_out: what the reader left out, reason -> how many, such as {"pictures without annotation": 3}.
    """

    categories: list[dict[str, Any]]
    splits: Mapping[str, Sequence[Entry]]
    left_out: dict[str, int] = field(default_factory=dict)
