"""The tab that completes a map: the visitor brushes parts away or paints segments, and the model finds the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ldmseg_fast.app.exports import MAPS, Exported, write_zip
from ldmseg_fast.app.scoring import read_truth
from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.tabs.brush import FORGET, KEEP, Brush, brushes_of, canvas_of, legend, painted
from ldmseg_fast.app.tabs.examples import Example
from ldmseg_fast.app.tabs.parts import (
    SettingsInputs,
    Shown,
    Site,
    facts,
    file_for_download,
    keep_upload,
    path_of,
    picture_input,
    settings_of,
    stop_button,
    told,
)
from ldmseg_fast.app.tabs.viewer import labels, view_of, viewer
from ldmseg_fast.app.work import view_of as picture_view
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes

GONE = "There is no map, or it was dropped after some time: take one over, or load one."
_UNDO, _BYTES = 20, 2**28  # maps that are remembered at most, and their bytes


@dataclass
class Work:
    """Holds a map that a visitor completes.

    Attributes:
        picture: path of the upload.
        view: the picture, uint8 [h, w, 3].
        orientation: EXIF orientation of the file, 1 to 8.
        maps: the map and those before it.
        brushes: of the newest map.
    """

    picture: str
    view: np.ndarray
    orientation: int
    maps: list[Segments]
    brushes: list[Brush] = field(default_factory=list)


def add(site: Site, current: gr.State, examples: list[Example]) -> None:
    """Adds the tab; `current` is the visitor's result of the tab Segment, a `Shown`."""
    work = gr.State(None, time_to_live=site.keep_state)
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            take = gr.Button("Take over the result of Segment", elem_id="complete-take")
            with gr.Accordion("Or load a picture and a map", open=True, elem_id="complete-load-box") as box:
                with gr.Row():
                    picture = picture_input("Picture", "complete-picture", ("upload", "clipboard"))
                    truth = gr.File(label="Map: PNG with ids", file_types=[".png"], elem_id="complete-map", height=300)
                gr.Examples(
                    [[each.picture, each.truth] for each in examples],
                    [picture, truth],
                    label="Examples: scenes with their maps",
                    visible_columns=[0],
                    api_visibility="private",
                    elem_id="complete-examples",
                )
                load = gr.Button("Load this map", elem_id="complete-load")
            editor = gr.ImageEditor(
                label="Map: paint over it",
                type="numpy",
                image_mode="RGBA",
                sources=[],
                transforms=[],
                layers=False,
                buttons=[],
                brush=gr.Brush(default_size=24, colors=["#000000"], color_mode="fixed"),
                eraser=gr.Eraser(default_size=24),
                format="png",
                height=520,
                elem_id="complete-editor",
                visible=False,
            )
            colors = gr.HTML("", elem_id="complete-legend")
        with gr.Column(scale=2, min_width=300):
            forget = gr.Dropdown(
                [], multiselect=True, label="Whole segments to forget (no brush needed)", elem_id="complete-forget"
            )
            with gr.Accordion("Settings: steps, size, seed, thresholds", open=False):
                settings = SettingsInputs(site.worker, "complete", site.max_size)
            with gr.Row():
                start = gr.Button("Complete", variant="primary", elem_id="complete-start", min_width=120)
                undo = gr.Button("Undo", elem_id="complete-undo", min_width=80)
                stop = stop_button("complete-stop")
            said = gr.Markdown(
                "Brush away what the model shall find anew, then press Complete.", elem_id="complete-said"
            )
            view = viewer("Completed map", "complete-view")
            with gr.Row(elem_classes="in-line"):
                kind = gr.Dropdown(site.kinds, value=MAPS, label="Format", elem_id="complete-format", min_width=240)
                make = gr.Button("Make download", elem_id="complete-make", min_width=120)
            download = gr.File(label="Download", visible=False, elem_id="complete-download")

    blank: dict[str, Any] = {"iscrowd": 0}  # of segments of which nothing but the pixels is known
    if site.worker.info.categories is None:
        blank |= {"category_id": 1, "label_id": 1, "isthing": True, "was_fused": False}

    def shown(doing: Work, line: str) -> tuple[Any, ...]:
        keep_upload(doing.picture)
        segments = doing.maps[-1]
        doing.brushes = brushes_of(segments)
        canvas = canvas_of(segments, doing.view)
        tools = gr.Brush(
            default_size=max(canvas.shape[:2]) // 20,
            colors=[brush.hex for brush in doing.brushes],
            default_color=doing.brushes[0].hex,
            color_mode="fixed",
        )
        names = labels(segments)
        return (
            doing,
            gr.ImageEditor({"background": canvas, "layers": [], "composite": None}, brush=tools, visible=True),
            legend(doing.brushes),
            gr.Dropdown([(name, key) for key, name in names.items()], value=[]),
            view_of(segments, doing.view, editable=False),
            line,
            gr.Accordion(open=False),
            gr.File(visible=False),
        )

    @told
    def take_over(result: Shown | None) -> tuple[Any, ...]:
        if result is None:
            raise ArgumentError("There is no result yet: segment a picture in the tab Segment first.")
        kept = result.segments.result(hidden=True)
        segments = Segments(kept, result.segments.categories())
        doing = Work(result.picture, result.done.view, result.done.orientation, [segments])
        return shown(doing, f"The map has {len(segments)} segments. Paint over it, then press Complete.")

    @told
    def read(path: str | None, map_path: str | None) -> tuple[Any, ...]:
        if path is None or map_path is None:
            raise ArgumentError("Give a picture and its map, or choose an example.")
        found = site.worker.read(path)
        ids = read_truth(path_of(map_path), max_pixels=site.worker.max_pixels)
        if ids.shape != found.size:
            raise ArgumentError(
                f"the map has {ids.shape[1]} x {ids.shape[0]} pixels, the picture {found.size[1]} x {found.size[0]}: "
                "give a map of the picture's size"
            )
        result = PanopticResult(ids, [blank | shape for shape in segment_shapes(ids)])
        segments = Segments(result, site.worker.categories)
        doing = Work(path, picture_view(found), found.orientation, [segments])
        return shown(doing, f"The map has {len(segments)} segments. Paint over it, then press Complete.")

    @told
    def complete(
        doing: Work | None, edited: dict[str, Any] | None, forgotten: list[int], request: gr.Request, *values: Any
    ) -> tuple[Any, ...]:
        if doing is None:
            raise ArgumentError(GONE)
        before = doing.maps[-1]
        ids = before.ids.copy()
        codes = painted((edited or {}).get("layers") or [], doing.brushes, *ids.shape)
        known = codes != FORGET
        if forgotten:
            known &= ~(np.isin(ids, forgotten) & (codes == KEEP))
        ids[codes > 0] = codes[codes > 0]
        given = before.result(hidden=True)
        names = {entry["id"]: entry for entry in given.segments_info}
        if known.all() and (codes > 0).any():  # all is painted, so nothing is left for the model
            result = PanopticResult(ids, [names.get(shape["id"], blank) | shape for shape in segment_shapes(ids)])
            line = "The strokes are in the map. Nothing was brushed away, so the model had nothing to find."
        else:
            with site.limits.work("complete", request.session_hash) as stop:
                done = site.worker.complete(
                    doing.picture, ids, known, settings_of(*values), stop, segments_info=given.segments_info
                )
            result = done.result
            for entry in result.segments_info:
                entry |= {key: value for key, value in names.get(entry["id"], {}).items() if key in ("name", "color")}
            line = f"{facts(done, len(result.segments_info))}\n\n{(~known).mean():.1%} of the pixels were completed; "
            line += "the others are as they were."
        remembered = max(1, min(_UNDO, _BYTES // ids.nbytes))
        doing.maps = [*doing.maps[-remembered:], Segments(result, before.categories())]
        return shown(doing, line)

    @told
    def take_back(doing: Work | None) -> tuple[Any, ...]:
        if doing is None:
            raise ArgumentError(GONE)
        line = "The strokes are gone; there was no completion to take back."
        if len(doing.maps) > 1:
            doing.maps.pop()
            line = "The last completion is taken back."
        return shown(doing, line)

    @told
    def write(doing: Work | None, kind: str) -> Any:
        if doing is None:
            raise ArgumentError(GONE)
        path, segments = Path(doing.picture), doing.maps[-1]
        item = Exported.of(path.name, path, segments, doing.view, doing.orientation)
        out = file_for_download(f"{path.stem}-completed-{kind}.zip")
        return gr.File(str(write_zip([item], kind, segments.categories(), out)), visible=True)

    outputs = [work, editor, colors, forget, view, said, box, download]
    take.click(take_over, [current], outputs, show_progress_on=said, **site.light)
    load.click(read, [picture, truth], outputs, show_progress_on=said, **site.light)
    inputs = [work, editor, forget, *settings.inputs]
    site.ends(stop, start.click(complete, inputs, outputs, show_progress_on=said, **site.heavy))
    undo.click(take_back, [work], outputs, show_progress_on=said, **site.every_press)
    make.click(write, [work, kind], download, trigger_mode="always_last", **site.light)
