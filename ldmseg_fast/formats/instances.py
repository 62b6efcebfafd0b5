"""Makes instances of the connected pieces of a category, and says anew which categories are things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.panoptic.shapes import split_segments


class _Changed(Sequence):
    """Gives a split's entries with another way to read; entries are made when they are asked for."""

    def __init__(self, entries: Sequence[Entry], connected: frozenset[int]) -> None:
        self._entries, self._connected = entries, connected

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        entry = self._entries[index]
        return replace(entry, read=partial(_read, entry, self._connected))


def with_options(data_set: DataSet, options: ReadOptions) -> DataSet:
    """Returns the data set as `options.connected` and `options.things` change it.

    Raises:
        ArgumentError: a category that the data set does not have; it names those that it has.
    """
    if not options.connected and not options.things:
        return data_set
    connected = _ids_of(data_set.categories, options.connected, "--connected")
    things = _ids_of(data_set.categories, options.things, "--things") | connected
    categories = data_set.categories
    if options.things:
        categories = [{**category, "isthing": int(category["id"] in things)} for category in categories]
    elif connected:
        categories = [
            {**category, "isthing": 1} if category["id"] in connected else category for category in categories
        ]
    if not connected:
        return replace(data_set, categories=categories)
    splits: dict[str, Sequence[Entry]] = {
        split: _Changed(entries, connected) for split, entries in data_set.splits.items()
    }
    return replace(data_set, categories=categories, splits=splits)


def _ids_of(categories: list[dict[str, Any]], wanted: Sequence[str], option: str) -> frozenset[int]:
    """Finds categories; a value is a name, or several with commas between them."""
    ids: set[int] = set()
    for value in wanted:
        for name in [value] if _named(categories, value) else [part.strip() for part in value.split(",")]:
            found = _named(categories, name)
            if not found:
                names = [category["name"] for category in categories]
                shown = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
                raise ArgumentError(f"{option} {name}: no category of this data set; it has {shown}")
            ids.update(found)
    return frozenset(ids)


def _named(categories: list[dict[str, Any]], name: str) -> list[int]:
    """Finds categories by name, or else by name in other letters, or else by id."""
    for spelled in (
        lambda category: category["name"] == name,
        lambda category: category["name"].casefold() == name.casefold(),
        lambda category: str(category["id"]) == name,
    ):
        if found := [category["id"] for category in categories if spelled(category)]:
            return found
    return []


def _read(entry: Entry, connected: frozenset[int]) -> AnnotatedMap:
    return split_pieces(entry.read(), connected)


def split_pieces(annotated: AnnotatedMap, categories: frozenset[int]) -> AnnotatedMap:
    """Gives each 4-connected piece of these categories' segments an id of its own; crowds stay whole.

    Args:
        annotated: the map.
        categories: ids of categories.

    Returns:
        A map in which a segment's largest piece keeps its id, and the others have ids that were free.
    """
    chosen = [s for s in annotated.segments if s["category_id"] in categories and not s.get("iscrowd")]
    wanted = np.isin(annotated.ids, [segment["id"] for segment in chosen])
    pieces, sources = split_segments(np.where(wanted, annotated.ids, 0))
    area = np.bincount(pieces.ravel(), minlength=len(sources) + 1)
    used = {segment["id"] for segment in annotated.segments}
    free = (number for number in count(1) if number not in used)
    segments, table = list(annotated.segments), np.zeros(len(sources) + 1, np.int32)
    for segment in chosen:
        own = np.flatnonzero(sources == segment["id"]) + 1
        largest = max(own, key=area.__getitem__)
        for piece in own:
            table[piece] = segment["id"] if piece == largest else next(free)
            if piece != largest:
                segments.append({**segment, "id": int(table[piece])})
    ids = np.where(wanted, table[pieces], annotated.ids)
    return replace(annotated, ids=ids, segments=sorted(segments, key=lambda segment: segment["id"]))
