"""Lets one process at a time write into a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import InUseError

LOCK = ".ldmseg.lock"
_BEING_WRITTEN = 5.0  # seconds that a lock file may be empty without a lock before its process counts as gone
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks
_held: set[int] = set()


@contextmanager
def only_writer(folder: str | Path, what: str, cure: str, make: bool = True) -> Iterator[None]:
    """Holds the lock of a folder inside a `with` block.

    The kernel frees the lock when the process ends, however it ends. Over NFS it holds between machines as well, where
    both mount the folder with locks. Where the file system has none, the lock file alone tells who writes: a process of
    this machine that has gone does not count, one of another machine does until its file is deleted.

    Args:
        folder: the folder.
        what: what writes into it, such as "a training".
        cure: what else to do than to wait, such as "choose another output_dir".
        make: makes the folder where there is none, with its parents, which vanish if nothing is written; otherwise
            nothing is locked then.

    Raises:
        InUseError: another process writes there; it names the process and its machine.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if made and not make:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with own_descriptor(_take(path, folder, what, cure)):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something was written
                for path in made:
                    path.rmdir()


@contextmanager
def own_descriptor(descriptor: int) -> Iterator[None]:
    """Closes a locked file's descriptor at the end, and in processes that are forked inside the `with` block.

    A loader's process must not keep a lock that its dead parent had.
    """
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # a fork has closed it already
            _held.remove(descriptor)
            os.close(descriptor)


def _take(path: Path, folder: Path, what: str, cure: str) -> int:
    while True:
        descriptor, is_own = _open(path)
        taken, has_locks = True, True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            has_locks = error.errno not in _UNKNOWN
            taken = is_own and not has_locks
        if not taken:
            holder = _holder(descriptor)
            if not has_locks and not _may_be_alive(holder, os.fstat(descriptor).st_mtime):
                _remove(path, descriptor)
                continue
            extra = "" if has_locks else f", or delete {path} if nothing runs there"
            os.close(descriptor)
            writer = _describe(holder, what)
            raise InUseError(f"{folder}: {writer} writes there; wait until it has ended, {cure}{extra}")
        if is_at(descriptor, path):
            break
        os.close(descriptor)  # its holder has just removed it
    own = {"pid": os.getpid(), "host": socket.gethostname(), "what": what, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(own).encode(), 0)
    return descriptor


def _open(path: Path) -> tuple[int, bool]:
    """Opens the lock file; tells whether this process has made it, which one alone can."""
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                return os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # its holder has just removed it
                if path.is_symlink():  # to nothing
                    raise


def _remove(path: Path, descriptor: int) -> None:
    """Removes the lock file of a process that has gone, and closes it; not one that another has made meanwhile.

    One process at a time removes: between the look and the removal no other may put its own file there.
    """
    guard = path.with_name(f"{path.name}.removal")
    try:
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            _wait_for(guard)
            return
        try:
            if is_at(descriptor, path):
                path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _wait_for(guard: Path) -> None:
    """Waits a moment for another process's removal, and clears the guard of one that was killed in the middle."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - guard.stat().st_mtime > _BEING_WRITTEN:
            guard.unlink()
        else:
            time.sleep(0.01)


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # it is being written
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any], what: str) -> str:
    if not holder:
        return f"{what} of another process"
    pid, host, since = (holder.get(key, "?") for key in ("pid", "host", "since"))
    return f"{holder.get('what', what)} (process {pid} on {host}, since {since})"


def _may_be_alive(holder: dict[str, Any], written: float) -> bool:
    """Tells whether a lock file's process may still run; `written` is when the file was, in seconds since the epoch."""
    if not holder:
        return time.time() - written < _BEING_WRITTEN
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Tells whether an open file is still the one at `path`: another process may have removed or replaced it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
