"""Runs a command over many pictures: one process or several ranks, which go on where a start was killed."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ldmseg_fast import __version__
from ldmseg_fast.checkpoints.categories_file import CATEGORIES
from ldmseg_fast.checkpoints.model_folder import load_index
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.checkpoints.weight_files import states_of
from ldmseg_fast.commands.options import from_hub, take_model, take_model_pinned
from ldmseg_fast.commands.picture_results import ENDINGS
from ldmseg_fast.data.picture_folders import FoundPicture, FoundPictures, described
from ldmseg_fast.data.shards import Member, ShardPicture
from ldmseg_fast.distributed.ranks import ranks_of, use_own_device
from ldmseg_fast.distributed.shared_run import SharedRun
from ldmseg_fast.errors import DataError, printable


@dataclass
class Outcome:
    """Says what became of pictures.

    Attributes:
        files: written, by their names below OUT, with their sizes in bytes.
        bad: a line for each picture that could not be read.
        turned: how many were turned as their EXIF orientation says.
        frames: how many have more frames than the one that was taken.
        new: segments that completed maps have got.
        share: of completed maps, how much of them was completed, in percent; the sum over the maps.
        host: the machine that wrote the files.
    """

    files: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    turned: int = 0
    frames: int = 0
    new: int = 0
    share: float = 0.0
    host: str = field(default_factory=socket.gethostname)

    def add(self, out: Path, picture: FoundPicture) -> None:
        """Enters the results of a picture."""
        for ending in ENDINGS:
            path = out / picture.folder / (picture.file.stem + ending)
            if ending != "_agreement.png" or path.exists():
                self.files[path.relative_to(out).as_posix()] = path.stat().st_size

    def names(self) -> set[str]:
        """Returns the names of all files below OUT."""
        return set(self.files)


@dataclass
class Summary:
    """Sums up the outcomes of all ranks and of earlier starts.

    Attributes:
        outcome: of all pictures, in their order.
        ranks: of this start.
        done: pictures of this start.
        before: pictures of earlier starts.
        seconds: that this start has worked.
    """

    outcome: Outcome
    ranks: int
    done: int
    before: int
    seconds: float

    def facts(self, found: FoundPictures, out: Path) -> dict[str, Any]:
        """Returns what `--json` prints of the results in the folder `out`."""
        written = [str(out / name) for name in self.outcome.files if name.endswith(".json")]
        names = ("bad", "turned", "frames")
        own = {name: getattr(self.outcome, name) for name in names}
        own |= {"left_out": found.left_out, "earlier": self.before, "seconds": self.seconds}
        return {"written": written, **own}

    def tell(self, found: FoundPictures, verb: str, stream: TextIO) -> int:
        """Prints what is to be known beside the number of results, and returns the exit code."""
        if self.before:
            print(f"{self.before} of the pictures were complete from an earlier start", file=stream)
        if self.done > 1:
            rate, where = self.done / max(self.seconds, 1e-9), f" on {self.ranks} ranks" if self.ranks > 1 else ""
            print(f"{self.done} pictures in {self.seconds:.1f} s{where}: {rate:.2f} pictures/s", file=stream)
        if self.outcome.turned:
            turned = "turned as their EXIF orientation says (--keep-orientation keeps the stored pixels)"
            print(f"{self.outcome.turned} {turned}", file=stream)
        if self.outcome.frames:
            print(f"{self.outcome.frames} have more than one frame, of which the first is {verb}", file=stream)
        if found.left_out:
            print(f"left out: {described(found.left_out)}", file=stream)
        if bad := self.outcome.bad:
            print(f"{len(bad)} could not be {verb}:", *map(printable, bad), sep="\n  ", file=sys.stderr)
        return 1 if self.outcome.bad else 0


Work = Callable[[Sequence[FoundPicture]], Outcome]


def run_job(
    args: argparse.Namespace,
    what: str,
    check: Callable[[], object],
    find: Callable[[], FoundPictures],
    settings: Callable[[], dict[str, Any]],
    load: Callable[[], Work],
    finish: Callable[[FoundPictures, Summary], int],
    also: Callable[[FoundPicture], Iterable[Path]] = lambda picture: (),
) -> int:
    """Does a command's work on this rank, and returns the exit code.

    Every batch has the same pictures for any number of ranks and after any number of kills: what a network computes for
    a picture can depend, in the last digits, on the pictures beside it.

    Args:
        args: with `out`, `share`, `threads`, `batch_size` and what `take_model` reads.
        what: of the progress.
        check: refuses outputs that cannot be, once the model's folder is known.
        find: lists the pictures and checks them; rank 0 calls it.
        settings: what the results depend on.
        load: loads the model and gives what does a batch.
        finish: tells what became of all, on rank 0, and returns the exit code.
        also: lists files that a picture's results depend on beside it.

    Raises:
        DataError: no picture that was named could be read, and none is of a folder; or results have gone meanwhile.
    """
    ranks = ranks_of(os.environ)
    together = ranks.world > 1 and from_hub(args)
    if not together:
        take_model(args)
        check()
    use_own_device(ranks, args.threads)
    with SharedRun(args.share or args.out, ranks, f"ldmseg {what}", "choose another --out") as run:
        if together:  # rank 0 fetches, and the others take its commit
            vars(args).update(run.agree(lambda: take_model_pinned(args)))
            take_model(args)
            check()
        found = FoundPictures()
        if run.is_main:
            found = find()
            batches = [
                found.pictures[at : at + args.batch_size] for at in range(0, len(found.pictures), args.batch_size)
            ]
            units = [_encoded(batch, also) for batch in batches]
            run.open(settings(), units, partial(_is_there, args.out, args.share is not None))
        work = load()
        if not run.is_main:
            run.follow(settings())
        begun = time.monotonic()
        total = len(found.pictures)
        with tqdm(total=total, desc=what, unit="image", disable=None if run.is_main else True) as progress:
            before = 0
            if run.is_main:
                before = total - sum(len(_decoded(unit)) for unit in run.todo())
                progress.update(before)

            def tick() -> None:
                progress.update(before + run.count() - progress.n)

            for number, unit in run.claims():
                pictures = _decoded(unit)
                args.out.mkdir(parents=True, exist_ok=True)
                run.done(number, asdict(work(pictures)), len(pictures))
                if run.is_main:
                    tick()
            records = run.finish(tick)
        if not run.is_main:
            return 0
        if lost := _lost(args.out, args.share is not None, records):
            raise DataError(
                f"{args.out}: {len(lost)} results have been removed while others were written ({lost[0]}); run the "
                "command again, which makes what is missing"
            )
        outcome = _sum(found.broken, records)
        if outcome.files or found.from_folders:
            summary = Summary(outcome, ranks.world, total - before, before, time.monotonic() - begun)
            return finish(found, summary)
    raise DataError("\n  ".join(map(printable, outcome.bad)))


def _sum(broken: Sequence[str], records: Sequence[dict[str, Any]]) -> Outcome:
    outcome = Outcome(bad=list(broken))
    for record in records:
        outcome.files |= record["files"]
        outcome.bad += record["bad"]
        outcome.turned += record["turned"]
        outcome.frames += record["frames"]
        outcome.new += record["new"]
        outcome.share += record["share"]
    return outcome


def _is_there(out: Path, local: bool, unit: str, record: dict[str, Any]) -> bool:
    """Whether the results of a batch are still there; on other machines' own disks nobody can look."""
    if local and record["host"] != socket.gethostname():
        return True
    try:
        return all((out / name).stat().st_size == size for name, size in record["files"].items())
    except OSError:
        return False


def _lost(out: Path, local: bool, records: Sequence[dict[str, Any]]) -> list[str]:
    """Lists results, by their names below OUT, that have gone; on other machines' disks nobody can look."""
    listed: dict[Path, set[str]] = {}
    lost = []
    for record in records:
        for name in () if local and record["host"] != socket.gethostname() else record["files"]:
            path = out / name
            if path.parent not in listed:  # one look at a folder, and not one at each of its files
                listed[path.parent] = {each.name for each in path.parent.iterdir()} if path.parent.is_dir() else set()
            if path.name not in listed[path.parent] and not path.exists():
                lost.append(name)
    return lost


def _encoded(batch: Sequence[FoundPicture], also: Callable[[FoundPicture], Iterable[Path]]) -> str:
    """Says all of a batch in one line: other files, or the same with other contents, are another batch."""
    pictures = []
    for picture in batch:
        entry: dict[str, Any] = {"file": str(picture.file), "folder": picture.folder.as_posix()}
        if isinstance(picture, ShardPicture):
            members = [(kind, str(each.tar), each.name, each.offset, each.size) for kind, each in picture.members]
            entry |= {"members": members, "state": _shard_state(picture.source())}
        else:
            entry["state"] = _state(picture.source())
        entry["also"] = [[str(path), _state(path)] for path in also(picture)]
        pictures.append(entry)
    return json.dumps(pictures)


def _decoded(unit: str) -> list[FoundPicture]:
    found: list[FoundPicture] = []
    for entry in json.loads(unit):
        file, folder = Path(entry["file"]), Path(entry["folder"])
        if "members" in entry:
            members = ((kind, Member(Path(tar), *rest)) for kind, tar, *rest in entry["members"])
            found.append(ShardPicture(file, folder, tuple(members)))
        else:
            found.append(FoundPicture(file, folder))
    return found


def _state(path: Path) -> list[int] | None:
    try:
        state = path.stat()
    except (OSError, ValueError):  # ValueError: a null character; it is told when the file is read
        return None
    return [state.st_size, state.st_mtime_ns]


_shard_state = lru_cache(maxsize=1024)(_state)  # of thousands of pictures in one tar


def model_state(model_dir: str | Path, engine_dir: str | None) -> dict[str, Any]:
    """Describes what results depend on: this program, the model's files and the engines'.

    Raises:
        CheckpointError: no model folder.
    """
    folder = resolve_model_dir(model_dir)
    parts = [f"{name}/*" for name in load_index(folder)["components"]] + [CATEGORIES, "model_index.json"]
    engines = states_of(Path(engine_dir), ["*"]) if engine_dir else {}
    return {"version": __version__, "model": folder.name, "weights": states_of(folder, parts), "engines": engines}
