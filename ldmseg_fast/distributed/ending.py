"""Ends a command that cannot go on with one line that says why, on any number of ranks."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from ldmseg_fast import distributed
from ldmseg_fast.distributed.liveness import LOST_RANK, Heartbeat, is_running, lost_ranks
from ldmseg_fast.distributed.ranks import ranks_of
from ldmseg_fast.errors import LaunchError, Stopped, UserError, memory_note, printable, why_out_of_memory
from ldmseg_fast.stopping import INTERRUPTED, TERMINATED, Terminated, terminable, terminate, why_stopped
from ldmseg_fast.streams import open_streams

PATIENCE = 8.0  # seconds that other ranks wait for rank 0's word
TOLD = 5.0  # seconds that a rank leaves to rank 0 to say what is wrong for all
_CURES = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "it is no folder: choose another path",
    errno.ENOTDIR: "a part of the path is no folder: choose another path",
    errno.EISDIR: "name a file",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose another path",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EFBIG: "raise `ulimit -f`, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise `ulimit -n`",
}
_FAILED = "ldmseg/failed"  # in the launcher's store: "RANK:EXIT_CODE:why"


def reason_of(error: BaseException) -> tuple[str, int] | None:
    """Returns the line and the exit code of an error that the user can mend; None for a fault in this package."""
    if stopped := why_stopped(error):
        return stopped
    if isinstance(error, Stopped):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return printable(f"error: {_with_cure(error)}"), 2
    if isinstance(error, UserError):
        return printable(f"error: {error}"), 2
    if reason := why_out_of_memory(error):
        at = f" {note}" if (note := memory_note(error)) else ""
        line = f"error: out of memory{at} ({reason}); take a smaller size or fewer at once, or end other programs"
        return printable(line), 2
    return None


def _with_cure(error: OSError) -> str:
    """Writes what the system says of a file, the file first, with what to do about it."""
    if error.errno == errno.ENOENT and error.filename is None and _is_gone():
        return "the folder that this command was started in has been removed; change to another folder"
    if error.filename is None or error.filename2 is not None or error.errno is None:
        return str(error)
    cure = f"; {_CURES[error.errno]}" if error.errno in _CURES and error.strerror == os.strerror(error.errno) else ""
    return f"{os.fsdecode(error.filename) or repr('')}: {error.strerror}{cure}"


def _is_gone() -> bool:
    """Tells whether the current folder has been removed, which the system says without a name."""
    try:
        os.getcwd()  # noqa: PTH109 (`Path.cwd` does the same)
    except FileNotFoundError:
        return True
    return False


def end_alone(text: str, code: int) -> int:
    """Prints why a command ends before its ranks have met, and returns the exit code.

    All of them may meet the same error. A launcher ends the others soon after rank 0 has said it.
    """
    rank = 0
    with suppress(LaunchError):
        rank = ranks_of(os.environ).rank
    if rank > 0:
        if code == TERMINATED:  # a launcher stops all of them
            return code
        time.sleep(TOLD)
        text = text.replace("error: ", f"error: rank {rank}: ", 1)
    print(text, file=sys.stderr, flush=True)
    return code


def run_command(run: Callable[[], int | None]) -> int:
    """Runs a command of one process and returns its exit code.

    An error that the user can mend ends in one line on stderr. A fault of ours keeps its traceback.
    """
    open_streams()
    try:
        with terminable():
            return run() or 0
    except (Exception, KeyboardInterrupt, Terminated) as error:
        reason = reason_of(error)
        if reason is None:
            raise
        print(reason[0], file=sys.stderr)
        return reason[1]


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Joins the launcher's ranks inside a `with` block. Where one of them fails, all end within seconds.

    The others would wait for it in their next collective until that times out. On another machine that is longer than
    their launcher lives.
    """
    distributed.start()
    if distributed.world_size() == 1:
        yield
    else:
        before = signal.signal(signal.SIGTERM, terminate)
        with _RankWatch(places=distributed.gather_objects((socket.gethostname(), os.getpid()))) as watch:
            try:
                yield
            except BaseException as error:
                watch.fail(error)
        signal.signal(signal.SIGTERM, before)
    distributed.stop()


class _RankWatch(Heartbeat):
    """Ends this process also when another rank says that it has failed.

    places: machine and process of each rank.
    """

    def __init__(self, timeout: float = 30.0, places: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(timeout, lambda: self._leave("the launcher has gone"), period=1.0)
        self._places = places
        self._threads.append(threading.Thread(target=self._listen, daemon=True))

    def __enter__(self) -> _RankWatch:
        super().__enter__()
        return self

    def fail(self, error: BaseException) -> NoReturn:
        """Says why, once for all ranks that meet the same error, and ends the process."""
        if isinstance(error, Exception) and is_lost_connection(error):
            time.sleep(2 * self.period)  # lets the other rank say why, which ends this one
            self._leave(self._gone() or "another rank has gone")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher stops the others where one has ended
        self._done.set()  # from here on this thread alone ends the process
        text, code = reason_of(error) or (traceback.format_exc().rstrip(), 1)
        if code == TERMINATED and (gone := self._gone()):  # the launcher stops the others where one has died
            text = f"error: {gone}; run the command again"
        said = ""
        with suppress(RuntimeError):  # the store has gone with the rank that holds it
            said = self._store.compare_set(_FAILED, "", f"{distributed.rank()}:{code}:{text}").decode()
        first, _, told = said.split(":", 2) if said else ("", "", "")
        if (first, told) in (("", ""), (str(distributed.rank()), text)):
            print(text, file=sys.stderr, flush=True)
            time.sleep(2 * self.period)  # until the others have read it: the store may live in this process
        elif told != text:
            print(f"rank {distributed.rank()}: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # leaving the process group would wait for ranks that are stuck in a collective

    def _gone(self) -> str:
        """Names a rank of this machine whose process has ended; empty where all of them run."""
        for rank, (host, process) in enumerate(self._places):
            if host == socket.gethostname() and rank != distributed.rank() and not is_running(process):
                return f"rank {rank} (process {process} on {host}) has gone"
        return ""

    def _listen(self) -> None:
        while self._store is not None and not self._done.wait(self.period):
            with suppress(RuntimeError):  # the store has gone: `_watch` deals with that
                if self._store.check([_FAILED]):
                    time.sleep(self.period)  # the main thread may be about to say the same by itself
                    rank, code, text = self._store.get(_FAILED).decode().split(":", 2)
                    stopped = int(code) in (INTERRUPTED, TERMINATED)  # no fault: all ranks end in the same way
                    why = "was stopped" if stopped else "has failed"
                    line = f"ends because rank {rank} {why} ({text.splitlines()[-1]})"
                    self._end(line, int(code) if stopped else LOST_RANK)

    def _leave(self, reason: str) -> None:
        self._end(f"{reason}; run the command again")

    def _end(self, text: str, code: int = LOST_RANK) -> None:
        if not self._done.is_set():
            print(f"rank {distributed.rank()}: {text}", file=sys.stderr, flush=True)
            os._exit(code)  # the main thread sits in a collective that nothing can interrupt


def exit_code_of(error: Exception) -> int | None:
    """Says what happened, once for all ranks, and returns the exit code; None for what deserves a traceback.

    Rank 0 prints an error that every rank meets. The others wait until it has, or their launcher would kill rank 0
    before it could. A rank prints what happens to it alone.
    """
    reason = reason_of(error)
    if reason is not None:
        _say(reason[0], once=True)
        return reason[1]
    if is_lost_connection(error):
        gone = lost_ranks() or "another rank has gone"
        _say(f"error: rank {distributed.rank()}: {gone}; start again with --resume", once=False)
        return LOST_RANK
    return None


def is_lost_connection(error: Exception) -> bool:
    """Tells whether a collective failed because another rank has gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "NCCL")
    return isinstance(error, RuntimeError) and distributed.launched() and any(word in str(error) for word in words)


def _say(text: str, once: bool) -> None:
    if not once or distributed.world_size() == 1 or not distributed.is_distributed():
        print(text, file=sys.stderr, flush=True)
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    try:
        if distributed.is_main():
            print(text, file=sys.stderr, flush=True)
            store.set("ldmseg/ended", text)
            time.sleep(1.0)  # the store may live in this process
            return
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if store.check(["ldmseg/ended"]):
                return
            time.sleep(0.2)
    except RuntimeError:  # the store has gone with rank 0, which has spoken then
        return
    print(f"rank {distributed.rank()}: {text}", file=sys.stderr, flush=True)
