"""Turns what a visitor paints over a map into ids: each brush colour stands for a segment, or for what is forgotten."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.tabs.viewer import labels, scaled
from ldmseg_fast.panoptic.format import MAX_ID
from ldmseg_fast.reports.draw import enlarge, palette
from ldmseg_fast.reports.error_entry import nearest

SIDE = 640  # pixels of the longer side of the canvas, at most
FORGET, KEEP = -1, -2  # codes beside ids
_BLACK, _MAGENTA = (0, 0, 0), (255, 0, 255)
_APART = 40.0  # RGB distance below which two colours are one
_MOST = 30  # segments with a brush of their own, the largest


@dataclass(frozen=True)
class Brush:
    """Describes one brush.

    Attributes:
        code: FORGET, or the id that it paints.
        color: RGB.
        name: for the legend.
    """

    code: int
    color: tuple[int, int, int]
    name: str

    @property
    def hex(self) -> str:
        """The colour as #rrggbb."""
        return "#{:02x}{:02x}{:02x}".format(*self.color)


def brushes_of(segments: Segments) -> list[Brush]:
    """Gives brushes to a map: one that forgets, one for a new segment, one for each of the largest segments.

    A segment's brush has its colour where that is far enough from all before it.
    """
    listed = segments.listed()
    fresh = next(number for number in range(1, MAX_ID + 1) if number not in set(np.unique(segments.ids).tolist()))
    brushes = [Brush(FORGET, _BLACK, "brush away"), Brush(fresh, _MAGENTA, "a new segment")]
    names = labels(segments)
    spare = [tuple(color) for color in palette().tolist()]
    for each in listed[:_MOST]:
        free = (color for color in (each.color, *spare) if _is_apart(color, [brush.color for brush in brushes]))
        color = next(free, None)
        if color is not None:
            brushes.append(Brush(each.id, color, names[each.id]))  # type: ignore[arg-type]
    return brushes


def _is_apart(color: Sequence[int], others: Sequence[Sequence[int]]) -> bool:
    return all(np.linalg.norm(np.subtract(color, other)) >= _APART for other in others)


def canvas_of(segments: Segments, view: np.ndarray) -> np.ndarray:
    """Draws a map over its picture for the editor, uint8 [h, w, 3], at most SIDE pixels long."""
    view = enlarge(scaled(view, SIDE), SIDE)
    return segments.overlay(view, 0.75)


def painted(layers: Sequence[np.ndarray], brushes: Sequence[Brush], height: int, width: int) -> np.ndarray:
    """Reads the strokes as codes, int32 [H, W]: KEEP where there are none, FORGET, or ids.

    Where strokes of two colours blend at their rim the colour is neither's, and the pixel is forgotten.

    Args:
        layers: uint8 RGBA [h, w, 4] of the editor, a later one over an earlier one.
        brushes: of `brushes_of`.
        height, width: of the map.
    """
    codes = np.full((height, width), KEEP, np.int32)
    colors = np.array([brush.color for brush in brushes], np.int32)
    values = np.array([brush.code for brush in brushes], np.int32)
    for layer in layers:
        small = nearest(layer, height, width).astype(np.int32)
        touched = small[..., 3] >= 128
        far = np.square(small[touched][:, None, :3] - colors[None]).sum(-1)  # [N, brushes]
        found = np.where(far.min(1) < _APART**2 / 4, values[far.argmin(1)], FORGET) if len(far) else values[:0]
        codes[touched] = found
    return codes


def legend(brushes: Sequence[Brush]) -> str:
    """Writes what each brush paints, as HTML."""
    items = "".join(
        f'<li><span class="viewer-swatch" style="background:{brush.hex}"></span>{html.escape(brush.name)}</li>'
        for brush in brushes
    )
    return f'<ul class="legend" aria-label="What each brush colour paints">{items}</ul>'
