"""The tab that segments one picture, and lets the visitor change and download the result."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import gradio as gr

from ldmseg_fast.app.exports import MAPS, Exported, write_zip
from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.tabs.examples import Example
from ldmseg_fast.app.tabs.parts import (
    SettingsInputs,
    Shown,
    Site,
    facts,
    file_for_download,
    keep_upload,
    picture_or_example,
    settings_of,
    stop_button,
    told,
)
from ldmseg_fast.app.tabs.viewer import edit, view_of, viewer
from ldmseg_fast.errors import ArgumentError

GONE = "There is no result, or it was dropped after some time: press Segment first."


def add(site: Site, current: gr.State, examples: list[Example]) -> None:
    """Adds the tab; `current` gets the visitor's result, a `Shown`."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = picture_or_example("segment", examples)
            with gr.Accordion("Settings: steps, size, seed, thresholds", open=False, elem_id="segment-settings"):
                settings = SettingsInputs(site.worker, "segment", site.max_size)
            with gr.Row():
                start = gr.Button("Segment", variant="primary", elem_id="segment-start", scale=3, min_width=120)
                stop = stop_button("segment-stop")
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown("Time and segments appear here.", elem_id="segment-facts", min_height=48)
            view = viewer("Segments", "segment-view")
            with gr.Row(elem_classes="in-line"):
                kind = gr.Dropdown(site.kinds, value=MAPS, label="Format", elem_id="segment-format", min_width=240)
                make = gr.Button("Make download", elem_id="segment-make", min_width=120)
            download = gr.File(label="Download", visible=False, elem_id="segment-download")

    @told
    def segment(path: str | None, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        if path is None:
            raise ArgumentError("Give a picture first: drop, paste or take one, or choose an example.")
        with site.limits.work("segment", request.session_hash) as stop:
            done = site.worker.segment(path, settings_of(*values), stop)
        segments = Segments(done.result, site.worker.categories)
        shown = Shown(path, done, segments, uuid.uuid4().hex)
        return shown, view_of(segments, done.view, shown.name), facts(done, len(segments)), gr.File(visible=False)

    @told
    def change(shown: Shown | None, event: gr.EventData) -> tuple[Any, ...]:
        if shown is None:
            raise ArgumentError(GONE)
        keep_upload(shown.picture)
        edit(shown.segments, event.action, event.ids, event.name, event.color)
        return (
            shown,
            view_of(shown.segments, shown.done.view, shown.name),
            facts(shown.done, len(shown.segments)),
            gr.File(visible=False),
        )

    @told
    def write(shown: Shown | None, kind: str) -> Any:
        if shown is None:
            raise ArgumentError(GONE)
        path = Path(shown.picture)
        item = Exported.of(path.name, path, shown.segments, shown.done.view, shown.done.orientation)
        out = file_for_download(f"{path.stem}-{kind}.zip")
        return gr.File(str(write_zip([item], kind, shown.segments.categories(), out)), visible=True)

    outputs = [current, view, said, download]
    site.ends(stop, start.click(segment, [picture, *settings.inputs], outputs, show_progress_on=said, **site.heavy))
    view.edit(change, [current], outputs, show_progress="hidden", **site.every_press)
    make.click(write, [current, kind], download, trigger_mode="always_last", **site.light)
