"""Catches stop requests from outside, and ends ranks when another one has died."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast import distributed

LOST_RANK = 74  # exit code: EX_IOERR of sysexits.h


class Interrupt:
    """Makes SIGTERM and SIGINT ask for a stop after the step in flight.

    A launcher that is told to stop sends both, one after the other. So only a SIGINT some seconds after the first
    request stops at once. `signal` is the number that came, or 0.
    """

    def __init__(self, patience: float = 3.0) -> None:
        self.patience, self.signal, self._since = patience, 0, 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Tells whether a stop was asked for."""
        return self.signal != 0

    def request(self, number: int) -> None:
        """Asks for a stop as the signal `number` would; the first request counts."""
        if not self.signal:
            self.signal, self._since = number, time.monotonic()

    def agree(self) -> None:
        """Gives every rank the signal that came to the first one that has any; all ranks call it."""
        for number in distributed.gather_objects(self.signal):
            if number:
                self.signal = number
                return

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
                self._previous[number] = previous = signal.signal(number, self._handle)
                outer = getattr(previous, "__self__", None)
                if isinstance(outer, Interrupt) and outer.requested:
                    self.request(outer.signal)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT and time.monotonic() - self._since > self.patience:
            raise KeyboardInterrupt
        self.request(number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Agreement:
    """Lets the ranks decide together after each step: whether to stop, and how many items were unreadable.

    The exchange runs between CPUs and beside the next step's work, so no device is waited for. What is asked for takes
    effect one step later.
    """

    def __init__(self) -> None:
        several = distributed.world_size() > 1
        self._group = torch.distributed.new_group(backend="gloo") if several else None
        self._pending: tuple[Tensor, Any] | None = None

    def exchange(self, stop: bool, bad_items: int, seconds: float) -> tuple[bool, int, float]:
        """Returns (stop, number of unreadable items) over all ranks, and the mean of their `seconds`.

        They are those of the call before; on one rank those of this call.
        """
        if self._group is None:
            return stop, bad_items, seconds
        values = torch.tensor([float(stop), float(bad_items), seconds], dtype=torch.float64)
        before = self._pending
        self._pending = values, torch.distributed.all_reduce(values, group=self._group, async_op=True)
        if before is None:
            return False, 0, 0.0
        before[1].wait()
        stopping, bad, total = before[0].tolist()
        return stopping > 0, int(bad), total / distributed.world_size()


def is_running(process: int) -> bool:
    """Tells whether a process of this machine runs; one that has ended and is not waited for yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # without /proc nobody can tell
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")


def oom_kills(source: Path = Path("/proc/vmstat")) -> int:
    """Reads how many processes the kernel has killed since it started because memory ran out; 0 where it says nothing.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.events has the same count of a group).
    """
    with contextlib.suppress(OSError, ValueError):
        for line in source.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


_places: list[tuple[str, int]] = []  # machine and process of each rank
_kills_at_start = 0


def note_ranks() -> None:
    """Takes note of where the ranks run, for `lost_ranks`; all ranks call it."""
    global _places, _kills_at_start
    _kills_at_start = oom_kills()
    _places = distributed.gather_objects((socket.gethostname(), os.getpid()))


def lost_ranks() -> str:
    """Names the ranks of this machine whose process has gone, and whether memory has run out; "" where all run."""
    host = socket.gethostname()
    gone = [
        f"rank {rank} (process {process} on {host})"
        for rank, (machine, process) in enumerate(_places)
        if machine == host and process != os.getpid() and not is_running(process)
    ]
    if not gone:
        return ""
    if oom_kills() > _kills_at_start:
        cure = "--dry-run forecasts the memory, train.accumulation and train.checkpointing lower it"
        return f"{', '.join(gone)} was killed by the system because memory ran out ({cure})"
    return f"{', '.join(gone)} has gone"


class Heartbeat:
    """Tells the other ranks, in a thread, that this one is alive, and ends this process when one of them falls silent.

    A killed rank would otherwise leave the others in a collective until that times out. `on_orphaned` is called once
    when the launcher itself has gone, which nobody else would tell the ranks.
    """

    def __init__(self, timeout: float, on_orphaned: Callable[[], None], period: float = 2.0) -> None:
        self.timeout, self.on_orphaned, self.period = timeout, on_orphaned, period
        self._done = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._watch_the_watch)]
        self._launcher = _launcher()
        self._store: Any = None
        self._looked = time.monotonic()

    def __enter__(self) -> Heartbeat:
        if distributed.launched():
            if distributed.world_size() > 1:
                note_ranks()
                self._store = _connect()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2 * self.period)

    def _watch(self) -> None:
        world, rank, beat = distributed.world_size(), distributed.rank(), 0
        seen = {other: (b"", time.monotonic()) for other in range(world) if other != rank}
        while not self._done.wait(self.period):
            self._looked = time.monotonic()
            if self._launcher and _launcher() != self._launcher:
                self._launcher = None
                self.on_orphaned()
            if self._store is None:
                continue
            beat += 1
            try:
                self._store.set(f"alive/{rank}", str(beat))
                for other, (value, since) in seen.items():
                    now = self._store.get(f"alive/{other}") if self._store.check([f"alive/{other}"]) else b""
                    if now != value:
                        seen[other] = (now, time.monotonic())
                    elif time.monotonic() - since > self.timeout:
                        gone = lost_ranks()
                        self._leave(f"rank {other} has been silent for {self.timeout:.0f} s" + (gone and f": {gone}"))
            except RuntimeError:  # the store lives in rank 0 or in the launcher
                if not self._done.wait(self.timeout / 2):  # the main thread may be about to end by itself
                    self._leave(lost_ranks() or "the rank that holds the rendezvous has gone")

    def _watch_the_watch(self) -> None:
        """Ends the process when the watch hangs.

        A store whose process hangs answers nothing, not even with an error.
        """
        while not self._done.wait(self.period):
            if time.monotonic() - self._looked > self.timeout + self.period:
                self._leave(f"the rank that holds the rendezvous has been silent for {self.timeout:.0f} s")

    def _leave(self, reason: str) -> None:
        if self._done.is_set():
            return
        print(f"error: rank {distributed.rank()}: {reason}; start again with --resume", file=sys.stderr, flush=True)
        os._exit(LOST_RANK)  # the main thread sits in a collective that nothing can interrupt


def _connect() -> Any:
    """Opens another connection to the launcher's key-value store: the main thread's may be busy waiting."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, wait_for_workers=False)


def _launcher() -> tuple[int, int] | None:
    """Returns the process ids of DeepSpeed's per-machine launcher and of the `deepspeed` command; None elsewhere."""
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return None
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:  # it has gone, or there is no /proc
        return (0, 0) if parent == 1 else None
    return parent, int(stat.rpartition(")")[2].split()[1])
