"""Adds the HTTP API: functions with fixed names and JSON, for `gradio_client` and curl. docs/app.md documents them."""

import functools
import json
import logging
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import numpy as np
from gradio.context import LocalContext
from gradio.utils import get_upload_folder
from PIL import Image

from ldmseg_fast.app.batch import run_batch, unpack
from ldmseg_fast.app.exports import MAPS, check_kind, safe_name
from ldmseg_fast.app.limits import Limits
from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.work import Segmented, Settings, Worker
from ldmseg_fast.data.masks import read_mask
from ldmseg_fast.errors import ArgumentError, UserError
from ldmseg_fast.files import real_path
from ldmseg_fast.inference.inputs import check_count
from ldmseg_fast.panoptic.annotations import has_surrogates
from ldmseg_fast.panoptic.format import MAX_ID, write_panoptic_png
from ldmseg_fast.panoptic.results import PanopticResult

NAMES = ("segment", "complete", "compare", "score", "batch")
NOBODY = gr.Request()  # gradio gives the request itself in its place
FAULT = "the app met a fault of its own, which its log holds: try again, or with another picture"
_log = logging.getLogger(__name__)


def add(worker: Worker, limits: Limits) -> None:
    """Adds the functions to the `gr.Blocks` in whose `with` block this is called."""
    api = _Api(worker, limits)
    for name in NAMES:
        # a batch goes on beside single pictures, which have their turn between two of its own
        gr.api(
            getattr(api, name),
            api_name=name,
            concurrency_id="batch" if name == "batch" else "work",
            concurrency_limit=2 if name == "batch" else 1,
        )


class _Api:
    """Holds the functions. Their parameters' names and order, and what they return, are part of the API."""

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self.worker, self.limits = worker, limits
        for name in NAMES:
            setattr(self, name, _told(getattr(self, name)))

    def segment(
        self, picture: gr.FileData, settings: dict | None = None, request: gr.Request = NOBODY
    ) -> tuple[dict, gr.FileData, gr.FileData]:
        """Segments a picture. Returns what was found (JSON), the map (PNG of ids) and an overlay (PNG)."""
        path = upload_of(picture, "picture")
        with self._work("segment", request) as stop:
            done = self.worker.segment(path, _settings(settings), stop)
            return self._files(done, path)

    def complete(
        self,
        picture: gr.FileData,
        map: gr.FileData,
        known: gr.FileData | None = None,
        settings: dict | None = None,
        unknown_id: int | None = None,
        request: gr.Request = NOBODY,
    ) -> tuple[dict, gr.FileData, gr.FileData]:
        """Completes a map, given where the mask `known` is white or where it lacks an id. Returns as `segment` does."""
        path, map_path = upload_of(picture, "picture"), upload_of(map, "map")
        if (known is None) == (unknown_id is None):
            raise ArgumentError("give one of known, a mask, and unknown_id, a number")
        if unknown_id is not None:
            check_count("unknown_id", unknown_id, 0, MAX_ID)
        with self._work("complete", request) as stop:
            ids = self.worker.read_map(map_path)
            given = ids != unknown_id
            if known is not None:
                given = read_mask(upload_of(known, "known"), max_pixels=self.worker.max_pixels)
            done = self.worker.complete(path, ids, given, _settings(settings), stop)
            return self._files(done, path)

    def compare(
        self, picture: gr.FileData, first: dict, second: dict, request: gr.Request = NOBODY
    ) -> tuple[dict, gr.FileData, gr.FileData, gr.FileData]:
        """Compares two settings. Returns JSON, both maps (PNG) and the agreement (PNG, white where they agree)."""
        path = upload_of(picture, "picture")
        with self._work("compare", request) as stop:
            found = self.worker.compare(path, _settings(first), _settings(second), stop)
            folder, stem = _folder(), Path(safe_name(path.name)).stem
            maps = []
            for number, each in enumerate((found.first, found.second), 1):
                maps.append(folder / f"{stem}-{number}.png")
                write_panoptic_png(maps[-1], each.result.segmentation)
            Image.fromarray(found.agreement).save(folder / f"{stem}-agreement.png")
            described = {
                "agreement": found.share,
                "quality": found.quality,
                "first": described_result(found.first),
                "second": described_result(found.second),
            }
            return described, *(_file(each) for each in (*maps, folder / f"{stem}-agreement.png"))  # type: ignore[return-value]

    def score(self, map: gr.FileData, truth: gr.FileData, request: gr.Request = NOBODY) -> tuple[dict, gr.FileData]:
        """Scores a map against the truth, both PNG. Returns PQ, SQ, RQ and counts (JSON), and the errors (PNG)."""
        map_path, truth_path = upload_of(map, "map"), upload_of(truth, "truth")
        with self._work("score", request):
            found = self.worker.score(self.worker.read_map(map_path), truth_path)
            path = _folder() / f"{Path(safe_name(map_path.name)).stem}-errors.png"
            Image.fromarray(found.errors).save(path)
            return found.numbers(), _file(path)

    def batch(
        self, files: list[gr.FileData], settings: dict | None = None, format: str = MAPS, request: gr.Request = NOBODY
    ) -> tuple[dict, gr.FileData]:
        """Segments pictures and zips of them. Returns counts and what was left out (JSON), and the results (zip)."""
        if files is not None and not isinstance(files, list):
            raise ArgumentError(f"files: {type(files).__name__}; a list of uploaded files expected")
        paths = [upload_of(each, f"files[{place}]") for place, each in enumerate(files or [])]
        check_kind(format or MAPS, cityscapes=self.worker.info.categories is not None)
        with self._work("batch", request) as stop, tempfile.TemporaryDirectory(dir=get_upload_folder()) as held:
            pictures, out = Path(held) / "pictures", Path(held) / "results"
            pictures.mkdir()
            out.mkdir()
            done = run_batch(self.worker, unpack(paths, pictures, self.limits), out, _settings(settings), stop)
            described = {
                "pictures": len(done.pictures),
                "segments": done.segments,
                "seconds": done.seconds,
                "left_out": done.left_out,
            }
            return described, _file(done.write(format or MAPS, _folder() / f"results-{safe_name(format or MAPS)}.zip"))

    def _work(self, kind: str, request: gr.Request) -> Any:
        return self.limits.work(kind, request.session_hash, LocalContext.event_id.get())

    def _files(self, done: Segmented, picture: Path) -> tuple[dict, Any, Any]:
        folder, stem = _folder(), Path(safe_name(picture.name)).stem
        write_panoptic_png(folder / f"{stem}.png", done.result.segmentation)
        drawn = Segments(done.result, self.worker.categories).overlay(done.view)
        Image.fromarray(drawn).save(folder / f"{stem}_overlay.png")
        return described_result(done), _file(folder / f"{stem}.png"), _file(folder / f"{stem}_overlay.png")


def described_result(done: Segmented) -> dict[str, Any]:
    """Describes a result as JSON: `height`, `width`, `seconds`, `settings` and `segments_info`."""
    height, width = done.result.segmentation.shape
    return {
        "height": height,
        "width": width,
        "seconds": done.seconds,
        "settings": vars(done.settings),
        "segments_info": _plain(done.result),
    }


def upload_of(value: Any, name: str) -> Path:
    """Returns the path of an uploaded file.

    Args:
        value: a file as gradio's API has it, {"path": ...}.
        name: of the parameter, for the error.

    Raises:
        ArgumentError: no file, or one that was not uploaded here.
    """
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    if not isinstance(path, str) or not path or "\0" in path or has_surrogates(path):
        raise ArgumentError(f"{name}: a file expected: upload it first")
    real = real_path(path)
    if not real.is_relative_to(real_path(get_upload_folder())) or not real.is_file():
        raise ArgumentError(f"{name}: no such upload, or it was dropped after some time: upload the file again")
    return real


def one_line(error: BaseException) -> str:
    """Writes an error as one line; of an uploaded file only its own name is told."""
    text = str(error)
    for folder in dict.fromkeys((str(real_path(get_upload_folder())), get_upload_folder())):
        while (start := text.find(folder)) >= 0:
            rest = text[start + len(folder) :].lstrip("/")
            first, slash, after = rest.partition("/")
            text = text[:start] + (after if slash and " " not in first else rest)
    return " ".join(text.split())


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns errors into one line for the caller; the traceback of a fault of ours goes to the log."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise gr.Error(one_line(error), print_exception=False) from None
        except Exception:
            _log.exception("a request of the API")
            raise gr.Error(FAULT, print_exception=False) from None

    return run


def _settings(values: Any) -> Settings:
    if values is not None and not isinstance(values, dict):
        raise ArgumentError(f"settings={values!r:.80}: a JSON object expected, such as {{}}")
    return Settings.of(values or {})


def _folder() -> Path:
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return folder


def _file(path: Path) -> Any:
    """Describes a file as `gr.FileData` does; gradio puts the server's address before the path of `url`."""
    meta = {"_type": "gradio.FileData"}
    return {"path": str(path), "url": f"/gradio_api/file={quote(str(path))}", "orig_name": path.name, "meta": meta}


def _plain(result: PanopticResult) -> list[dict[str, Any]]:
    return json.loads(json.dumps(result.segments_info, default=lambda value: np.asarray(value).tolist()))
