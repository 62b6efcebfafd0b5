"""Imports the libraries that only some formats need, and says how to install one that is missing."""

from __future__ import annotations

import importlib
from typing import Any

from ldmseg_fast.errors import DataError


def library(name: str, what: str) -> Any:
    """Imports a library.

    Args:
        name: of the module.
        what: needs it, for the error.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{what} needs {package} ({error}); pip install 'ldmseg_fast[data]'") from None
