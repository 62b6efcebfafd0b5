"""Offers the app's work to programs: five endpoints that take and give files and JSON."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ldmseg_fast.app.exports import MAPS, safe_name
from ldmseg_fast.app.scoring import read_truth, score
from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.tabs.batch import batch_of
from ldmseg_fast.app.tabs.parts import Site, file_for_download, path_of, told
from ldmseg_fast.app.work import Segmented, Settings
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.panoptic.format import write_panoptic_png


def add(site: Site) -> None:
    """Adds the endpoints; nothing of them is seen on the page."""

    def settings_of(values: Any) -> Settings:
        if values is not None and not isinstance(values, dict):
            raise ArgumentError(f"settings={values!r:.80}: a JSON object, or null, expected")
        return Settings.of(values or {})

    @told
    def segment(picture: str, settings: Any, request: gr.Request) -> tuple[Any, ...]:
        """Segments a picture: a map (PNG, id = R + 256 G + 65536 B), an overlay, and JSON with the segments."""
        path = _given(picture, "picture")
        with site.limits.work("segment", request.session_hash) as stop:
            done = site.worker.segment(path, settings_of(settings), stop)
        return _files(site, done, path)

    @told
    def complete(
        picture: str, map: str, known: str | None, unknown_id: float | None, settings: Any, request: gr.Request
    ) -> tuple[Any, ...]:
        """Completes a map: given where `known` (a picture of two values) is bright, or where it is not unknown_id."""
        path = _given(picture, "picture")
        ids = site.worker.read_map(_given(map, "map"))
        if (known is None) == (unknown_id is None):
            raise ArgumentError("give one of known (a file) and unknown_id (a number)")
        given = ids != unknown_id if known is None else np.asarray(read_truth(path_of(known))) != 0
        with site.limits.work("complete", request.session_hash) as stop:
            done = site.worker.complete(path, ids, given, settings_of(settings), stop)
        return _files(site, done, path)

    @told
    def compare(picture: str, first: Any, second: Any, request: gr.Request) -> tuple[Any, ...]:
        """Segments a picture by two settings: both maps, a picture that is white where they agree, and JSON."""
        path = _given(picture, "picture")
        with site.limits.work("compare", request.session_hash) as stop:
            found = site.worker.compare(path, settings_of(first), settings_of(second), stop)
        maps = []
        for name, done in (("first", found.first), ("second", found.second)):
            maps.append(str(file_for_download(f"{Path(path).stem}_{name}.png")))
            write_panoptic_png(maps[-1], done.result.segmentation)
        agreement = _png(f"{Path(path).stem}_agreement.png", found.agreement.astype(np.uint8) * 255)
        numbers = {"share": found.share, "quality": found.quality}
        return *maps, agreement, numbers | {"first": _record(found.first), "second": _record(found.second)}

    @told
    def batch(files: list[str], format: str | None, settings: Any, request: gr.Request) -> tuple[Any, ...]:
        """Segments pictures, or zips of pictures: a zip of results in a format, and JSON with what was left out."""
        if not files:
            raise ArgumentError("files: give pictures, or a zip of pictures")
        result = batch_of(site, files, settings_of(settings), request.session_hash)
        try:
            kind = format or MAPS
            path = result.write(kind, file_for_download(f"results-{safe_name(kind)}.zip"))
        finally:
            shutil.rmtree(result.folder.parent, ignore_errors=True)
        numbers = {"pictures": len(result.pictures), "segments": result.segments, "left_out": result.left_out}
        return str(path), numbers | {"cancelled": result.cancelled, "seconds": result.seconds}

    @told
    def grade(truth: str, map: str) -> tuple[Any, ...]:
        """Scores a map against the truth, without categories: a picture of the errors, and JSON with PQ."""
        limit = site.worker.max_pixels
        predicted, true = (
            read_truth(_given(each, name), max_pixels=limit) for each, name in ((map, "map"), (truth, "truth"))
        )
        found = score(predicted, true)
        lines = dict(zip(("truth", "map"), found.segments))
        return _png("errors.png", found.errors), found.numbers() | {"segments": lines}

    with gr.Column(visible=False):
        _endpoint("segment", segment, [_file("picture"), _json("settings")], ["map", "overlay"], site)
        known = [_file("known"), gr.Number(None, label="unknown_id", precision=0)]
        completed = [_file("picture"), _file("map"), *known, _json("settings")]
        _endpoint("complete", complete, completed, ["map", "overlay"], site)
        both = [_file("picture"), _json("first"), _json("second")]
        _endpoint("compare", compare, both, ["first_map", "second_map", "agreement"], site)
        many = [gr.File(label="files", file_count="multiple"), gr.Textbox(MAPS, label="format"), _json("settings")]
        _endpoint("batch", batch, many, ["results"], site)
        _endpoint("score", grade, [_file("truth"), _file("map")], ["errors"], site)


def _endpoint(name: str, function: Callable[..., Any], inputs: list[Any], files: list[str], site: Site) -> None:
    """Adds an endpoint that gives files, and JSON last."""
    outputs = [*map(_file, files), gr.JSON(label="result")]
    gr.Button(visible=False).click(
        function, inputs, outputs, api_name=name, concurrency_limit=site.heavy["concurrency_limit"]
    )


def _file(label: str) -> gr.File:
    return gr.File(label=label)


def _json(label: str) -> gr.JSON:
    return gr.JSON(None, label=label)


def _given(file: Any, name: str) -> str:
    if file is None:
        raise ArgumentError(f"{name}: give a file")
    return path_of(file)


def _record(done: Segmented) -> dict[str, Any]:
    height, width = done.result.segmentation.shape
    return {
        "height": height,
        "width": width,
        "seconds": done.seconds,
        "settings": asdict(done.settings),
        "segments_info": done.result.segments_info,
    }


def _files(site: Site, done: Segmented, picture: str) -> tuple[str, str, dict[str, Any]]:
    stem = Path(picture).stem
    path = file_for_download(f"{stem}_map.png")
    write_panoptic_png(path, done.result.segmentation)
    overlay = Segments(done.result, site.worker.categories).overlay(done.view)
    return str(path), _png(f"{stem}_overlay.png", overlay), _record(done)


def _png(name: str, pixels: np.ndarray) -> str:
    path = file_for_download(name)
    Image.fromarray(pixels).save(path)
    return str(path)
