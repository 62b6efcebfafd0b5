"""Bounds what one visitor can ask of the machine, and ends work whose visitor has left."""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ldmseg_fast.app.metrics import Metrics
from ldmseg_fast.app.work import Stop
from ldmseg_fast.errors import UserError, why_out_of_memory

GRACE = 1.0  # seconds in which a visitor whose connection has closed may open another one


class Cancelled(UserError):
    """Ends work that its visitor no longer wants."""


class TimeOver(UserError):
    """Ends work that took longer than a request may."""


class Refused(UserError):
    """Says why the machine cannot do a request: no disk or no memory is left, or its process was ended."""


@dataclass
class _Running:
    visitor: str
    event: str
    cancelled: bool = False


@dataclass
class Limits:
    """Holds the bounds of requests, and the requests that run.

    Attributes:
        max_upload: bytes of one uploaded file.
        max_pixels: of a picture or map; more are refused before anything is decoded.
        queue: requests that may wait; further ones are refused.
        timeout: seconds that one request's work may take, without its time in the queue.
        batch: pictures of one batch. Its `timeout` counts for each picture, not for all of them.
        unpacked: bytes of a batch's unpacked pictures, all together.
        metrics: counts what is done and refused.
    """

    max_upload: int = 64 * 2**20
    max_pixels: int = 2**25
    queue: int = 64
    timeout: float = 120.0
    batch: int = 1000
    unpacked: int = 2**30
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[_Running] = []
        self._streams: Counter[str] = Counter()
        self._left: dict[str, float] = {}

    @contextmanager
    def work(self, kind: str, visitor: str | None = None, event: str | None = None) -> Iterator[Stop]:
        """Gives a request's work its `stop`, and counts the request.

            with limits.work("segment", request.session_hash) as stop:
                done = worker.segment(picture, settings, stop)

        `stop` raises `TimeOver` or `Cancelled` where the work is to end. `stop.restart()` gives it its whole time again
        for the next picture of a batch.

        Args:
            kind: of the request, for the metrics.
            visitor: the session that `cancel`, `arrive` and `leave` name.
            event: the request's own id, for `cancel_event`.

        Raises:
            Refused: in the place of errors of a full disk or memory.
        """
        running = _Running(visitor or "", event or "")
        with self._lock:
            self._running.append(running)
        stop = _Stop(self, running)
        outcome, start = "error", time.perf_counter()
        self.metrics.running(1)
        try:
            try:
                yield stop
                outcome = "done"
            except (OSError, MemoryError, RuntimeError) as error:
                outcome = "refused" if isinstance(error, UserError) else "error"
                outcome = "cancelled" if isinstance(error, Cancelled) else outcome
                reason = why_refused(error)
                if reason is None:
                    raise
                outcome = "refused"
                raise Refused(reason) from error
            except Cancelled:
                outcome = "cancelled"
                raise
            except TimeOver:
                outcome = "timeout"
                raise
            except UserError:
                outcome = "refused"
                raise
            except GeneratorExit:
                outcome = "cancelled"
                raise
        finally:
            with self._lock:
                self._running.remove(running)
            self.metrics.running(-1)
            self.metrics.finished(kind, outcome, time.perf_counter() - start)

    def cancel(self, visitor: str) -> int:
        """Ends all work of a visitor, and returns how much there was."""
        return self._cancel(lambda each: bool(visitor) and each.visitor == visitor)

    def cancel_event(self, event: str) -> int:
        """Ends the work of one request, and returns 1 where it was running."""
        return self._cancel(lambda each: bool(event) and each.event == event)

    def arrive(self, visitor: str) -> None:
        """Notes that a visitor has opened a connection that waits for results."""
        with self._lock:
            self._streams[visitor] += 1
            self._left.pop(visitor, None)

    def leave(self, visitor: str, finished: bool = False) -> None:
        """Notes that such a connection has closed. Work ends GRACE seconds after the visitor's last one.

        Args:
            visitor: as in `arrive`.
            finished: whether it closed because all was sent.
        """
        with self._lock:
            self._streams[visitor] -= 1
            if self._streams[visitor] <= 0:
                del self._streams[visitor]
                if not finished:
                    self._left[visitor] = time.monotonic()
            active = {each.visitor for each in self._running}
            end = time.monotonic() - 60 * GRACE
            self._left = {key: when for key, when in self._left.items() if key in active or when > end}

    def running(self) -> int:
        """Returns how many requests run."""
        with self._lock:
            return len(self._running)

    def _cancel(self, chosen: Callable[[_Running], bool]) -> int:
        with self._lock:
            found = [each for each in self._running if chosen(each)]
            for each in found:
                each.cancelled = True
        return len(found)

    def _check(self, running: _Running, since: float) -> None:
        if running.cancelled:
            raise Cancelled("stopped: nothing was changed")
        left = self._left.get(running.visitor)
        if left is not None and time.monotonic() - left > GRACE:
            raise Cancelled("stopped: the visitor has left")
        if time.monotonic() - since > self.timeout:
            raise TimeOver(
                f"this took over {self.timeout:g} seconds, which is this app's limit: take fewer steps, a smaller size "
                "or a smaller picture"
            )


class _Stop:
    """Is called between sampling steps; raises where the work is to end."""

    def __init__(self, limits: Limits, running: _Running) -> None:
        self.limits, self.running_work = limits, running
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def __call__(self) -> None:
        self.limits._check(self.running_work, self.since)


def why_refused(error: BaseException) -> str | None:
    """Writes an error of a machine that has no room left as one line; None for other errors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk of this machine is full, so nothing could be written: tell the one who runs this app"
    if why_out_of_memory(error):
        return "this machine has too little memory for that: take a smaller picture or a smaller size"
    return None
