"""The tab that scores a map against the truth, and shows where it is wrong."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from ldmseg_fast.app.scoring import Score, read_truth, score
from ldmseg_fast.app.tabs.examples import Example
from ldmseg_fast.app.tabs.parts import Shown, Site, path_of, picture_input, told
from ldmseg_fast.app.tabs.viewer import scaled
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.reports.draw import enlarge

SIDE = 640  # pixels of the longer side of what is shown
LAST = "The last result of the tab Segment"
UPLOADED = "A map that I upload"
PICTURE = "What the model finds in a picture that I upload"


def add(site: Site, current: gr.State, examples: list[Example]) -> None:
    """Adds the tab; `current` is the visitor's result of the tab Segment, a `Shown`."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            truth = gr.File(label="Truth: PNG with ids", file_types=["image"], height=140, elem_id="score-truth")
            source = gr.Radio([LAST, UPLOADED, PICTURE], value=LAST, label="Score what?", elem_id="score-source")
            with gr.Column(visible=False) as map_box:
                predicted = gr.File(label="Map: PNG with ids", file_types=["image"], height=140, elem_id="score-map")
            with gr.Column(visible=False) as picture_box:
                picture = picture_input("Picture", "score-picture", ("upload", "clipboard"))
            gr.Examples(
                [[PICTURE, each.picture, each.truth] for each in examples],
                [source, picture, truth],
                label="Examples: scenes with their truth",
                visible_columns=[1],
                api_visibility="private",
                elem_id="score-examples",
            )
            start = gr.Button("Score", variant="primary", elem_id="score-start")
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown("The score appears here.", elem_id="score-said", min_height=48)
            errors = gr.Image(label="Errors", height=400, buttons=[], interactive=False, elem_id="score-errors")
            gr.HTML(LEGEND)
            with gr.Row():
                true_map = gr.Image(label="Truth", buttons=[], interactive=False, elem_id="score-true-map")
                predicted_map = gr.Image(label="Scored map", buttons=[], interactive=False, elem_id="score-scored-map")
            lines = gr.Dataframe(
                headers=["segment"],
                label="Segments",
                interactive=False,
                visible=False,
                wrap=True,
                elem_id="score-lines",
            )

    def ask(source: str) -> tuple[Any, ...]:
        return gr.Column(visible=source == UPLOADED), gr.Column(visible=source == PICTURE)

    @told
    def run(
        source: str,
        truth_path: str | None,
        map_path: str | None,
        path: str | None,
        last: Shown | None,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        if truth_path is None:
            raise ArgumentError("Give the truth first: a PNG with the ids of its segments, or choose an example.")
        view, limit = None, site.worker.max_pixels
        predicted: Any
        if source == LAST:
            if last is None:
                raise ArgumentError("There is no result yet: segment a picture first, or upload a map.")
            predicted, view = last.segments.result(), last.done.view
        elif source == UPLOADED:
            if map_path is None:
                raise ArgumentError("Give the map that is to be scored.")
            predicted = read_truth(path_of(map_path), max_pixels=limit)
        else:
            if path is None:
                raise ArgumentError("Give the picture that is to be segmented and scored.")
            with site.limits.work("score", request.session_hash) as stop:
                done = site.worker.segment(path, None, stop)
            predicted, view = done.result, done.view
        found = score(predicted, read_truth(path_of(truth_path), max_pixels=limit), view)
        pictures = [enlarge(scaled(each, SIDE), SIDE) for each in (found.errors, found.truth, found.prediction)]
        rows = [[f"truth: {line}"] for line in found.segments[0]] + [[f"map: {line}"] for line in found.segments[1]]
        return _text(found), *pictures, gr.Dataframe(rows, visible=True)

    source.change(ask, source, [map_box, picture_box], queue=False, api_visibility="private")
    start.click(
        run, [source, truth, predicted, picture, current], [said, errors, true_map, predicted_map, lines], **site.heavy
    )


def _text(found: Score) -> str:
    if np.isnan(found.pq):
        return "Neither map has a segment: there is nothing to score."
    return (
        f"**PQ {found.pq:.1%}** (segmentation quality {found.sq:.1%}, recognition quality {found.rq:.1%}), without "
        f"categories\n\n{found.found} found, {found.missed} missed, {found.false} false segments"
    )


LEGEND = """<ul class="legend" aria-label="Colours of the errors">
<li><span class="viewer-swatch" style="background:rgb(230,97,0)"></span>missed</li>
<li><span class="viewer-swatch" style="background:rgb(64,150,230)"></span>false</li>
<li><span class="viewer-swatch" style="background:rgb(240,228,66)"></span>boundary: in the wrong one of a pair</li>
</ul>"""
