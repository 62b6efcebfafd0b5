"""Folders that are written complete or not at all, by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldmseg_fast.backends.base import BackendError
from ldmseg_fast.checkpoint import replace_folder

LOCK = ".lock"
SETTLED_SECONDS = 60
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ExportError(BackendError):
    """An export that cannot be made; the message says what and why."""


@dataclass
class NewFolder:
    """A folder in the making; `keep` False drops it."""

    path: Path
    keep: bool = True


@contextmanager
def new_folder(out: Path, own: Callable[[Path], Collection[str]]) -> Iterator[NewFolder]:
    """A folder beside `out` that takes its place once the block is through. What a killed process left is removed.

    Args:
        out: the folder to write; an older one of the same kind is replaced.
        own: names in `out` that may go with the older one.

    Raises:
        ExportError: `out` holds something else.
        BackendError: the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out}: a file; choose another folder")
    foreign = sorted({path.name for path in out.iterdir()} - set(own(out))) if out.exists() else []
    if foreign:
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ExportError(f"{out}: holds something that is no export ({names}); choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(out) as folder, disk_full_named(out):
        yield folder
        if folder.keep:
            (folder.path / LOCK).unlink()
            replace_folder(folder.path, out)


@contextmanager
def _unfinished(out: Path) -> Iterator[NewFolder]:
    """A temporary folder whose lock is held as long as this process lives."""
    prefix = f".{out.name}.new-"
    for path in out.parent.glob(f"{prefix}*"):
        if _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
    folder = NewFolder(Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent)))
    folder.path.chmod(0o755)  # mkdtemp makes it private
    try:
        with exclusive(folder.path / LOCK):
            yield folder
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether no process holds its lock; a folder may be younger than its lock."""
    try:
        if time.time() - folder.stat().st_mtime < SETTLED_SECONDS:
            return False
        with (folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no lock in it: killed at once, or while it was being removed
    return True


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One holder of the lock file at a time; a second one calls `waiting` and then waits here."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def disk_full_named(out: Path) -> Iterator[None]:
    """A full disk, a used-up quota and a file over the size limit as one clear BackendError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise BackendError(
            f"{out}: the disk is full ({error.strerror}); free some space and try again, nothing was written"
        ) from None
