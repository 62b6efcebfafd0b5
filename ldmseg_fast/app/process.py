"""Runs the model in a process of its own: where that is killed or stuck, one request fails and the app goes on."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ldmseg_fast.app.limits import Refused
from ldmseg_fast.app.work import Segmented, Settings, Stop, Worker, take_turn
from ldmseg_fast.data.pictures import MAX_PIXELS
from ldmseg_fast.errors import UserError

_ENDING = "the app is ending: nothing more is done"
_TAKE = 0.05  # seconds between two looks at `stop`
PATIENCE = 5.0  # seconds that work which is to end may take to its next sampling step; then its process is killed


class _Stopped(Exception):
    """Ends work in the model's process."""


@dataclass
class _Child:
    process: Any
    connection: Any
    stopped: Any  # a shared byte without a lock: a killed process could hold one for ever


class ProcessWorker(Worker):
    """Is a `Worker` whose model lives in another process; that starts again after its end.

    Args:
        model, backends, engine_dir, speed, max_pixels: as in `Worker`.
        threads: of the model; None: all cores.

    Raises:
        BackendError, CheckpointError: as `Worker`.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        backends: tuple[str, ...] = ("torch",),
        engine_dir: str | Path | None = None,
        *,
        speed: Mapping[str, Any] = MappingProxyType({}),
        max_pixels: int = MAX_PIXELS,
        threads: int | None = None,
    ) -> None:
        self.threads = threads
        self._turn = threading.Lock()
        self._child: _Child | None = None
        self._closed = False
        super().__init__(model, backends, engine_dir, speed=speed, max_pixels=max_pixels)

    @property
    def process_id(self) -> int | None:
        """The model's process; None where none runs."""
        return None if self._child is None else self._child.process.pid

    def segment(self, picture: Any, settings: Settings | None = None, stop: Stop | None = None) -> Segmented:
        """See `Worker.segment`.

        Raises:
            Refused: the model's process has ended.
        """
        done = self._call("segment", (picture, self.filled(settings)), {}, stop)
        self._keep("segment", picture, done)
        return done

    def complete(
        self,
        picture: Any,
        segmentation: Any,
        known: np.ndarray,
        settings: Settings | None = None,
        stop: Stop | None = None,
        *,
        segments_info: Any = None,
    ) -> Segmented:
        """See `Worker.complete`.

        Raises:
            Refused: the model's process has ended.
        """
        arguments = (picture, segmentation, known, self.filled(settings))
        done = self._call("complete", arguments, {"segments_info": segments_info}, stop)
        self._keep("complete", picture, done)
        return done

    def warm_up(self) -> None:
        """Segments a grey picture in one step, so that no visitor waits for what the first run of a process sets up."""
        side = self.info.image_size
        with suppress(UserError):
            grey = np.full((side, side, 3), 128, np.uint8)
            self._call("segment", (grey, self.filled(Settings(steps=1))), {}, None)

    def close(self) -> None:
        """Ends the model's process, and the work in it; no other is started."""
        self._closed = True
        if (child := self._child) is not None:
            child.process.kill()  # whoever waits for its answer hears of its end
        with self._turn:
            self._end()

    def _load_info(self) -> Any:
        with self._turn:
            return self._living()[1]

    def _call(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any], stop: Stop | None) -> Any:
        take_turn(self._turn, stop)
        try:
            child, _ = self._living()
            getattr(stop, "restart", lambda: None)()  # the model's start is no part of the request
            try:
                child.stopped.value = 0
                child.connection.send((name, arguments, named))
                kind, value = self._answer(child, stop)
            except (EOFError, ConnectionError):
                raise Refused(self._why_ended(child)) from None
        finally:
            self._turn.release()
        if kind == "failed":
            raise value
        return value

    def _answer(self, child: _Child, stop: Stop | None) -> tuple[str, Any]:
        try:
            while not child.connection.poll(_TAKE):
                if stop is not None:
                    stop()
        except BaseException:
            child.stopped.value = 1
            with suppress(EOFError, ConnectionError):
                if child.connection.poll(PATIENCE):
                    child.connection.recv()
                else:
                    self._end()
            raise
        return child.connection.recv()

    def _living(self) -> tuple[_Child, Any]:
        """Returns the process, started where none runs, and the model's description."""
        if self._closed:
            raise Refused(_ENDING)
        if self._child is not None and self._child.process.is_alive():
            return self._child, self.info
        self._end()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        stopped = context.Value("b", 0, lock=False)
        made = (self.model, self.backends, self.engine_dir, self.speed, self.max_pixels)
        process = context.Process(target=_run, args=(theirs, stopped, made, self.threads), daemon=True, name="model")
        process.start()
        theirs.close()
        self._child = _Child(process, ours, stopped)
        try:
            kind, value = ours.recv()
        except (EOFError, ConnectionError):
            raise Refused(self._why_ended(self._child)) from None
        if kind == "failed":
            self._end()
            raise value
        return self._child, value

    def _why_ended(self, child: _Child) -> str:
        if self._closed:
            self._end()
            return _ENDING
        child.process.join(PATIENCE)
        code = child.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
        self._end()
        return (
            f"the model's process was ended {how}, often for want of memory; it starts again by itself: try once more, "
            "with a smaller picture or size"
        )

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.connection.close()
            child.process.kill()
            child.process.join()


def _run(connection: Any, stopped: Any, made: tuple[Any, ...], threads: int | None) -> None:
    """Does in the model's process what the other sends, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the server hears, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    model, backends, engine_dir, speed, max_pixels = made

    def stop() -> None:
        if stopped.value:
            raise _Stopped

    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        worker = Worker(model, backends, engine_dir, speed=speed, max_pixels=max_pixels)
        answer: tuple[str, Any] = ("done", worker.info)
    except Exception as error:
        connection.send(("failed", _sendable(error)))
        return
    with suppress(EOFError, ConnectionError, BrokenPipeError):
        connection.send(answer)
        while True:
            name, arguments, named = connection.recv()
            try:
                answer = ("done", getattr(worker, name)(*arguments, stop=stop, **named))
            except _Stopped:
                answer = ("stopped", None)
            except Exception as error:
                answer = ("failed", _sendable(error))
            connection.send(answer)


def _sendable(error: Exception) -> Exception:
    """Adds the traceback to an error as a note, as pickling drops it, and replaces what cannot be pickled."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # what __reduce__ of anybody's errors raises
        return RuntimeError("".join(traceback.format_exception(error)))
