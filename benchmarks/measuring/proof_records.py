"""What `proof_of_value.py` compares: logs, reports and files as plain values, and where two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import UserError

# keys of logs and reports that say how long something took; every other key is compared
TIMES = frozenset(
    {"images_per_s", "data_wait", "cpu_seconds", "seconds", "seconds_per_image", "left_seconds", "tflops"}
)
TIMES |= {"memory_gib", "mfu"}
# what older checkouts do not log or write
TIMES |= {"grad_norm", "val/loss", "settings_version"}


class ProofError(UserError):
    """A command of a checkout failed, or what it made could not show a change."""


def losses(folder: Path) -> list[Any]:
    """Returns what a run logged of every step: losses, their parts, learning rate and metrics.

    Raises:
        ProofError: it logged nothing, or the same loss in every step.
    """
    log = folder / "logs" / "log.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if len({record["loss"] for record in records if "loss" in record}) < 2:
        raise ProofError(f"{log}: no two losses differ, which could show no change")
    return plain(records, folder)


def plain(value: Any, work: Path) -> Any:
    """Returns a log or a report without `TIMES`, and with WORK for the folder of the proof."""
    if isinstance(value, dict):
        return {key: plain(item, work) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [plain(item, work) for item in value]
    return value.replace(str(work), "WORK") if isinstance(value, str) else value


def digest(folder: Path, *patterns: str) -> dict[str, str]:
    """Returns SHA-256 of the files in a folder that match one of `patterns` (default: all), by their paths in it.

    Raises:
        ProofError: there is no such file.
    """
    files = {path for pattern in patterns or ("**/*",) for path in folder.glob(pattern) if path.is_file()}
    if not files:
        raise ProofError(f"{folder}: no file {' or '.join(patterns)}, which could show no change")
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
    }


def maps(folder: Path, *patterns: str) -> dict[str, str]:
    """Returns `digest` of predicted maps.

    Raises:
        ProofError: all maps are the same, as those of a model that finds nothing.
    """
    found = digest(folder, *patterns)
    if len({value for name, value in found.items() if name.endswith(".png") and "overlay" not in name}) < 2:
        raise ProofError(f"{folder}: all maps are the same, which could show no change")
    return found


def documents(work: Path, folder: Path, *patterns: str) -> dict[str, Any]:
    """Returns the JSON files in a folder that match one of `patterns`, as `plain` has them, by their paths in it."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    contents = (plain(json.loads(path.read_text(encoding="utf-8")), work) for path in files)
    return {path.relative_to(folder).as_posix(): content for path, content in zip(files, contents)}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns a line for each thing that is not equal, with the first place where it is not."""
    lines = []
    for name in dict.fromkeys([*before, *after]):
        if name not in after or name not in before:
            lines.append(f"{name}: only {'before' if name in before else 'after'}")
            continue
        places = list(_places(before[name], after[name]))
        if places:
            path, old, new = places[0]
            more = f", and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(f"{name}: {path or 'the value'}: {old} -> {new}{more}")
    return lines


def _places(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields (path, old, new) for each leaf that differs, as text, so that NaN equals NaN and 1 is not 1.0."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            below = f"{path} {key}".strip()
            if key in old and key in new:
                yield from _places(old[key], new[key], below)
            else:
                yield below, *(("there", "gone") if key in old else ("not there", "new"))
    elif isinstance(old, list) and isinstance(new, list):
        for index, pair in enumerate(zip(old, new)):
            yield from _places(*pair, f"{path}[{index}]")
        if len(old) != len(new):
            yield f"{path} length".strip(), str(len(old)), str(len(new))
    elif json.dumps(old) != json.dumps(new):
        yield path, json.dumps(old), json.dumps(new)
