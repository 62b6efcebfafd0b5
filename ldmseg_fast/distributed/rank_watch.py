"""Ends the ranks that share work by files when one of them has died or failed, with one line that says which."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ldmseg_fast.distributed import rank_file
from ldmseg_fast.distributed.ending import reason_of
from ldmseg_fast.distributed.liveness import LOST_RANK
from ldmseg_fast.distributed.ranks import Ranks
from ldmseg_fast.stopping import INTERRUPTED, TERMINATED, Terminated

PERIOD = 0.5  # seconds between two looks at the other ranks
AGAIN = "run the command again: what is complete stays"


def rank_path(launch: Path, rank: int) -> Path:
    """Returns a rank's file in the folder of its start."""
    return launch / f"rank-{rank}"


def appeared(path: Path) -> bool:
    """Tells whether a file that another machine makes is there: NFS remembers for a minute what was not, but lists."""
    try:
        return path.name in os.listdir(path.parent)  # noqa: PTH208 (names are wanted)
    except OSError:
        return False


class RankWatch:
    """Looks at the other ranks in a thread: rank 0 at all, the others at rank 0.

    Args:
        launch: folder of the start.
        ranks: this process.
        own: its file.
        facts: what it tells the others there, again and again.
        done: is set when this rank needs the others no more.
    """

    def __init__(
        self, launch: Path, ranks: Ranks, own: rank_file.RankFile, facts: dict[str, Any], done: threading.Event
    ) -> None:
        self.launch, self.ranks, self._own, self._facts, self._done = launch, ranks, own, facts, done
        self._lives = rank_file.Lives()

    def start(self) -> None:
        """Begins to look."""
        threading.Thread(target=self._watch, daemon=True).start()

    def fail(self, error: BaseException, close: Callable[[], None]) -> NoReturn:
        """Ends this rank and tells the others, with one line for all.

        close: gives free what this rank holds.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher stops the others where one has ended
        self._done.set()
        text, code = f"stopped by SIGTERM; {AGAIN}", TERMINATED
        if not isinstance(error, Terminated):
            text, code = reason_of(error) or (f"error: rank {self.ranks.rank} has failed", 1)
        if code in (INTERRUPTED, TERMINATED) and (lost := self._lost()) is not None:
            text = self._death_of(lost)  # the launcher stops the others where one has died
        if self._is_first():
            if self.ranks.rank != 0 and not text.startswith("error: rank "):
                text = text.replace("error: ", f"error: rank {self.ranks.rank}: ", 1)
            print(text, file=sys.stderr, flush=True)
        if code == 1:
            traceback.print_exception(error)
        sys.stdout.flush()
        close()
        os._exit(code)

    def _is_first(self) -> bool:
        """Whether no other rank has failed before. One that cannot write says what it has to say."""
        try:
            os.close(os.open(self.launch / "failed", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _watch(self) -> None:
        while not self._done.wait(PERIOD):
            with contextlib.suppress(OSError):
                self._own.write(**self._facts)
            if appeared(self.launch / "failed"):
                time.sleep(PERIOD)  # the main thread may be about to say the same by itself
                self._leave(None)
            if (lost := self._lost()) is not None:
                self._leave(self._death_of(lost))

    def _lost(self) -> int | None:
        """Finds a rank that has come and died: rank 0 looks at all, the others look at rank 0."""
        for rank in range(1, self.ranks.world) if self.ranks.rank == 0 else (0,):
            path = rank_path(self.launch, rank)
            if self._lives.lives(path):
                continue
            state = rank_file.read(path)
            if (state is not None and not state.get("final")) or (rank == 0 and not self._done.is_set()):
                return rank
        return None

    def _death_of(self, rank: int) -> str:
        state = rank_file.read(rank_path(self.launch, rank)) or {}
        place = f" (process {state['pid']} on {state['host']})" if "pid" in state else ""
        return f"error: rank {rank}{place} has died; {AGAIN}"

    def _leave(self, text: str | None) -> None:
        if self._done.is_set():
            return
        if text is not None and self._is_first():
            print(text, file=sys.stderr, flush=True)
        os._exit(LOST_RANK)  # the main thread may be anywhere
