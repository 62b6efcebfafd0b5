"""Describes the categories of a model: what each of its numbers 1..C stands for (0 is void).

A data set's categories are matched with a model's by name, as ids differ between data sets.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldmseg_fast.errors import DataError

MAX_CATEGORIES = 4095
_SHOWN = 8


@dataclass(frozen=True)
class Category:
    """Describes one category, as COCO's panoptic JSON does.

    Attributes:
        id: of the data set that the model was trained on, 0..2^31-1.
        name: told apart from all others of its table.
        isthing: whether it has instances; all stuff of one category is one segment.
        color: RGB, 0..255 each.
    """

    id: int
    name: str
    isthing: bool
    color: tuple[int, int, int]


@dataclass(frozen=True)
class CategoryTable:
    """Lists a model's categories; the category at place k has the number k + 1."""

    categories: tuple[Category, ...]

    def __len__(self) -> int:
        return len(self.categories)

    def __getitem__(self, number: int) -> Category:
        """Gives the category of a number in 1..C."""
        if not 1 <= number <= len(self.categories):
            raise IndexError(f"category number {number} of 1..{len(self.categories)}")
        return self.categories[number - 1]

    @classmethod
    def of_data_set(cls, categories: Sequence[Mapping[str, Any]], source: str) -> CategoryTable:
        """Makes the table of a data set, in the order of its list.

        Args:
            categories: of a COCO panoptic JSON that has been checked; each needs `isthing`.
            source: names the JSON, for errors.

        Raises:
            DataError: no categories or too many of them, no `isthing`, or two categories of one name.
        """
        if not 1 <= len(categories) <= MAX_CATEGORIES:
            raise DataError(
                f"{source}: {len(categories)} categories; a model with categories has 1 to {MAX_CATEGORIES}"
            )
        _check(categories, source)
        return cls(
            tuple(
                Category(entry["id"], name_of(entry), bool(entry["isthing"]), _color(entry, place))
                for place, entry in enumerate(categories)
            )
        )

    @classmethod
    def of_data_sets(cls, sets: Sequence[tuple[Sequence[Mapping[str, Any]], str]]) -> CategoryTable:
        """Joins the tables of several data sets by name; of one it is `of_data_set`'s.

        An id that another set's category has already becomes the next free one.

        Args:
            sets: the categories of each, and its JSON for errors.

        Raises:
            DataError: as `of_data_set`; a category that is a thing in one set and stuff in another.
        """
        joined: dict[str, tuple[dict[str, Any], str]] = {}
        for categories, source in sets:
            _check(categories, source)
            for entry in categories:
                name = name_of(entry)
                before, other = joined.get(name, (entry, source))
                if bool(before["isthing"]) != bool(entry["isthing"]):
                    here, there = ("thing", "stuff") if entry["isthing"] else ("stuff", "thing")
                    raise DataError(
                        f"{source}: category {name!r} is a {here} here and {there} in {other}; correct one isthing, or "
                        f"rename one"
                    )
                if name not in joined:
                    taken = {known["id"] for known, _ in joined.values()}
                    number = entry["id"] if entry["id"] not in taken else max(taken) + 1
                    joined[name] = (dict(entry) | {"id": number, "name": name}, source)
        return cls.of_data_set([entry for entry, _ in joined.values()], ", ".join(source for _, source in sets))

    def numbers_of(self, categories: Sequence[Mapping[str, Any]], source: str) -> dict[int, int]:
        """Tells the number of each category of a data set.

        The data set may order and number its categories as it likes, and have some of the model's only.

        Args:
            categories: of a COCO panoptic JSON that has been checked.
            source: names the JSON, for errors.

        Returns:
            The data set's category ids, each with its number in 1..C.

        Raises:
            DataError: a category that the model does not have, or has as stuff where it is a thing here or the other
                way round; no `isthing`; two categories of one name.
        """
        _check(categories, source)
        numbers = {category.name: number for number, category in enumerate(self.categories, 1)}
        unknown = [name_of(entry) for entry in categories if name_of(entry) not in numbers]
        if unknown:
            raise DataError(
                f"{source}: the model has no category {_listed(unknown)}; it has {_listed(numbers)}. Rename or merge "
                f"the data set's categories, or train a model on them"
            )
        found = {entry["id"]: numbers[name_of(entry)] for entry in categories}
        for entry in categories:
            if bool(entry["isthing"]) != self[found[entry["id"]]].isthing:
                here, there = ("thing", "stuff") if entry["isthing"] else ("stuff", "thing")
                raise DataError(
                    f"{source}: category {name_of(entry)!r} is a {here} here and {there} in the model; correct its "
                    f"isthing, or train a model on this data set"
                )
        return found

    def to_coco(self) -> list[dict[str, Any]]:
        """Lists the categories as the `categories` of a COCO panoptic JSON."""
        return [
            {"id": c.id, "name": c.name, "isthing": int(c.isthing), "color": list(c.color)} for c in self.categories
        ]


def name_of(category: Mapping[str, Any]) -> str:
    """Gives a category's name; one without is called after its id."""
    return category.get("name") or f"category {category['id']}"


def _check(categories: Sequence[Mapping[str, Any]], source: str) -> None:
    seen: dict[str, int] = {}
    for entry in categories:
        name = name_of(entry)
        if "isthing" not in entry:
            raise DataError(f"{source}: category {name!r} has no isthing; write 1 for a thing, 0 for stuff")
        if name in seen:
            raise DataError(
                f"{source}: categories {seen[name]} and {entry['id']} are both called {name!r}; a model tells them "
                f"apart by name: rename one"
            )
        seen[name] = entry["id"]


def _color(entry: Mapping[str, Any], place: int) -> tuple[int, int, int]:
    """The colour that the data set gives, else one far from its neighbours': hues by the golden ratio."""
    color = entry.get("color")
    if isinstance(color, list) and len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color):
        return color[0], color[1], color[2]
    red, green, blue = colorsys.hsv_to_rgb(
        place * 0.6180339887 % 1, 0.55 + 0.15 * (place % 3), 0.95 - 0.2 * (place % 2)
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name[:60]) for name in names[:_SHOWN]) + more
