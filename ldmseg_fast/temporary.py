"""Makes temporary files and folders, and clears those that killed processes have left.

Each is called .ldmseg-TOKEN.tmp, which is short enough beside any name that a file system takes. The process that made
it holds a lock on it. What nobody holds belongs to a process that was killed. It goes when the next process writes into
the same folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldmseg_fast.locks import is_at, own_descriptor

NAME = re.compile(r"\.ldmseg-[0-9a-f]{12}\.tmp")
NEW, OLD = "new", "old"  # in a temporary folder: what is being written, and what it replaces
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2(2)
_cleared: set[tuple[int, int]] = set()  # folders, by device and inode, that this process has looked through


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """Yields an empty file in `folder`, which is removed at the end unless it has been renamed."""
    with _held(folder, lambda path: os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)) as path:
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder in `folder`, which is removed at the end with what is in it.

    What `put_in_place` has moved into it and could not put back stays, and the folder with it.
    """
    with _held(folder, _make_folder) as path:
        try:
            yield path
        finally:
            if _put_back(path):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def named_as(final: Path) -> Iterator[None]:
    """Makes an OSError inside a `with` block name `final` where it names the temporary path that takes its place.

    Of a file in a temporary folder it names the one in `final`.
    """
    try:
        yield
    except OSError as error:
        parts = Path(os.fsdecode(error.filename)).parts if isinstance(error.filename, (str, bytes)) else ()
        place = next((place for place, part in enumerate(parts) if NAME.fullmatch(part)), None)
        if place is not None:
            inner = parts[place + 1 :]
            error.filename = str(final.joinpath(*inner[1:])) if inner[:1] in ((NEW,), (OLD,)) else str(final)
            del error.filename2  # None would be printed
        raise


def _make_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _put_back(holder: Path) -> bool:
    """Puts back what `holder` was replacing where nothing has its place; tells whether all of it is safe."""
    safe = True
    for old in (holder / OLD).glob("*"):
        final = holder.parent / old.name
        if not os.path.lexists(final):
            try:
                old.rename(final)
            except OSError:
                safe = False
    return safe


@contextmanager
def _held(folder: Path, make: Callable[[Path], int]) -> Iterator[Path]:
    """Makes a path under a lock. Another process may take the path for a leftover until the lock is there."""
    clear_once(folder)
    while True:
        path = folder / f".ldmseg-{secrets.token_hex(6)}.tmp"
        try:
            descriptor = make(path)
        except FileNotFoundError:
            if folder.is_dir():  # it has been taken before it was opened
                continue
            raise
        if _lock(descriptor) is not False and is_at(descriptor, path):
            break
        os.close(descriptor)  # what has it removes it
    with own_descriptor(descriptor):
        yield path


def _lock(descriptor: int) -> bool | None:
    """Takes the lock; False: another process holds it, None: the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def clear_once(folder: Path) -> None:
    """Clears a folder's leftovers where this process has not yet."""
    state = folder.stat()
    if (state.st_dev, state.st_ino) not in _cleared:
        _cleared.add((state.st_dev, state.st_ino))
        with contextlib.suppress(PermissionError):  # it may be written to and not listed
            clear_leftovers(folder)


def clear_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders of processes that were killed, and puts back what one was replacing."""
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if NAME.fullmatch(entry.name)]
    for path in found:
        with contextlib.suppress(OSError):  # another process was faster, or may do what this one may not
            _clear(path)


def _clear(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # waits for no pipe
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or not _lock(descriptor):
            return
        if stat.S_ISREG(mode):
            path.unlink()
            return
        if _put_back(path):
            shutil.rmtree(path)
    finally:
        os.close(descriptor)


def put_in_place(holder: Path, final: Path) -> None:
    """Puts the folder `holder`/new in the place of `final`; afterwards the older one is in `holder`.

    The two change places at once where the system can do that. Elsewhere a kill between two renames leaves the older
    one in `holder`, from which `clear_leftovers` puts it back, and after an error `temporary_folder` does.
    """
    if final.exists():
        if _exchange(holder / NEW, final):
            return
        (holder / OLD).mkdir()
        final.rename(holder / OLD / final.name)
    (holder / NEW).rename(final)


def _exchange(first: Path, second: Path) -> bool:
    """Lets two paths change places (renameat2(2)); tells whether the system and the file system know how."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
