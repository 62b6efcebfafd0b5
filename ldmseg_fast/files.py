"""Writes files so that nothing is lost: atomic replacement, JSON, and sums by which a file is recognised later."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import CheckpointError


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
    with path.open("rb") as file:
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
        return json.loads(path.read_text(encoding="utf-8"))
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
    try:
        root, real = folder.resolve(), path.resolve()
    except RuntimeError:  # Python's word for a link that ends in itself
        raise CheckpointError(f"{path}: a link that leads to itself; put the file in its place") from None
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
