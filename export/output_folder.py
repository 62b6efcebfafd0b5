"""Writes folders complete or not at all, by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import glob
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ldmseg_fast.errors import BackendError
from ldmseg_fast.files import real_path
from ldmseg_fast.locks import is_at
from ldmseg_fast.temporary import NEW, named_as, put_in_place, temporary_folder

RETRIES = 20  # where a folder is not there
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ExportError(BackendError):
    """Reports an export that cannot be made; the message says what and why."""


@dataclass
class NewFolder:
    """Describes a folder in the making.

    Attributes:
        path: where it is written.
        waited: whether another process has written `out` just before.
        keep: False drops it.
    """

    path: Path
    waited: bool = False
    keep: bool = True


@contextmanager
def new_folder(
    out: Path, own: Callable[[Path], Collection[str]], progress: Callable[[str], None] = lambda _: None
) -> Iterator[NewFolder]:
    """Yields a folder beside `out` that takes its place once the block is through.

    What a killed process left is removed. Two processes that write the same `out` do so one after the other.

    Args:
        out: the folder to write; an older one of the same kind is replaced.
        own: names in `out` that may go with the older one.
        progress: is told when another process is waited for.

    Raises:
        ExportError: `out` holds something else, or cannot be replaced.
        BackendError: the disk is full, or `out` lies where nothing can be written.
    """
    out = real_path(out)  # of a link, the folder that it means
    if not out.name:
        raise ExportError(f"{out}: the root of the file system, which cannot be replaced; name a folder inside it")
    folder = NewFolder(out.with_name(f".{out.name}.new"))

    def waiting() -> None:
        folder.waited = True
        progress(f"{out}: another export is under way; waiting for it")

    with disk_full_named(out), exclusive(out.with_name(f".{out.name}.lock"), waiting):
        check_replaceable(out, own)
        _tidy(out, folder.path)
        folder.path.mkdir()
        try:
            yield folder
            if folder.keep:
                check_replaceable(out, own)  # minutes have passed
                with named_as(out), temporary_folder(out.parent) as holder:
                    folder.path.rename(holder / NEW)
                    put_in_place(holder, out)
        finally:
            shutil.rmtree(folder.path, ignore_errors=True)


def check_replaceable(out: Path, own: Callable[[Path], Collection[str]]) -> None:
    """Checks that `out` may be replaced.

    Raises:
        ExportError: it is no folder, holds something else than `own` names, or cannot be moved.
    """
    if out.is_symlink():
        raise ExportError(f"{out}: a link that leads to itself; remove it, or choose another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out}: a file; choose another folder")
    if out.is_mount() or out == Path.cwd():
        raise ExportError(f"{out}: a mount point or the current folder, which cannot be replaced; name one inside it")
    foreign = sorted({path.name for path in out.iterdir()} - set(own(out)))
    if foreign:
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ExportError(f"{out}: holds something that is no export ({names}); choose another folder, or remove it")


def _tidy(out: Path, unfinished: Path) -> None:
    """Removes what killed processes left. An older folder comes back where its successor was not in place yet."""
    shutil.rmtree(unfinished, ignore_errors=True)
    for old in out.parent.glob(f".{glob.escape(out.name)}.old.*"):
        if not (old.is_dir() and old.suffix[1:].isdigit()):
            continue  # not ours, whose names end in a process id
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a lock file inside a `with` block. A second process calls `waiting` and then waits here.

    The file is made together with its folder, and removed by its holder, with folders that were not there before and
    have got nothing. The kernel frees it when the holder is killed.

    Raises:
        BackendError: the folder cannot be written.
    """
    file, new = _lock(path, waiting)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with suppress(OSError):
            for folder in new:
                folder.rmdir()  # which fails where something is in it


def _lock(path: Path, waiting: Callable[[], None]) -> tuple[IO[str], list[Path]]:
    """Returns the file, and folders that were made for it, the innermost first."""
    tries = RETRIES
    while True:
        new = [folder for folder in path.parents if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            if error.errno in FULL:
                raise
            tries -= 1
            if error.errno in (errno.ENOENT, errno.EEXIST) and tries:  # its last holder may just remove the folder, too
                time.sleep(0.01)
                continue
            raise BackendError(f"{path.parent}: cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        if is_at(file.fileno(), path):
            return file, new
        file.close()  # its last holder has removed it


@contextmanager
def disk_full_named(out: Path) -> Iterator[None]:
    """Turns a full disk, a used-up quota and a file over the size limit into one clear BackendError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise BackendError(
            f"{out}: the disk is full ({error.strerror}), here or in {tempfile.gettempdir()}; free some space and try "
            f"again, nothing half-written is left"
        ) from None
