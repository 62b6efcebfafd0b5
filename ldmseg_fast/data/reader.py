"""Reads in a thread that may hang, and says which file a hanging read is at."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ldmseg_fast.errors import DataError

T = TypeVar("T")

PIECE = 1.0  # second, of a wait
CURE = "Raise data.timeout where reading takes longer, and go on with --resume"


class PatientReader:
    """Calls functions that read files in a thread of its own, because a read that hangs cannot be told to stop.

    Args:
        timeout: seconds that a call may take.
        where: says what is being read, for the error.
        cure: says what to do about it.
    """

    def __init__(self, timeout: float, where: Callable[[], str], cure: str = CURE) -> None:
        self.timeout, self.where, self.cure = timeout, where, cure
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], T]) -> T:
        """Returns or raises what `function()` does.

        Raises:
            DataError: the call takes longer than `timeout`. The reader cannot be used any more then.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._serve, daemon=True)  # daemon: nobody waits for it at exit
            try:
                thread.start()
            except RuntimeError:  # no more threads: rather no word about a read that hangs than no read
                return function()
            self._thread = thread
        self._wanted.put(function)
        result, error = self._wait()
        if error is not None:
            raise error
        return result

    def _wait(self) -> Any:
        """Waits for what a call gave; a process that is suspended meanwhile has waited for one piece at most."""
        waited = 0.0
        while True:
            piece = min(PIECE, self.timeout - waited)
            try:
                return self._done.get(timeout=piece)
            except queue.Empty:
                waited += piece
            if waited >= self.timeout:
                raise hang_error(self.timeout, self.where(), self.cure) from None

    def close(self) -> None:
        """Ends the thread."""
        self._wanted.put(None)

    def _serve(self) -> None:
        while (function := self._wanted.get()) is not None:
            try:
                self._done.put((function(), None))
            except BaseException as error:
                self._done.put((None, error))


def hang_error(timeout: float, where: str, cure: str = CURE) -> DataError:
    """Returns the error of a read that has taken `timeout` seconds; `where` says what it reads."""
    return DataError(f"no batch for {timeout:g} s: {where}. Is the file server alive? {cure}")


def without_traceback(error: DataError) -> DataError:
    """Cuts a worker process's traceback off the text of its error, which ends in the error's own line."""
    return DataError(str(error).strip().splitlines()[-1].removeprefix("ldmseg_fast.errors.DataError: "))
