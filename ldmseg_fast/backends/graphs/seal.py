"""Seals the JSON beside graphs and engines with a hash of its values, so that no edited one is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"
UNSEALED = 1  # the format that older versions wrote


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record of values that JSON has, with the SHA-256 of all of them as its last field."""
    return {**record, SEAL: _digest(record)}


def check_seal(values: Mapping[str, Any]) -> None:
    """Checks a record as it was read. Raises ValueError where any of its values is not the one that was written."""
    if values.get("format_version") == UNSEALED and SEAL not in values:
        return
    if values.get(SEAL) != _digest(values):
        raise ValueError("a value is not the one that was written")


def _digest(record: Mapping[str, Any]) -> str:
    values = {name: value for name, value in record.items() if name != SEAL}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
