"""Holds annotations once for all processes that read them."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing.reduction import DupFd
from typing import Any, BinaryIO

import numpy as np


class Packed:
    """Holds a list of JSON values in memory that belongs to no process.

    A process that it is handed to, by fork or pickled at its start, maps the same pages. Python objects, and arrays
    that are pickled, would be copied.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        blobs = [json.dumps(value).encode() for value in values]
        ends = np.cumsum([len(blob) for blob in blobs], dtype=np.int64)
        file = _anonymous_file()
        file.write(ends.tobytes())
        for blob in blobs:
            file.write(blob)
        file.flush()
        self._open(file, len(blobs))

    def _open(self, file: BinaryIO, count: int) -> None:
        self._file = file  # owns the descriptor that other processes are given
        content: Any = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if count else b""
        self._ends = np.frombuffer(content, np.int64, count)
        self._bytes = memoryview(content)[8 * count :]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return json.loads(bytes(self._bytes[start : self._ends[index]]))

    def __reduce__(self) -> tuple[Callable[..., Packed], tuple[Any, int]]:
        return _of_descriptor, (DupFd(self._file.fileno()), len(self))


def _anonymous_file() -> BinaryIO:
    """A file without a name; in memory, not in /dev/shm, which containers keep small."""
    try:
        return os.fdopen(os.memfd_create("ldmseg-annotations"), "w+b")
    except OSError:  # a kernel or a sandbox without it
        return tempfile.TemporaryFile()


def _of_descriptor(descriptor: Any, count: int) -> Packed:
    packed = Packed.__new__(Packed)
    packed._open(os.fdopen(descriptor.detach(), "r+b"), count)
    return packed
