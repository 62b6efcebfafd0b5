"""Starts loader processes that hold nothing of the training process but what they read.

A forked process keeps a copy of every page that the training process changes later. Where weights and moments are there
first, each worker soon holds gigabytes of old ones. So a server process, which never sees a weight, forks them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext

import torch


def worker_context() -> BaseContext:
    """Starts the server where none runs, and returns the context that starts processes from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldmseg_fast.data.loader"])
    # blocked signals stay blocked in the server, which a launcher signals as it does every process below it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Keeps new processes from running the user's script again: they need nothing of `__main__`."""
    main = sys.modules["__main__"]
    names: tuple[str, ...] = ("__spec__", "__file__")
    saved = {name: vars(main).pop(name) for name in names if name in vars(main)}
    vars(main)["__spec__"] = None
    try:
        yield
    finally:
        vars(main).update(saved)


class WorkerStart:
    """Prepares a loader process: `worker_init_fn` of a DataLoader. It works in the folder that this one works in."""

    def __init__(self) -> None:
        self.folder = os.getcwd()  # noqa: PTH109 (a string, as `chdir` takes it)

    def __call__(self, worker: int) -> None:
        os.chdir(self.folder)
        # a launcher that is told to stop signals every process below it, but saving first needs them to the end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends the process when the training process has gone; torch's own watchdog watches the server, which stays."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
