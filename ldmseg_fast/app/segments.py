"""Holds a result that a visitor edits: hide, merge, recolour, rename, undo. The map's pixels are never copied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes
from ldmseg_fast.reports.draw import overlay, segment_colors
from ldmseg_fast.reports.error_entry import nearest
from ldmseg_fast.reports.labels import write_names

MAX_UNDO = 200  # edits that are remembered
LONGEST_NAME = 80  # characters of a segment's name
_COLOR = re.compile(r"#([0-9a-fA-F]{6})")
_FUNCTION = re.compile(r"rgba?\(\s*([0-9.]+)\s*,\s*([0-9.]+)\s*,\s*([0-9.]+)\s*(?:,\s*[0-9.]+\s*)?\)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


@dataclass(frozen=True)
class Segment:
    """Describes one segment as it is shown.

    Attributes:
        id: in the map.
        name: a visitor's, or the category's.
        color: RGB, 0..255 each.
        area: in pixels.
        share: of the picture, 0 to 1.
        score: of the prediction; None where there is none.
        bbox: x, y, width, height in pixels.
        hidden: whether it is left out of overlay and downloads.
    """

    id: int
    name: str
    color: tuple[int, int, int]
    area: int
    share: float
    score: float | None
    bbox: tuple[int, int, int, int]
    hidden: bool = False

    @property
    def hex(self) -> str:
        """The colour as #rrggbb."""
        return "#{:02x}{:02x}{:02x}".format(*self.color)


@dataclass(frozen=True)
class _State:
    """What the edits have made so far; an edit makes a new one.

    Attributes:
        into: id in the result -> id of the segment that it was merged into.
        names, colors: of ids that a visitor has named or coloured.
        hidden: ids.
    """

    into: Mapping[int, int]
    names: Mapping[int, str]
    colors: Mapping[int, tuple[int, int, int]]
    hidden: frozenset[int] = frozenset()


class Segments:
    """Holds a result and a visitor's edits of it.

    Args:
        result: stays as it is.
        categories: COCO entries that name its segments' categories.
    """

    def __init__(
        self,
        result: PanopticResult,
        categories: Sequence[Mapping[str, Any]] = ({"id": 1, "name": "object", "isthing": 1},),
    ) -> None:
        self.original = result
        self.base_categories = [dict(category) for category in categories]
        self._category_names = {category["id"]: category["name"] for category in self.base_categories}
        self._info = {segment["id"]: segment for segment in result.segments_info}
        ids, colors = segment_colors(result.segmentation)
        self._colors: dict[int, Any] = {int(key): tuple(color.tolist()) for key, color in zip(ids, colors)}
        self._ids = [int(key) for key in ids if key]
        self._shapes = {shape["id"]: shape for shape in segment_shapes(result.segmentation)}
        self._history = [_State({}, {}, {})]

    def __len__(self) -> int:
        return len(self._parts())

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the map."""
        height, width = self.original.segmentation.shape
        return height, width

    @property
    def ids(self) -> np.ndarray:
        """The map after merges, int32 [H, W]; hidden segments are in it."""
        state = self._history[-1]
        if not state.into:
            return self.original.segmentation
        return self._looked_up({key: self._root(key) for key in self._ids})

    def listed(self) -> list[Segment]:
        """Lists the segments, the largest first."""
        described = (self._described(key, parts) for key, parts in self._parts().items())
        return sorted(described, key=lambda each: (-each.area, each.id))

    def __getitem__(self, segment_id: int) -> Segment:
        """Describes one segment.

        Raises:
            ArgumentError: an id that no segment has.
        """
        return self._described(self._known(segment_id))

    def at(self, x: float, y: float) -> int:
        """Returns the id of the segment at a pixel, counted from the upper left corner; 0 in void and outside."""
        height, width = self.size
        if not (0 <= x < width and 0 <= y < height):
            return 0
        return self._root(int(self.original.segmentation[int(y), int(x)]))

    def hide(self, segment_ids: int | Iterable[int], hidden: bool = True) -> None:
        """Hides segments, or shows them again.

        Raises:
            ArgumentError: an id that no segment has.
        """
        chosen = frozenset(self._all_known(segment_ids))
        state = self._history[-1]
        self._do(replace(state, hidden=state.hidden | chosen if hidden else state.hidden - chosen))

    def merge(self, segment_ids: Iterable[int], into: int | None = None) -> int:
        """Makes one segment of several, and returns its id.

        Args:
            segment_ids: at least two, with `into`.
            into: the one whose id, name, colour and category stay; default the largest.

        Raises:
            ArgumentError: an id that no segment has, or fewer than two.
        """
        chosen = self._all_known(segment_ids)
        if into is not None:
            chosen = list(dict.fromkeys([self._known(into), *chosen]))
        if len(chosen) < 2:
            raise ArgumentError("merging takes two segments or more: choose another one")
        target = into if into is not None else max(chosen, key=lambda key: (self._described(key).area, -key))
        state = self._history[-1]
        merged = {key: target for key in chosen if key != target}
        self._do(replace(state, into={**state.into, **merged}, hidden=state.hidden - set(chosen)))
        return int(target)

    def recolour(self, segment_id: int, color: str | Sequence[int]) -> None:
        """Gives a segment a colour: "#rrggbb", "rgb(r, g, b)" or three numbers 0..255.

        Raises:
            ArgumentError: an id that no segment has, or no colour.
        """
        state = self._history[-1]
        self._do(replace(state, colors={**state.colors, self._known(segment_id): color_of(color)}))

    def rename(self, segment_id: int, name: str) -> None:
        """Gives a segment a name; an empty one gives it back its category's.

        Raises:
            ArgumentError: an id that no segment has, or a name of over LONGEST_NAME characters.
        """
        key, state = self._known(segment_id), self._history[-1]
        if not isinstance(name, str):
            raise ArgumentError(f"name={name!r:.80}: a text expected")
        name = " ".join(_CONTROL.sub(" ", name).split())
        if len(name) > LONGEST_NAME:
            raise ArgumentError(f"{name[:20]}...: {len(name)} characters; a name has at most {LONGEST_NAME}")
        names = {other: text for other, text in state.names.items() if other != key}
        self._do(replace(state, names=names | {key: name} if name else names))

    def undo(self) -> bool:
        """Takes the last edit back; False where there is none."""
        if len(self._history) == 1:
            return False
        self._history.pop()
        return True

    @property
    def edits(self) -> int:
        """How many edits `undo` can take back."""
        return len(self._history) - 1

    def overlay(
        self, view: np.ndarray, opacity: float = 0.65, *, outlines: bool = True, names: bool = False
    ) -> np.ndarray:
        """Tints a picture by its segments; hidden ones show the picture as it is.

        Args:
            view: the picture, uint8 [h, w, 3], of the map's size or another.
            opacity: of the tint, 0 to 1.
            outlines: whether edges are drawn.
            names: whether names are written on segments that have room for them.

        Returns:
            uint8 [h, w, 3].

        Raises:
            ArgumentError: an opacity out of range.
        """
        if isinstance(opacity, bool) or not isinstance(opacity, int | float) or not 0 <= opacity <= 1:
            raise ArgumentError(f"opacity={opacity!r}: a number from 0 to 1 expected")
        ids = self.ids
        if ids.shape != view.shape[:2]:
            ids = nearest(ids, *view.shape[:2])
        listed = self.listed()
        in_order = sorted(listed, key=lambda each: each.id)
        place = np.searchsorted([0, *(each.id for each in in_order)], ids)
        colors = np.array([(0, 0, 0), *(each.color for each in in_order)], np.uint8)  # void is hatched whatever it has
        drawn = overlay(view, ids, opacity, outlines, colors[place])
        hidden = np.array([False, *(each.hidden for each in in_order)])[place]
        drawn[hidden] = view[hidden]
        if not names:
            return drawn
        shown = [each for each in listed if not each.hidden]
        picture = Image.fromarray(drawn)
        entries = [{"id": each.id, "area": each.area} for each in shown]
        size = max(12, min(picture.size) // 28)
        write_names(picture, ids, entries, {each.id: each.name for each in shown}, size)
        return np.asarray(picture)

    def categories(self) -> list[dict[str, Any]]:
        """Lists the categories of `result`, COCO entries: the model's, and one for each new name."""
        return self._categories()[0]

    def result(self, *, hidden: bool = False) -> PanopticResult:
        """Returns the edited map and its segments, as exports take them.

        A segment with a name of a visitor's has the category of that name: the model's where there is one, else one of
        `categories` that is new. A colour of a visitor's is `color` of its entry, [r, g, b]. A merged segment has the
        mean score over the pixels of its parts.

        Args:
            hidden: whether hidden segments stay; otherwise they are void.
        """
        _, chosen = self._categories()
        state = self._history[-1]
        lookup = {key: self._root(key) for key in self._ids}
        if not hidden:
            lookup = {key: 0 if root in state.hidden else root for key, root in lookup.items()}
        ids = self._looked_up(lookup)
        parts, info = self._parts(), []
        for shape in segment_shapes(ids):
            key = shape["id"]
            entry: dict[str, Any] = {"category_id": 1, "label_id": 1, "isthing": True, "iscrowd": 0, "was_fused": False}
            entry |= self._info.get(key, {}) | shape
            described = self._described(key, parts[key])
            if described.score is not None:
                entry["score"] = described.score
            if key in chosen:
                number = chosen[key]["id"]
                entry |= {"name": described.name, "category_id": number, "label_id": number}
                entry["isthing"] = bool(chosen[key]["isthing"])
            if key in state.colors:
                entry["color"] = list(described.color)
            info.append(entry)
        return PanopticResult(ids, info)

    def _categories(self) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
        """The categories, and that of each segment which a visitor has named."""
        found = [dict(category) for category in self.base_categories]
        of_name = {category["name"]: category for category in found}
        chosen = {}
        for key, name in sorted(self._history[-1].names.items()):
            if self._root(key) != key:
                continue
            if name not in of_name:
                number = max((category["id"] for category in found), default=0) + 1
                isthing = int(bool(self._info.get(key, {}).get("isthing", True)))
                of_name[name] = {"id": number, "name": name, "isthing": isthing}
                found.append(of_name[name])
            chosen[key] = of_name[name]
        return found, chosen

    def _described(self, key: int, parts: Sequence[int] | None = None) -> Segment:
        """Describes a segment; `parts` are the ids in the result that it is made of."""
        state, info = self._history[-1], self._info.get(key, {})
        parts = parts or self._parts()[key]
        usual = info.get("name") or self._category_names.get(info.get("category_id", 1)) or "object"
        areas = {part: self._shapes[part]["area"] for part in parts}
        area = sum(areas.values())
        scored = {part: self._info[part]["score"] for part in parts if "score" in self._info.get(part, {})}
        weight = sum(areas[part] for part in scored)
        boxes = np.array([self._shapes[part]["bbox"] for part in parts])
        low, high = boxes[:, :2].min(0), (boxes[:, :2] + boxes[:, 2:]).max(0)
        return Segment(
            key,
            state.names.get(key, usual),
            state.colors.get(key, self._colors[key]),
            area,
            area / self.original.segmentation.size,
            sum(score * areas[part] for part, score in scored.items()) / weight if weight else None,
            (*low.tolist(), *(high - low).tolist()),
            key in state.hidden,
        )

    def _parts(self) -> dict[int, list[int]]:
        parts: dict[int, list[int]] = {}
        for key in self._ids:
            parts.setdefault(self._root(key), []).append(key)
        return parts

    def _root(self, key: int) -> int:
        into = self._history[-1].into
        while key in into:
            key = into[key]
        return key

    def _known(self, segment_id: Any) -> int:
        whole = isinstance(segment_id, int | np.integer) and not isinstance(segment_id, bool)
        if not whole or int(segment_id) not in self._shapes or int(segment_id) in self._history[-1].into:
            raise ArgumentError(f"segment {segment_id!r}: no such segment; choose one of the list")
        return int(segment_id)

    def _all_known(self, segment_ids: int | Iterable[int]) -> list[int]:
        several = segment_ids if isinstance(segment_ids, Iterable) else [segment_ids]
        return list(dict.fromkeys(self._known(each) for each in several))

    def _do(self, state: _State) -> None:
        if state != self._history[-1]:
            self._history.append(state)
            del self._history[: -MAX_UNDO - 1]

    def _looked_up(self, lookup: Mapping[int, int]) -> np.ndarray:
        keys = np.array([0, *self._ids])
        values = np.array([0, *(lookup[key] for key in self._ids)], np.int32)
        return values[np.searchsorted(keys, self.original.segmentation)]


def color_of(color: str | Sequence[int]) -> tuple[int, int, int]:
    """Reads a colour, RGB 0..255 each: "#rrggbb", "rgb(r, g, b)" or "rgba(...)" whose alpha is dropped, or 3 numbers.

    Raises:
        ArgumentError: none of these.
    """
    values: list[Any] = []
    if isinstance(color, str):
        if found := _COLOR.fullmatch(color.strip()):
            values = list(bytes.fromhex(found[1]))
        elif found := _FUNCTION.fullmatch(color.strip()):
            values = [round(float(each)) for each in found.groups() if each.count(".") <= 1 and each != "."]
    elif isinstance(color, Sequence):
        values = list(color)
    if len(values) != 3 or not all(isinstance(each, int) and 0 <= each <= 255 for each in values):
        raise ArgumentError(f"color={color!r:.80}: #rrggbb expected")
    return values[0], values[1], values[2]
