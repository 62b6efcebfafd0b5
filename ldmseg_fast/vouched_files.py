"""Files that a manifest vouches for: written with their sizes and SHA-256 sums, and checked against them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_files(folder: Path, written: dict[str, Callable[[Path], None]], cure: str) -> dict[str, Any] | str:
    """Write files; their sizes and sums for the manifest, or why it failed. cure: of a full disk."""
    files = {}
    for name, write in written.items():
        try:
            write(folder / name)
            files[name] = entry_of(folder / name)
        except OSError as error:
            return why_not_written(error, folder / name, cure)
    return files


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def why_not_written(error: OSError, path: Path, cure: str) -> str:
    """The error of a file that could not be written, with the free space and the cure for a full disk."""
    existing = next(parent for parent in path.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free / 2**20
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{path}: {error.strerror or error} ({free:.0f} MiB free{f'; {cure}' if full else ''})"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage_of(path: Path, known: dict[str, Any]) -> str:
    """What is wrong with a file by its manifest's "bytes" and "sha256", "" if nothing; reads all of it."""
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != known["bytes"]:
        return f"{path}: {path.stat().st_size} bytes instead of {known['bytes']}"
    return "" if sha256(path) == known["sha256"] else f"{path}: damaged, its SHA-256 is not the manifest's"


def sync_folder(folder: Path) -> None:
    """Until this is done, a file that was renamed may be gone after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
