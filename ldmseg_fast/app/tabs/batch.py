"""The tab that segments many pictures: files, a folder or a zip in, one zip of results out."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from ldmseg_fast.app.batch import BatchResult, run_batch, unpack
from ldmseg_fast.app.exports import MAPS
from ldmseg_fast.app.tabs.parts import SettingsInputs, Site, file_for_download, path_of, settings_of, stop_button, told
from ldmseg_fast.data.picture_folders import picture_suffixes
from ldmseg_fast.errors import ArgumentError

_LINES = 20  # of pictures left out that are shown; the download has all


def add(site: Site) -> None:
    """Adds the tab."""
    found = gr.State(None, time_to_live=site.keep_state, delete_callback=_remove)
    endings = [".zip", *sorted(picture_suffixes())]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            files = gr.File(
                label=f"Pictures, or zips of pictures; at most {site.limits.batch}",
                file_count="multiple",
                file_types=endings,
                height=240,
                elem_id="batch-files",
            )
            folder = gr.UploadButton(
                "Add a folder of pictures", file_count="directory", elem_id="batch-folder", variant="secondary"
            )
            with gr.Accordion("Settings: steps, size, seed, thresholds", open=False, elem_id="batch-settings"):
                settings = SettingsInputs(site.worker, "batch", site.max_size)
            with gr.Row():
                start = gr.Button("Segment all", variant="primary", elem_id="batch-start", scale=3, min_width=120)
                stop = stop_button("batch-stop")
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown(
                "Progress appears here. Stop keeps what is done.", elem_id="batch-said", min_height=120, container=True
            )
            with gr.Row(elem_classes="in-line"):
                kind = gr.Dropdown(site.kinds, value=MAPS, label="Format", elem_id="batch-format", min_width=240)
                make = gr.Button("Make download", elem_id="batch-make", min_width=120)
            download = gr.File(label="Download", visible=False, elem_id="batch-download")

    @told
    def gather(before: list[str] | None, more: list[str] | None) -> list[str]:
        chosen = [path_of(each) for each in more or [] if Path(path_of(each)).suffix.lower() in endings]
        if not chosen:
            raise ArgumentError("No picture is in this folder.")
        return [*map(path_of, before or []), *chosen]

    @told
    def run(
        paths: list[str] | None,
        before: BatchResult | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio gives each event its own
        *values: Any,
    ) -> tuple[Any, ...]:
        if not paths:
            raise ArgumentError("Give pictures first: drop files or a zip, or add a folder.")
        _remove(before)
        result = batch_of(site, paths, settings_of(*values), request.session_hash, progress)
        return result, text_of(result), gr.File(visible=False)

    @told
    def write(result: BatchResult | None, kind: str) -> Any:
        if result is None:
            raise ArgumentError("There are no results, or they were dropped after some time: press Segment all first.")
        return gr.File(str(result.write(kind, file_for_download(f"results-{kind}.zip"))), visible=True)

    folder.upload(gather, [files, folder], files, **site.light)
    start.click(run, [files, found, *settings.inputs], [found, said, download], show_progress_on=said, **site.batch)
    site.ends(stop)
    make.click(write, [found, kind], download, **site.light)


def batch_of(
    site: Site, paths: list[str], settings: Any, visitor: str | None, progress: gr.Progress | None = None
) -> BatchResult:
    """Segments uploads into a new folder, which belongs to the caller.

    Raises:
        UserError: see `unpack` and `run_batch`.
    """
    folder = Path(tempfile.mkdtemp(prefix="ldmseg-batch-"))
    pictures, results = folder / "pictures", folder / "results"
    try:
        pictures.mkdir()
        results.mkdir()
        with site.limits.work("batch", visitor) as stop:
            members = unpack([path_of(each) for each in paths], pictures, site.limits)

            def tell(done: int, total: int, name: str) -> None:
                if progress is not None:
                    progress((done, total), desc=name or "done", unit="pictures")

            return run_batch(site.worker, members, results, settings, stop, tell)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def text_of(result: BatchResult) -> str:
    """Writes what became of a batch."""
    count = len(result.pictures)
    line = f"**{count} picture{'s' * (count != 1)}**, **{result.segments} segments** in {result.seconds:.1f} s"
    line += " - stopped before the last" if result.cancelled else ""
    if result.left_out:
        lines = "\n".join(f"- `{each.replace('`', ' ')}`" for each in result.left_out[:_LINES])
        rest = len(result.left_out) - _LINES
        line += f"\n\nLeft out:\n\n{lines}" + (f"\n- and {rest} more" if rest > 0 else "")
    return line


def _remove(result: BatchResult | None) -> None:
    """Removes a visitor's batch from the disk."""
    if result is not None:
        shutil.rmtree(result.folder.parent, ignore_errors=True)
