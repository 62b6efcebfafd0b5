"""Writes a data set in any format of `kinds` that is written, whole or not at all."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.files import replacing_folder
from ldmseg_fast.formats.data_set import DataSet
from ldmseg_fast.formats.kinds import KINDS
from ldmseg_fast.formats.options import Summary, WriteOptions
from ldmseg_fast.locks import LOCK, only_writer
from ldmseg_fast.temporary import NAME as TEMPORARY

Writer = Callable[[DataSet, Path, WriteOptions], Summary]


def writer_of(kind: str) -> Writer:
    """Returns what writes a format.

    Raises:
        ArgumentError: no such format, or one that is only read; it lists those that are written.
    """
    written = ", ".join(name for name, each in KINDS.items() if each.writes)
    if kind not in KINDS:
        raise ArgumentError(f"{kind}: no such format; written are {written}")
    if not KINDS[kind].writes:
        raise ArgumentError(
            f"{kind}: this format is read (`ldmseg data import`) and not written; written are {written}"
        )
    return importlib.import_module(f"ldmseg_fast.formats.{KINDS[kind].module}").write


def check_free(out: Path) -> None:
    """Checks that there is nothing at a path, or an empty folder.

    Raises:
        DataError: something is there.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or any(path.name != LOCK and not TEMPORARY.fullmatch(path.name) for path in out.iterdir()):
        raise DataError(f"{out}: is there already; choose another folder, or remove this one")


def export(data_set: DataSet, kind: str, out: str | Path, options: WriteOptions) -> Summary:
    """Writes a data set into a new folder, which appears when all of it is there.

    Raises:
        ArgumentError: see `writer_of`.
        DataError: the folder is there already, or what the format's writer cannot read or hold.
        InUseError: another export writes into it.
        OSError: a file that cannot be written.
    """
    write, out = writer_of(kind), Path(out)
    check_free(out)
    with only_writer(out, "an export", "or choose another folder"):
        check_free(out)  # another export may have ended just now
        with replacing_folder(out) as folder:
            try:
                summary = write(data_set, folder, options)
            except OSError as error:
                if error.filename:  # which nobody knows by its temporary name
                    error.filename = str(error.filename).replace(str(folder), str(out), 1)
                raise
            return replace(summary, files=tuple(out / path.relative_to(folder) for path in summary.files))
