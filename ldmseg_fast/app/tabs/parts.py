"""Holds what the tabs share: controls of settings, the picture's input, a visitor's result, errors of one line."""

from __future__ import annotations

import contextlib
import functools
import html
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.utils import get_upload_folder

from ldmseg_fast.app.api import FAULT, one_line
from ldmseg_fast.app.exports import CITYSCAPES, EXPORTS, MAPS, safe_name
from ldmseg_fast.app.limits import Cancelled, Limits
from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.tabs.examples import Example
from ldmseg_fast.app.work import Segmented, Settings, Worker
from ldmseg_fast.diffusion.solvers import SOLVERS
from ldmseg_fast.errors import UserError
from ldmseg_fast.formats.kinds import KINDS

_TITLES = {MAPS: "Maps: PNG and JSON"}
_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass
class Shown:
    """Holds a visitor's last result.

    Attributes:
        picture: path of the upload.
        done: what the worker gave.
        segments: the result with the visitor's edits.
        name: of the result, for the viewer.
    """

    picture: str
    done: Segmented
    segments: Segments
    name: str


class Site:
    """Holds what every tab needs: the worker, the bounds of a request, and how events run.

    Args:
        worker: of all visitors.
        limits: of a request.
        keep_state: seconds after which what a visitor has made is dropped.
    """

    def __init__(self, worker: Worker, limits: Limits, keep_state: float) -> None:
        self.worker, self.limits, self.keep_state = worker, limits, keep_state
        self.max_size = 4 * worker.info.image_size
        names = [*EXPORTS, *([] if worker.info.categories is None else [CITYSCAPES])]
        self.kinds = [(_TITLES.get(name) or KINDS[name].title, name) for name in names]
        # one piece of work at a time, in the order of the queue; a batch takes turns with it
        self.heavy: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "work", "concurrency_limit": 1}
        self.batch: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "batch", "concurrency_limit": 2}
        self.light: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}
        # A press while the event still runs is dropped by Gradio's default. An event runs until all its outputs are
        # shown, and the editor takes a second for a map: presses that change a map count each, in their order.
        self.every_press = self.light | {"concurrency_limit": 1, "trigger_mode": "multiple"}

    def ends(self, button: gr.Button, event: Any = None) -> None:
        """Makes a button end the visitor's work.

        Args:
            button: that the visitor presses.
            event: one that leaves the queue too, and whose result is dropped.
        """

        def end(request: gr.Request) -> None:
            ended = self.limits.cancel(request.session_hash or "")
            if event is None and not ended:
                gr.Info("Nothing is running.")

        cancels = None if event is None else [event]
        button.click(end, None, None, cancels=cancels, queue=False, api_visibility="private")


def stop_button(elem_id: str) -> gr.Button:
    """Makes the button for `Site.ends`."""
    return gr.Button("Stop", variant="stop", elem_id=elem_id, min_width=80)


def path_of(file: Any) -> str:
    """Returns the path of an upload as `gr.File` gives it."""
    return str(getattr(file, "name", file))


def keep_upload(path: str) -> None:
    """Lets an upload that is worked with become as old as a new one, before the server deletes it."""
    with contextlib.suppress(OSError):
        os.utime(path)


def file_for_download(name: str) -> Path:
    """Returns a path in a new folder of the uploads, which the server clears."""
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return folder / safe_name(name)


def told(function: _Function) -> _Function:
    """Shows the errors of an event on the page, each as one line; the traceback of a fault goes to the log."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Cancelled as error:
            raise gr.Error(html.escape(one_line(error)), duration=10, title="Stopped", print_exception=False) from None
        except UserError as error:
            raise gr.Error(html.escape(one_line(error)), duration=30, print_exception=False) from None
        except OSError as error:
            _log.exception("an event of the page")
            raise gr.Error(html.escape(one_line(error)), duration=30, print_exception=False) from None
        except Exception:
            _log.exception("an event of the page")
            raise gr.Error(FAULT, duration=30, print_exception=False) from None

    return run  # type: ignore[return-value]


def picture_input(label: str, elem_id: str, sources: tuple[str, ...] = ("upload", "clipboard", "webcam")) -> gr.Image:
    """Makes an input for a picture whose value is the uploaded file's path, whatever is in the file.

    Gradio opens an upload before the event sees it, and tells nothing of one that it cannot open.
    """
    picture = gr.Image(
        label=label,
        sources=list(sources),  # type: ignore[arg-type]
        type="filepath",
        buttons=[],
        height=300,
        elem_id=elem_id,
    )
    picture.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return picture


def picture_or_example(tab: str, examples: Sequence[Example]) -> gr.Image:
    """Makes a tab's `picture_input` above the examples that can stand in for a picture."""
    picture = picture_input("Picture: drop, paste or take one", f"{tab}-picture")
    gr.Examples(
        [[each.picture] for each in examples],
        picture,
        label="Examples: generated scenes",
        api_visibility="private",
        elem_id=f"{tab}-examples",
    )
    return picture


class SettingsInputs:
    """Makes the controls of `Settings`, with the model's own values.

    Args:
        worker: whose model and backends they are for.
        elem_id: begins the controls' ids.
        max_size: the largest size, in pixels.
    """

    def __init__(self, worker: Worker, elem_id: str, max_size: int, seed: int = 0) -> None:
        info, own = worker.info, worker.filled()
        multiple = info.size_multiple
        self.backend = gr.Dropdown(
            list(worker.backends),
            value=worker.backends[0],
            label="Backend",
            visible=len(worker.backends) > 1,
            elem_id=f"{elem_id}-backend",
        )
        with gr.Row():
            self.steps = gr.Slider(1, 100, own.steps, step=1, label="Steps", elem_id=f"{elem_id}-steps")
            self.size = gr.Slider(
                multiple, max(max_size // multiple * multiple, info.image_size), own.size, step=multiple,
                label="Network size (pixels)", elem_id=f"{elem_id}-size",
            )  # fmt: skip
        with gr.Row():
            self.seed = gr.Number(seed, label="Seed", precision=0, minimum=0, elem_id=f"{elem_id}-seed")
            self.solver = gr.Dropdown(list(SOLVERS), value=own.solver, label="Solver", elem_id=f"{elem_id}-solver")
        with gr.Row():
            self.mask = gr.Slider(
                0, 1, own.mask_threshold, step=0.01, label="Mask threshold", elem_id=f"{elem_id}-mask"
            )
            self.overlap = gr.Slider(
                0, 1, own.overlap_threshold, step=0.01, label="Overlap threshold",
                elem_id=f"{elem_id}-overlap",
            )  # fmt: skip
            self.count = gr.Number(
                own.count_threshold, label="Smallest segment (pixels)", precision=0, minimum=0,
                elem_id=f"{elem_id}-count",
            )  # fmt: skip

    @property
    def inputs(self) -> list[Any]:
        """Lists the controls, in the order that `settings_of` takes their values in."""
        return [self.steps, self.size, self.seed, self.solver, self.mask, self.overlap, self.count, self.backend]


def settings_of(*values: Any) -> Settings:
    """Makes settings of the controls' values; an empty one stands for the model's own."""
    steps, size, seed, solver, mask, overlap, count, backend = values
    whole = [None if value is None else int(value) for value in (steps, size, count)]
    return Settings(
        steps=whole[0],
        size=whole[1],
        seed=int(seed or 0),
        solver=solver,
        mask_threshold=mask,
        count_threshold=whole[2],
        overlap_threshold=overlap,
        backend=backend or "",
    )


def facts(done: Segmented, number: int) -> str:
    """Writes the line under a result: segments, time and the settings that were used."""
    height, width = done.result.segmentation.shape
    used = done.settings
    line = (
        f"**{number} segment{'s' * (number != 1)}** in **{done.seconds:.2f} s** - {width} x {height} pixels, "
        f"{used.steps} step{'s' * (used.steps != 1)} at {used.size} pixels, seed {used.seed}, {used.backend}"
    )
    return line + (" - turned as its EXIF orientation says" if done.orientation != 1 else "")
