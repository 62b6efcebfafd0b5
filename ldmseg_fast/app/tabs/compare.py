"""The tab that segments one picture by two settings, or on two backends, and shows where the maps agree."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.tabs.examples import Example
from ldmseg_fast.app.tabs.parts import SettingsInputs, Site, facts, picture_or_example, settings_of, stop_button, told
from ldmseg_fast.app.tabs.viewer import scaled
from ldmseg_fast.app.work import Segmented
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.reports.draw import enlarge
from ldmseg_fast.reports.error_entry import nearest

SIDE = 768  # pixels of the longer side of what is shown
_AGREE, _DIFFER = (38, 120, 178), (230, 159, 0)  # told apart with any kind of colour vision


def add(site: Site, examples: list[Example]) -> None:
    """Adds the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = picture_or_example("compare", examples)
            with gr.Accordion("First settings", open=False, elem_id="compare-first"):
                first = SettingsInputs(site.worker, "compare-first", site.max_size)
            with gr.Accordion("Second settings", open=True, elem_id="compare-second"):
                second = SettingsInputs(site.worker, "compare-second", site.max_size, seed=1)
            with gr.Row():
                start = gr.Button("Compare", variant="primary", elem_id="compare-start", scale=3, min_width=120)
                stop = stop_button("compare-stop")
        with gr.Column(scale=3, min_width=300):
            both = gr.ImageSlider(
                label="First (left) and second (right)", buttons=[], max_height=560, elem_id="compare-slider"
            )
            divider = gr.Slider(
                0, 100, 50, step=1, label="Divider, in percent from the left", elem_id="compare-divider"
            )
            said = gr.Markdown(elem_id="compare-said", min_height=48)
            agreement = gr.Image(
                label="Agreement: blue where both maps have the same segment, orange where not",
                buttons=[],
                interactive=False,
                height=420,
                elem_id="compare-agreement",
            )

    @told
    def compare(path: str | None, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        if path is None:
            raise ArgumentError("Give a picture first: drop, paste or take one, or choose an example.")
        half = len(values) // 2
        with site.limits.work("compare", request.session_hash) as stop:
            found = site.worker.compare(path, settings_of(*values[:half]), settings_of(*values[half:]), stop)
        pictures, numbers = zip(*(_drawn(each, site.worker.categories) for each in (found.first, found.second)))
        line = (
            f"The maps agree on **{found.share:.1%}** of the pixels; panoptic quality of one against the other "
            f"**{found.quality:.1%}**.\n\n"
            f"- First: {facts(found.first, numbers[0])}\n- Second: {facts(found.second, numbers[1])}"
        )
        return pictures, line, _agreement(found.agreement, found.first.view)

    inputs = [picture, *first.inputs, *second.inputs]
    site.ends(stop, start.click(compare, inputs, [both, said, agreement], show_progress_on=said, **site.heavy))
    divider.input(
        lambda place: gr.ImageSlider(slider_position=place), divider, both, show_progress="hidden", queue=False,
        api_visibility="private",
    )  # fmt: skip


def _drawn(done: Segmented, categories: list[dict[str, Any]]) -> tuple[np.ndarray, int]:
    segments = Segments(done.result, categories)
    return segments.overlay(enlarge(scaled(done.view, SIDE), SIDE)), len(segments)


def _agreement(agreement: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Tints a picture by where two maps agree, uint8 [h, w, 3]."""
    view = enlarge(scaled(view, SIDE), SIDE)
    agree = nearest(agreement, *view.shape[:2])[..., None]
    grey = view.mean(-1, keepdims=True)
    return np.rint(0.4 * grey + 0.6 * np.where(agree, _AGREE, _DIFFER)).astype(np.uint8)
