"""Tells by a locked file in a shared folder whether a rank lives, and how far it is."""

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
from ldmseg_fast.locks import own_descriptor

SILENCE = 60.0  # seconds without a beat after which a rank counts as gone where the file system has no locks
_LENGTH = 256  # bytes: written in place, which no full disk prevents
_PATIENCE = 3.0  # seconds in which another rank's look at the file ends


class RankFile:
    """Holds this rank's file under a lock, which the kernel frees however the rank ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.beat = 0

    def write(self, **facts: Any) -> None:
        """Writes what other ranks are to know, with a number that is another each time."""
        self.beat += 1
        record = {"beat": self.beat, "pid": os.getpid(), "host": socket.gethostname()[:64], **facts}
        os.pwrite(self._descriptor, json.dumps(record).encode().ljust(_LENGTH), 0)


@contextmanager
def held(path: Path) -> Iterator[RankFile]:
    """Makes a rank's file and holds it inside a `with` block.

    Raises:
        InUseError: another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(descriptor)
                holder = read(path) or {}
                raise InUseError(
                    f"{path.name} of this launch runs already (process {holder.get('pid', '?')} on "
                    f"{holder.get('host', '?')}); start each rank once"
                ) from None
            time.sleep(0.05)
        except OSError:  # a file system without locks: the beats tell
            break
    with own_descriptor(descriptor):
        yield RankFile(descriptor)


def read(path: Path) -> dict[str, Any] | None:
    """Reads what a rank has written; None where it has not come yet."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        return record if isinstance(record, dict) else None
    return None


class Lives:
    """Looks whether ranks live. Keeps what it has seen, for file systems without locks."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[Any, float]] = {}

    def lives(self, path: Path) -> bool:
        """Tells whether the process that made a rank's file still runs; one without a file does not."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return self._beats(path)
        finally:
            os.close(descriptor)
        return False

    def _beats(self, path: Path) -> bool:
        beat, now = (read(path) or {}).get("beat"), time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if beat != before:
            since = now
        self._seen[path] = beat, since
        return now - since < SILENCE
