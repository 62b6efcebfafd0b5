"""Loads the C++ helpers; `_C` is None where they are not built."""

import functools
import importlib
import warnings
from typing import Any


def _load() -> Any:
    try:
        return importlib.import_module("ldmseg_fast._C")
    except ImportError:
        return None


_C = _load()

__all__ = ["_C", "warn_slow"]


@functools.cache
def warn_slow() -> None:
    """Warns once per process that numpy or torch stands in for the missing C++ helpers."""
    warnings.warn(
        "ldmseg_fast._C is not built, so slower numpy and torch code runs in its place; "
        "`python setup.py build_ext --inplace` (or a reinstall) with a C++17 compiler builds it",
        RuntimeWarning,
        stacklevel=3,
    )
