"""Keeps which units of shared work are complete, and what they depend on, for a start after a kill."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import read_lines, write_json

Record = dict[str, Any]


def key_of(unit: str) -> str:
    """Returns what a unit is recognised by, whatever its number: a sum of all that its text says."""
    return hashlib.sha256(unit.encode()).hexdigest()[:32]


def read_records(folder: Path, pattern: str = "done-*") -> dict[str, Record]:
    """Reads the records of complete units by key; half a line, which a kill leaves, is none."""
    lines = (line for path in sorted(folder.glob(pattern)) for line in read_lines(path))
    return {line["key"]: line["record"] for line in lines if "record" in line}


def keep_settings(folder: Path, settings: Mapping[str, Any], has_records: bool, cure: str) -> None:
    """Writes what results depend on, or compares it with what the records that are there depend on.

    Args:
        folder: of the journals.
        settings: JSON values.
        has_records: whether there are any.
        cure: what else to do than to go on with the older settings.

    Raises:
        ArgumentError: they are other settings; it names those that differ.
    """
    known = json.loads(json.dumps(dict(settings)))  # as it will be read back
    path = folder / "settings.json"
    if not has_records:
        write_json(path, known)
        return
    old: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        old = json.loads(path.read_bytes())
    changed = [name for name in {**old, **known} if old.get(name) != known.get(name)]
    if changed:
        told = (name for name in changed if not isinstance(known.get(name), dict | list))
        listed = "; ".join([f"{name} {old.get(name)}, now {known.get(name)}" for name in told] or changed)
        raise ArgumentError(
            f"{folder.parent}: an earlier start with other settings was interrupted here ({listed}); finish it with "
            f"those, {cure}, or delete {folder} to do everything anew"
        )


class Journal:
    """Writes a line for each unit that this rank has completed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def add(self, key: str, record: Record) -> None:
        """Writes one line at once.

        Raises:
            OSError: names the file that cannot be written.
        """
        line = (json.dumps({"key": key, "record": record}) + "\n").encode()
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            error.filename = str(self._path)  # a full disk gives none
            raise

    def close(self) -> None:
        """Ends the journal; its lines stay."""
        if self._descriptor is not None:
            os.close(self._descriptor)


@contextmanager
def journal(path: Path) -> Iterator[Journal]:
    """Gives a journal inside a `with` block; its file is made with the first line."""
    opened = Journal(path)
    try:
        yield opened
    finally:
        opened.close()
