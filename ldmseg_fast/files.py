"""Reads regular files only, and writes so that nothing is lost: atomic replacement, JSON, and sums of files."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import CheckpointError, DataError, UserError
from ldmseg_fast.temporary import NEW, named_as, put_in_place, temporary_file, temporary_folder

MAX_LINKS = 40  # that one path may lead through, as in Linux
STREAMS = ("stdin", "stdout", "stderr")  # in /dev, by their numbers
MAX_BYTES = 2**30  # largest file that is read at once where nothing else is said; weights are mapped and may be larger

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # waits for no pipe


def require_file(path: str | os.PathLike, kind: type[UserError] = DataError, what: str = "file") -> None:
    """Checks that `path`, after all links, is a regular file, for readers that open it themselves.

    A pipe would wait for its writer for ever, and a device such as /dev/zero has no end.

    Args:
        path: of a file that is read.
        kind: the error to raise.
        what: it should be, for the error.

    Raises:
        UserError: of this kind: a folder, pipe, socket or device, or a link that leads to itself.
        OSError: nothing is there, or it may not be looked at.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (the Path of "" is a folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise kind(f"{os.fspath(path)}: a link that leads to itself; put the {what} in its place") from None
        raise
    except ValueError:
        raise kind(f"{os.fspath(path)!r:.200}: a null character in the name of a {what}; leave it out") from None
    _check_mode(path, mode, kind, what)


def open_file(path: str | os.PathLike, kind: type[UserError] = DataError, what: str = "file") -> io.FileIO:
    """Opens a regular file to read its bytes, without a buffer; what is opened is what is checked.

    Args:
        path: of the file.
        kind: the error to raise.
        what: it should be, for the error.

    Raises:
        UserError: of this kind, at once: what `require_file` refuses, or a pointer of Git LFS.
        OSError: a file that cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _AT_ONCE)
    except (OSError, ValueError):
        require_file(path, kind, what)  # a socket cannot be opened at all, nor a name with a null character
        raise
    try:
        _check_mode(path, os.fstat(descriptor).st_mode, kind, what)
        if os.pread(descriptor, len(LFS_POINTER), 0) == LFS_POINTER:
            raise kind(
                f"{os.fspath(path)}: a pointer of Git LFS, not the file itself; run `git lfs pull` in the folder that "
                "was cloned"
            )
        return io.FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_no_pointer(path: Path, kind: type[UserError]) -> None:
    """Checks that a clone has fetched a file: raises an error of this kind where it holds Git LFS's pointer instead."""
    if path.is_file():
        open_file(path, kind).close()


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


def text_of(content: bytes) -> str:
    """Decodes the text of a JSON or YAML file: UTF-8, with or without a byte order mark.

    Raises:
        UnicodeDecodeError: another encoding; it names UTF-16 and UTF-32.
    """
    for name, marks in (("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)), ("UTF-16", (b"\xff\xfe", b"\xfe\xff"))):
        if content.startswith(marks):
            raise UnicodeDecodeError("utf-8", content, 0, len(marks[0]), f"the file is {name}: save it as UTF-8")
    if b"\0" in content[:4]:
        raise UnicodeDecodeError("utf-8", content, 0, 4, "the file is UTF-16 or UTF-32: save it as UTF-8")
    return content.decode("utf-8-sig")


def read_text(path: str | os.PathLike, kind: type[UserError] = DataError, what: str = "file") -> str:
    """Reads a regular text file whole, as `text_of` decodes it.

    Raises:
        UserError: see `read_file`.
        UnicodeDecodeError: see `text_of`.
        OSError: a file that cannot be read.
    """
    return text_of(read_file(path, kind, what))


def read_json(path: Path) -> Any:
    """Reads a JSON.

    Raises:
        CheckpointError: names the file that is missing, no JSON, or has a key twice.
    """
    try:
        return json.loads(read_text(path, CheckpointError), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is {path.parent} a model folder?") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # no text, no JSON, a number of thousands of digits, deep lists
        raise CheckpointError(f"{path}: damaged, no JSON ({error}); save the model again") from None


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes the object of a JSON; for `json.loads(..., object_pairs_hook=...)`.

    Raises:
        ValueError: names a key that is there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{repeated[:100]} is there twice; leave one of them")
    return values


def inside(folder: Path, path: Path) -> Path:
    """Returns `path` itself where it lies in `folder` after all links.

    Raises:
        CheckpointError: a link out of the folder. A download cache's own links, snapshots/ to blobs/, are followed.
    """
    if _leads_to_itself(path):
        raise CheckpointError(f"{path}: a link that leads to itself; put the file in its place")
    root, real = real_path(folder), real_path(path)
    roots = [root] + [parent.parent.parent / "blobs" for parent in (root, *root.parents) if _is_snapshot(parent)]
    if not any(real.is_relative_to(each) for each in roots):
        raise CheckpointError(f"{path}: a link out of the folder, to {real}; put a copy of the file in its place")
    return path


def real_path(path: str | os.PathLike) -> Path:
    """Follows all links; a link that leads to itself stays, where `Path.resolve` raises under Python 3.11 and 3.12."""
    return Path(os.path.realpath(path))


def _leads_to_itself(path: str | os.PathLike) -> bool:
    try:
        os.stat(path)  # noqa: PTH116 (the Path of "" is a folder)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


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
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    final = behind_links(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=final.parent):
            pass
    except OSError as error:
        error.filename = str(path)  # in the place of the temporary name
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path that takes the place of `path` when the block ends well, and vanishes otherwise.

    The temporary path lies beside `path`. A link stays, and what it leads to is replaced. Devices and pipes are not
    replaced but written to.

    Raises:
        OSError: names `path`.
    """
    path = Path(path)
    try:
        if _is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / "content"
                _write_to_stream(Path(folder) / "content", path)
            return
        final = behind_links(path)
        with named_as(path), temporary_file(final.parent) as temporary:
            yield temporary
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(final, temporary)
            temporary.replace(final)
    except OSError as error:
        named = Path(os.fsdecode(error.filename or ""))  # a full disk gives none
        if named in (Path(), path.parent):
            error.filename = str(path)
            del error.filename2  # None would be printed
        raise


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of the folder `path` when the block ends well.

    It vanishes otherwise. The older folder stays until then. A link stays, and what it leads to is replaced.

    Raises:
        NotADirectoryError: `path` is something else than a folder, which stays.
        OSError: a full disk; it names `path`.
    """
    final = behind_links(Path(path))
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "would replace what is no folder; choose another path", str(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    with named_as(Path(path)), temporary_folder(final.parent) as holder:
        (holder / NEW).mkdir()
        try:
            yield holder / NEW
        except OSError as error:
            if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                error.filename = str(path)
            raise
        put_in_place(holder, final)


def behind_links(path: Path) -> Path:
    """Returns where a link leads to in the end, whether something is there or not; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def is_standard_output(path: str | Path | None) -> bool:
    """Tells whether a path, such as /dev/stdout, is what this process prints to."""
    return path is not None and _descriptor(Path(path)) == 1


def _is_stream(path: Path) -> bool:
    """Whether a path is to be written to as it is: an open file's number, a device or a pipe."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _descriptor(path: Path) -> int | None:
    """The number of the open file that a path means: 1 for /dev/stdout and /dev/fd/1; None for other paths."""
    for _ in range(MAX_LINKS):
        parent = os.path.realpath(path.parent)
        if parent == "/dev" and path.name in STREAMS:
            return STREAMS.index(path.name)
        if parent in (f"/proc/{os.getpid()}/fd", "/dev/fd"):
            return int(path.name) if path.name.isdecimal() else None
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def _write_to_stream(content: Path, path: Path) -> None:
    number = _descriptor(path)
    sys.stdout.flush()
    # the number's own place in the file: opened anew it would be written over by what is printed next
    with content.open("rb") as source, open(path if number is None else os.dup(number), "wb") as target:  # noqa: PTH123
        shutil.copyfileobj(source, target)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a JSON-lines file; none where it is missing.

    A run that was killed may leave half a line, even half a character. What is no record is left out.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line.decode("utf-8"))
            if isinstance(record, dict):
                records.append(record)
    return records
