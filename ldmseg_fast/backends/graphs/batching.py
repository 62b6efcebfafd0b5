"""Runs batches of any size through graphs that take only some sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ldmseg_fast.errors import ArgumentError

Ranges = tuple[tuple[int, int], ...]  # least and largest batch of each profile
ANY: Ranges = ((1, 2**31),)


def parts(count: int, ranges: Ranges) -> list[tuple[int, int]]:
    """Splits `count` rows into calls: (rows, size) of each, of which size - rows are filled up and thrown away.

    >>> parts(11, ((1, 4),)), parts(5, ((4, 4),))
    ([(4, 4), (4, 4), (3, 3)], [(4, 4), (1, 4)])
    """
    largest = max(high for _, high in ranges)
    found = [(largest, largest)] * (count // largest)
    if rest := count % largest:
        found.append((rest, min(max(rest, low) for low, high in ranges if high >= rest)))
    return found


def run_in_parts(
    run: Callable[[dict[str, Tensor]], dict[str, Tensor]], rows: Mapping[str, Tensor], ranges: Ranges
) -> dict[str, Tensor]:
    """Calls `run` as few times as `ranges` allow, and puts its results together again.

    Args:
        run: inputs of one part -> outputs, each [B, ...] with the batch as its first axis, of any dtype.
        rows: inputs of the whole batch, likewise.
        ranges: what `run` takes at once.

    Raises:
        ArgumentError: no row at all, or tensors of different lengths.
    """
    first, count = next((name, len(value)) for name, value in rows.items())
    if other := next((name for name, value in rows.items() if len(value) != count), None):
        raise ArgumentError(f"{other}: {len(rows[other])} rows, but {first} has {count}")
    if count == 0:
        raise ArgumentError("an empty batch: give one image at least")
    results, start = [], 0
    for length, size in parts(count, ranges):
        part = {name: _filled(value[start : start + length], size) for name, value in rows.items()}
        results.append({name: value[:length] for name, value in run(part).items()})
        start += length
    if len(results) == 1:
        return results[0]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def _filled(rows: Tensor, size: int) -> Tensor:
    missing = size - len(rows)
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows
