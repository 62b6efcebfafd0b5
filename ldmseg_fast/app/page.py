"""Builds the page of the app: five tabs around one model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from ldmseg_fast.app.limits import Limits
from ldmseg_fast.app.tabs import batch, compare, complete, score, segment
from ldmseg_fast.app.tabs.examples import write_examples
from ldmseg_fast.app.tabs.parts import Site
from ldmseg_fast.app.work import Worker
from ldmseg_fast.checkpoints.hub_names import shown_name

TITLE = "ldmseg_fast: panoptic segmentation"
_FOLDER = Path(__file__).parent
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")


def look() -> dict[str, Any]:
    """Returns the arguments of `launch` and `mount_gradio_app` that make the page's look; nothing in it is fetched."""
    theme = gr.themes.Default(
        primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=_FONT, font_mono=_MONO
    )
    theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_cancel_background_fill=gr.themes.colors.red.c700,
        button_cancel_background_fill_hover=gr.themes.colors.red.c800,
        button_cancel_background_fill_dark=gr.themes.colors.red.c700,
        button_cancel_background_fill_hover_dark=gr.themes.colors.red.c800,
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
    return {
        "theme": theme,
        "css_paths": [_FOLDER / "page.css"],
        "js": (_FOLDER / "page.js").read_text(encoding="utf-8"),
        "footer_links": [],
        "run_history": False,
    }


def build(worker: Worker, limits: Limits | None = None, keep_state: float = 1800) -> gr.Blocks:
    """Builds the page.

    Args:
        worker: of all visitors.
        limits: of a request.
        keep_state: seconds after which a visitor's last result is dropped.
    """
    site = Site(worker, limits or Limits(), keep_state)
    folder = tempfile.TemporaryDirectory(prefix="ldmseg-examples-")
    examples = write_examples(Path(folder.name))
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# Panoptic segmentation\nModel **{shown_name(worker.info.folder)}**, on this machine.")
        if worker.keep is not None:
            gr.Markdown("Who runs this app keeps the pictures and maps of its visitors.", elem_id="kept")
        current = gr.State(None, time_to_live=keep_state)
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Segment", id="segment"):
                segment.add(site, current, examples)
            with gr.Tab("Complete", id="complete"):
                complete.add(site, current, examples)
            with gr.Tab("Compare", id="compare"):
                compare.add(site, examples)
            with gr.Tab("Batch", id="batch"):
                batch.add(site)
            with gr.Tab("Score", id="score"):
                score.add(site, current, examples)
    page.examples_folder = folder  # lives as long as the page
    return page
