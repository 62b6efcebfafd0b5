"""Shows a picture under its segments: opacity, outlines, names on hover, and a choice of segments to change.

The browser gets the picture and one number a pixel, and draws them itself (`viewer.js`), so that only a change of the
map asks the server.
"""

from __future__ import annotations

import base64
import io
import uuid
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ldmseg_fast.app.segments import Segments
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.reports.error_entry import nearest

SIDE = 1024  # pixels of the longer side that the browser gets
_FOLDER = Path(__file__).parents[1]


def viewer(label: str, elem_id: str) -> gr.HTML:
    """Makes the component; its value is what `view_of` gives, or None.

    Its event `edit` has `action` ("hide", "merge", "recolour", "rename" or "undo"), `ids`, `name` and `color`.
    """
    return gr.HTML(
        None,
        label=label,
        show_label=False,
        html_template=(_FOLDER / "viewer.html").read_text(encoding="utf-8"),
        js_on_load=(_FOLDER / "viewer.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        container=True,
        padding=True,
        elem_id=elem_id,
    )


def scaled(view: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Scales a picture, uint8 [h, w, 3], down to at most `side` pixels a side."""
    if max(view.shape[:2]) <= side:
        return view
    image = Image.fromarray(view)
    image.thumbnail((side, side), Image.Resampling.BOX)
    return np.asarray(image)


def labels(segments: Segments) -> dict[int, str]:
    """Names the segments, by id, the largest first, so that no two have the same name.

    Those that share one get a number behind it, which edits of others do not change.
    """
    listed = segments.listed()
    count = Counter(each.name for each in listed)
    number = {int(key): place for place, key in enumerate(filter(None, np.unique(segments.original.segmentation)), 1)}
    return {each.id: each.name if count[each.name] == 1 else f"{each.name} {number[each.id]}" for each in listed}


def view_of(segments: Segments, view: np.ndarray, name: str = "", *, editable: bool = True) -> dict[str, Any]:
    """Makes the viewer's value.

    Args:
        segments: of the map, whose size may be another than the picture's.
        view: the picture, uint8 [h, w, 3].
        name: of the result, so that the browser knows when it is another; "": a new one.
        editable: whether the visitor may choose and change segments.
    """
    view = scaled(view)
    height, width = view.shape[:2]
    ids, listed = segments.ids, segments.listed()
    names = labels(segments)
    if ids.shape != (height, width):
        ids = nearest(ids, height, width)
    keys, flat = np.unique(ids, return_inverse=True)
    place = {each.id: number for number, each in enumerate(listed, start=1)}
    places = np.array([place.get(int(key), 0) for key in keys], "<u2")[flat]
    return {
        "result": name or uuid.uuid4().hex,
        "picture": _data_url(view),
        "map": base64.b64encode(zlib.compress(places.tobytes(), 6)).decode(),
        "width": width,
        "height": height,
        "editable": editable,
        "undo": segments.edits > 0,
        "segments": [
            {
                "id": each.id,
                "name": each.name,
                "label": names[each.id],
                "color": list(each.color),
                "hidden": each.hidden,
                "about": f"{each.share:.1%}" + ("" if each.score is None else f", score {each.score:.2f}"),
            }
            for each in listed
        ],
    }


def edit(segments: Segments, action: str, ids: list[int], name: str = "", color: str = "") -> None:
    """Does what the viewer's event asks for.

    Raises:
        ArgumentError: an unknown action; what `Segments` refuses.
    """
    if action == "hide":
        segments.hide(ids, not all(segments[each].hidden for each in ids))
    elif action == "merge":
        segments.merge(ids)
    elif action == "recolour":
        for each in ids:
            segments.recolour(each, color)
    elif action == "rename":
        for each in ids:
            segments.rename(each, name)
    elif action == "undo":
        segments.undo()
    else:
        raise ArgumentError(f"action={action!r:.80}: hide, merge, recolour, rename or undo expected")


def _data_url(view: np.ndarray) -> str:
    buffer = io.BytesIO()
    small = view.size <= 3 * 256 * 256  # whose pixels are seen one by one
    Image.fromarray(view).save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 90}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
