"""Ends a process that is stopped by Ctrl-C or SIGTERM in one line, after it has cleared what it was writing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

from ldmseg_fast.errors import printable
from ldmseg_fast.imports import why_no_torch

INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 + SIGINT, 128 + SIGTERM


class Terminated(BaseException):
    """Is raised by SIGTERM."""


def terminate(number: int, frame: Any) -> NoReturn:
    """Raises `Terminated`; a signal handler."""
    raise Terminated


def why_stopped(error: BaseException) -> tuple[str, int] | None:
    """Returns the line and the exit code of a process that a signal ends; None for other errors."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    return ("stopped by SIGTERM", TERMINATED) if isinstance(error, Terminated) else None


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated` inside a `with` block, as Ctrl-C raises KeyboardInterrupt.

    Temporary files and locks go then. A further SIGTERM does not disturb that. Nothing changes where the caller has its
    own handler, or in another thread than the main one. A forked process ends at once, as it would without.
    """
    process = os.getpid()

    def stop(number: int, frame: Any) -> None:
        ours = os.getpid() == process
        signal.signal(number, signal.SIG_IGN if ours else signal.SIG_DFL)
        if ours:
            raise Terminated
        os.kill(os.getpid(), number)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def tell_interrupts() -> None:
    """Makes two ends one line instead of a traceback while a script imports what it needs.

    They are Ctrl-C, whose exit code stays 130, and a torch that cannot be imported, whose exit code is 2.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        elif (no_torch := why_no_torch(error)) is not None:
            print(printable(no_torch), file=sys.stderr)
            raise SystemExit(2)
        else:
            before(kind, error, trace)

    sys.excepthook = hook
