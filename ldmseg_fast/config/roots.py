"""Reads `data.root` as text: one folder, or several with commas between."""

from __future__ import annotations

import os
import re


def entries_of(root: str) -> list[str]:
    """Splits a `data.root` at its commas; a folder whose own name has commas is one entry."""
    single = "," not in root or os.path.exists(root)  # noqa: PTH110 (Path.exists raises where a list is too long)
    return [root] if single else [entry.strip() for entry in root.split(",")]


def set_names(root: str) -> list[str]:
    """Names the sets of a `data.root` by the last parts of their folders, each with the splits that it names.

    For records that leave this machine: "/home/me/msrc,/home/me/camvid:train:test" gives "msrc" and
    "camvid:train:test".
    """
    return [re.split(r"[/\\]", entry.rstrip("/\\"))[-1] for entry in entries_of(root) if entry]
