"""Reads regular files only, and writes so that nothing is lost: atomic replacement, JSON, and sums of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import CheckpointError, DataError, UserError

MAX_BYTES = 2**30  # largest file that is read at once where nothing else is said; weights are mapped and may be larger

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # waits for no pipe


def require_file(path: str | os.PathLike, kind: type[UserError] = DataError, what: str = "file") -> None:
    """Checks that `path`, after all links, is a regular file, for readers that open it themselves.

    A pipe would wait for its writer for ever, and a device such as /dev/zero has no end.

    Args:
        path: of a file that is read.
        kind: the error to raise.
        what: it should be, for the error.

    Raises:
        UserError: of this kind: a folder, pipe, socket or device.
        OSError: nothing is there, or it may not be looked at.
    """
    _check_mode(path, os.stat(path).st_mode, kind, what)  # noqa: PTH116 (the Path of "" is a folder)


def open_file(path: str | os.PathLike, kind: type[UserError] = DataError, what: str = "file") -> io.FileIO:
    """Opens a regular file to read its bytes, without a buffer; what is opened is what is checked.

    Args:
        path: of the file.
        kind: the error to raise.
        what: it should be, for the error.

    Raises:
        UserError: of this kind, at once: a folder, pipe, socket or device.
        OSError: a file that cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _AT_ONCE)
    except OSError:
        require_file(path, kind, what)  # a socket cannot be opened at all
        raise
    try:
        _check_mode(path, os.fstat(descriptor).st_mode, kind, what)
        return io.FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(
    path: str | os.PathLike, kind: type[UserError] = DataError, what: str = "file", max_bytes: int = MAX_BYTES
) -> bytes:
    """Reads a regular file whole.

    Args:
        path: of the file.
        kind: the error to raise.
        what: it should be, for the error.
        max_bytes: of a file that is read.

    Raises:
        UserError: of this kind: a folder, pipe, socket or device, or a file of more than `max_bytes`.
        OSError: a file that cannot be read.
    """
    with open_file(path, kind, what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise kind(f"{path}: {size} bytes, over {max_bytes} bytes: is this the right file?")
        return file.read()


def read_text(path: str | os.PathLike, kind: type[UserError] = DataError, what: str = "file") -> str:
    """Reads a regular UTF-8 file whole, with or without a byte order mark.

    Raises:
        UserError: see `read_file`.
        UnicodeDecodeError: no UTF-8.
        OSError: a file that cannot be read.
    """
    return read_file(path, kind, what).decode("utf-8-sig")


def _check_mode(path: str | os.PathLike, mode: int, kind: type[UserError], what: str) -> None:
    if not stat.S_ISREG(mode):
        found = next((name for matches, name in _KINDS if matches(mode)), "something else")
        raise kind(f"{os.fspath(path)}: {found}, not a readable {what}")


def write_files(folder: Path, written: dict[str, Callable[[Path], None]], cure: str) -> dict[str, Any] | str:
    """Writes files and returns their sizes and sums for the manifest, or why it failed.

    cure: what to do about a full disk.
    """
    files = {}
    for name, write in written.items():
        try:
            write(folder / name)
            files[name] = entry_of(folder / name)
        except OSError as error:
            return why_not_written(error, folder / name, cure)
    return files


def entry_of(path: Path) -> dict[str, Any]:
    """Returns what a manifest says of a file: its "bytes" and "sha256"."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def why_not_written(error: OSError, path: Path, cure: str) -> str:
    """Describes why a file could not be written, with the free space and the cure for a full disk."""
    existing = next(parent for parent in path.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free / 2**20
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{path}: {error.strerror or error} ({free:.0f} MiB free{f'; {cure}' if full else ''})"


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    with open_file(path, CheckpointError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage_of(path: Path, known: dict[str, Any]) -> str:
    """Describes what is wrong with a file by its manifest's "bytes" and "sha256", "" if nothing. Reads all of it."""
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != known["bytes"]:
        return f"{path}: {path.stat().st_size} bytes instead of {known['bytes']}"
    return "" if sha256(path) == known["sha256"] else f"{path}: damaged, its SHA-256 is not the manifest's"


def sync_folder(folder: Path) -> None:
    """Syncs a folder to disk. Until then a file that was renamed may be gone after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON atomically: a reader sees the old file or the new one."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Reads a JSON.

    Raises:
        CheckpointError: names the file that is missing or no JSON.
    """
    try:
        return json.loads(read_text(path, CheckpointError))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is {path.parent} a model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged, no JSON ({error}); save the model again") from None


def replace_folder(temporary: Path, final: Path) -> None:
    """Puts the finished folder `temporary` in the place of `final`. The old one stays until then."""
    old = final.with_name(f".{final.name}.old.{os.getpid()}")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def inside(folder: Path, path: Path) -> Path:
    """Returns `path` itself where it lies in `folder` after all links.

    Raises:
        CheckpointError: a link out of the folder. A download cache's own links, snapshots/ to blobs/, are followed.
    """
    root, real = folder.resolve(), path.resolve()
    roots = [root] + [parent.parent.parent / "blobs" for parent in (root, *root.parents) if _is_snapshot(parent)]
    if not any(real.is_relative_to(each) for each in roots):
        raise CheckpointError(f"{path}: a link out of the folder, to {real}; put a copy of the file in its place")
    return path


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()


def check_output(path: str | Path) -> None:
    """Makes the folder of a file that is written after long work.

    Raises:
        OSError: the file could not be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        error.filename = str(path)  # in the place of the temporary name
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path that takes the place of `path` when the block ends well, and vanishes otherwise.

    The temporary path lies beside `path`.

    Raises:
        OSError: names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk gives none
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a JSON-lines file; none where it is missing.

    A run that was killed may leave half a line, which is left out.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
