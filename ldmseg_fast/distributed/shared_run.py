"""Shares units of work among ranks by files in one folder, without a network; what is complete is not done again.

FOLDER/.ldmseg-run/ holds, until all is done:

    settings.json         what the results depend on; a start with others is refused
    done-LAUNCH-RANK      a line for each unit that is complete, of this start and of earlier ones
    launch.json           which start is at work
    launch-LAUNCH/        of that start: work.jsonl (the units), rank-N (locked while rank N lives), claims/N (an empty
                          file for each unit that a rank has taken), failed (made by the first rank that fails)

Rank 0 holds the lock of the folder. A rank takes every W-th unit first, and then what other ranks have left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmseg_fast.distributed import rank_file
from ldmseg_fast.distributed.ending import end_alone
from ldmseg_fast.distributed.launcher import QUIET
from ldmseg_fast.distributed.liveness import LOST_RANK
from ldmseg_fast.distributed.rank_watch import AGAIN, PERIOD, RankWatch, appeared, rank_path
from ldmseg_fast.distributed.ranks import Ranks
from ldmseg_fast.distributed.run_journal import Record, journal, keep_settings, key_of, read_records
from ldmseg_fast.errors import DataError, InUseError, LaunchError, UserError
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.locks import only_writer
from ldmseg_fast.stopping import TERMINATED, Terminated, terminate

RUN = ".ldmseg-run"
COMING = 60.0  # seconds that rank 0 waits, when all is done, for ranks that have not come
MEETING = 600.0  # seconds that a rank waits for rank 0
STALE = 15.0  # seconds in which ranks of a start whose rank 0 was killed have ended
_STARTED = time.time()


class SharedRun:
    """Shares units of work; all ranks enter it.

        with SharedRun(folder, ranks, "a prediction", "choose another --out") as run:
            if run.is_main:
                run.open(settings, units, is_there)
            else:
                run.follow(settings)
            for number, unit in run.claims():
                run.done(number, {"files": ...}, count=1)
            records = run.finish()

    Args:
        folder: that all ranks see; its lock is held.
        ranks: this process.
        what, cure: for `locks.only_writer`.

    Attributes:
        is_main: whether this is rank 0, which alone knows the units at first.
        before: of `open`: how many units were complete.

    Raises:
        InUseError: another start is at work in the folder.
        LaunchError: rank 0 does not come, or is of a start of another size.
    """

    def __init__(self, folder: str | Path, ranks: Ranks, what: str, cure: str) -> None:
        self.folder, self.ranks, self.what, self.cure = Path(folder), ranks, what, cure
        self.path = self.folder / RUN
        self.is_main, self.before = ranks.rank == 0, 0
        self._several = ranks.world > 1
        self._stack = contextlib.ExitStack()
        self._done = threading.Event()
        self._lives = rank_file.Lives()
        self._facts: dict[str, Any] = {"count": 0, "final": False}
        self._units: dict[int, str] = {}
        self._keys: list[str] = []
        self._records: dict[str, Record] = {}
        self._name = ""

    # the start

    def __enter__(self) -> SharedRun:
        if self._several:
            self._stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, terminate))
        try:
            if self.is_main:
                self._stack.enter_context(only_writer(self.folder, self.what, self.cure))
                self._begin()
            else:
                self._join()
        except BaseException as error:
            self._stack.close()
            if isinstance(error, Terminated) and not self.is_main:
                raise SystemExit(TERMINATED) from None  # rank 0 has said why, or its launcher does
            if self.is_main or not isinstance(error, UserError | OSError):
                raise
            raise SystemExit(end_alone(f"error: {error}", 2)) from None
        self._own = self._stack.enter_context(rank_file.held(self._rank_path(self.ranks.rank)))
        self._own.write(**self._facts)
        own_lines = self.path / f"done-{self._name}-{self.ranks.rank}"
        self._journal = self._stack.enter_context(journal(own_lines))
        self._watch = RankWatch(self._launch, self.ranks, self._own, self._facts, self._done)
        if self.is_main:
            entry = {"launch": self._name, "start": self.ranks.launch, "world": self.ranks.world}
            write_json(self.path / "launch.json", entry)
        if self._several:
            self._watch.start()
        return self

    @property
    def _launch(self) -> Path:
        return self.path / f"launch-{self._name}"

    def _rank_path(self, rank: int) -> Path:
        return rank_path(self._launch, rank)

    def _begin(self) -> None:
        """Clears what an earlier start has left beside its results, once its ranks have ended."""
        self.path.mkdir(exist_ok=True)
        (self.path / "launch.json").unlink(missing_ok=True)
        end = time.monotonic() + STALE
        while alive := [path for path in self.path.glob("launch-*/rank-*") if self._lives.lives(path)]:
            if time.monotonic() > end:
                holder = rank_file.read(alive[0]) or {}
                raise InUseError(
                    f"{self.folder}: {alive[0].name} of an earlier start (process {holder.get('pid', '?')} on "
                    f"{holder.get('host', '?')}) still works there; wait until it has ended, or {self.cure}"
                )
            time.sleep(PERIOD)
        for old in self.path.glob("launch-*"):
            shutil.rmtree(old)
        self._name = uuid.uuid4().hex[:12]
        (self._launch / "claims").mkdir(parents=True)

    def _join(self) -> None:
        """Waits for rank 0 of the same start."""
        begun, said = time.monotonic(), False
        while True:
            appeared(self.path / "launch.json")
            entry = rank_file.read(self.path / "launch.json") or {}
            self._name = str(entry.get("launch", ""))
            if self._name and self._lives.lives(self._rank_path(0)):
                if entry.get("start") == self.ranks.launch:
                    break
                holder = rank_file.read(self._rank_path(0)) or {}
                raise InUseError(
                    f"{self.folder}: {self.what} of another start (process {holder.get('pid', '?')} on "
                    f"{holder.get('host', '?')}) writes there; wait until it has ended, or {self.cure}"
                )
            if entry.get("start") == self.ranks.launch and self._failed_since(_own_start()):
                os._exit(LOST_RANK)  # rank 0 has said why
            waited = time.monotonic() - begun
            where = f"{self.folder}; is it started, and do all ranks see this folder? (--share DIR names one they see)"
            if waited > MEETING:
                raise LaunchError(f"rank 0 did not come to {where}")
            if waited > QUIET and not said:
                said = True
                print(f"rank {self.ranks.rank}: waits for rank 0 at {where}", file=sys.stderr, flush=True)
            time.sleep(PERIOD / 5)
        if entry.get("world") != self.ranks.world:
            raise LaunchError(f"rank 0 is one of {entry.get('world')}, this one of {self.ranks.world}; start them anew")

    def _failed_since(self, start: float) -> bool:
        with contextlib.suppress(OSError):
            return (self._launch / "failed").stat().st_mtime > start
        return False

    # the work

    def agree(self, value: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns rank 0's value (JSON) on every rank, once in a start; rank 0 alone calls `value`."""
        path = self._launch / "agreed.json"
        if self.is_main:
            found = value()
            write_json(path, found)
            return found
        while not appeared(path):  # the watch ends this rank where rank 0 fails
            time.sleep(PERIOD / 5)
        found = json.loads(path.read_bytes())
        return found

    def open(
        self,
        settings: Mapping[str, Any],
        units: Sequence[str],
        is_there: Callable[[str, Record], bool] = lambda unit, record: True,
    ) -> None:
        """Gives the ranks their units; rank 0 calls it.

        Args:
            settings: what the results depend on (JSON values).
            units: each as a text of one line that says all of it.
            is_there: tells of a unit and its record whether the results are still there.

        Raises:
            ArgumentError: an earlier start with other settings was interrupted here.
        """
        records = read_records(self.path)
        keep_settings(self.path, settings, bool(records), self.cure)
        self._keys = [key_of(unit) for unit in units]
        todo = {}
        for number, (key, unit) in enumerate(zip(self._keys, units)):
            if key in records and is_there(unit, records[key]):
                self._records[key] = records[key]
            else:
                todo[number] = unit
        self._units, self.before = todo, len(units) - len(todo)
        if self._several:
            with replacing(self._launch / "work.jsonl") as temporary, temporary.open("w", encoding="ascii") as file:
                file.writelines(json.dumps([number, unit]) + "\n" for number, unit in todo.items())

    def follow(self, settings: Mapping[str, Any]) -> None:
        """Waits for the units of rank 0 and compares its settings with those of this rank, which calls it.

        What is a list or a dict in them may differ, such as the times of files on each machine's own disk.

        Raises:
            LaunchError: they are others, such as another commit of a model of the Hub.
        """
        path = self._launch / "work.jsonl"
        while not appeared(path):  # rank 0 lists and checks; the watch ends this rank where it fails
            time.sleep(PERIOD / 5)
        with path.open(encoding="ascii") as file:
            self._units = dict(map(json.loads, file))
        first = rank_file.read(self.path / "settings.json") or {}
        for name, value in settings.items():
            if not isinstance(value, dict | list) and first.get(name, value) != value:
                raise LaunchError(
                    f"{name} is {value}, of rank 0 {first[name]}; start all ranks with one command, one model and one "
                    "version of ldmseg_fast"
                )

    def todo(self) -> list[str]:
        """Lists the units of `open` that are not complete yet."""
        return list(self._units.values())

    def claims(self) -> Iterator[tuple[int, str]]:
        """Yields number and text of each unit that this rank is to do, after `open` or `follow`."""
        if not self._several:
            yield from self._units.items()
            return
        numbers, rank, world = list(self._units), self.ranks.rank, self.ranks.world
        for number in numbers[rank::world]:
            if self._claim(number):
                yield number, self._units[number]
        while True:
            taken = set(os.listdir(self._launch / "claims"))  # noqa: PTH208 (names are wanted)
            left = [number for number in numbers if str(number) not in taken]
            if not left:
                return
            number = left[-1 - rank % len(left)]  # from the end, where their own rank comes last
            if self._claim(number):
                yield number, self._units[number]

    def _claim(self, number: int) -> bool:
        path = self._launch / "claims" / str(number)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        return True

    def done(self, number: int, record: Record, count: int) -> None:
        """Says that a unit is complete, with all its files written.

        Args:
            number: of `claims`.
            record: what `finish` gives back (JSON values).
            count: how many pictures it is, for `count`.

        Raises:
            OSError: names the file that cannot be written.
        """
        key = key_of(self._units[number])
        self._journal.add(key, record)
        self._records[key] = record
        self._facts["count"] += count

    def count(self) -> int:
        """Counts the pictures that all ranks have done in this start."""
        others = [rank_file.read(self._rank_path(rank)) or {} for rank in range(1, self.ranks.world)]
        return self._facts["count"] + sum(each.get("count", 0) for each in others)

    def finish(self, tick: Callable[[], None] = lambda: None) -> list[Record]:
        """Waits on rank 0 until all units are complete. Gives their records in the order of the units; [] elsewhere.

        tick: is called again and again meanwhile.

        Raises:
            DataError: a journal has gone.
        """
        if not self.is_main:
            self._done.set()  # first: rank 0 may be gone as soon as it knows
            self._own.write(**self._facts | {"final": True})
            return []
        begun, said = time.monotonic(), False
        while self._several:
            states = {rank: rank_file.read(self._rank_path(rank)) for rank in range(1, self.ranks.world)}
            tick()
            missing = [rank for rank, state in states.items() if state is None]
            if all(state.get("final") for state in states.values() if state) and (
                not missing or time.monotonic() - begun > COMING
            ):
                break
            if missing and not said and time.monotonic() - begun > QUIET:
                said = True
                names = ", ".join(map(str, missing))
                print(f"rank 0: all is done or taken; rank {names} has not come yet", file=sys.stderr, flush=True)
            time.sleep(PERIOD / 5)
        self._done.set()
        if self._several:
            self._records |= read_records(self.path, f"done-{self._name}-*")
        if lost := sum(key not in self._records for key in self._keys):
            raise DataError(f"{self.path}: {lost} units are not in the journals; {AGAIN}")
        return [self._records[key] for key in self._keys]

    # the end

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._several:
            self._watch.fail(error, self._stack.close)
        self._done.set()
        if self.is_main and (error is None or not any(self.path.glob("done-*"))):
            shutil.rmtree(self.path, ignore_errors=True)
        self._stack.close()


def _own_start() -> float:
    """When this process began, in seconds since the epoch."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return _STARTED
