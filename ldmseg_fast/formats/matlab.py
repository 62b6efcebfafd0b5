"""Reads MATLAB's .mat files of version 5 by scipy."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import read_file
from ldmseg_fast.formats.libraries import library

_HDF5 = b"\x89HDF"


def read_mat(path: Path, name: str) -> Any:
    """Reads one variable, as scipy.io.loadmat gives it.

    Raises:
        DataError: a missing or damaged file, one of version 7.3, or one without this variable; scipy is not installed.
    """
    loadmat = library("scipy.io", ".mat").loadmat
    try:
        content = read_file(path, DataError, ".mat file")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    if content.startswith(_HDF5) or content[:19] == b"MATLAB 7.3 MAT-file":
        raise DataError(f"{path}: MATLAB 7.3; save it with -v7")
    try:
        found = loadmat(io.BytesIO(content))
    except Exception as error:  # what scipy raises on damaged files is nowhere listed
        raise DataError(f"{path}: no readable .mat file ({error}); fetch it again") from error
    if name not in found:
        names = ", ".join(key for key in found if not key.startswith("__")) or "nothing"
        raise DataError(f"{path}: no variable {name}; it has {names}")
    return found[name]


def label_matrix(value: Any, path: Path, name: str) -> np.ndarray:
    """Returns a variable as labels, int32 [H, W].

    Raises:
        DataError: no matrix, or values that are no whole numbers from 0 to 2^31 - 1.
    """
    matrix = np.asarray(value)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "iuf":
        raise DataError(f"{path}: {name} is no matrix of labels, but {list(matrix.shape)} {matrix.dtype}")
    if not np.isfinite(matrix).all() or (matrix != np.rint(matrix)).any() or matrix.min() < 0 or matrix.max() >= 2**31:
        raise DataError(f"{path}: {name} has values that are no labels: whole numbers from 0 expected")
    return matrix.astype(np.int32)
