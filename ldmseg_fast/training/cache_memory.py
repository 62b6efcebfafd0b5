"""Asks whether the pictures that `data.cache` keeps fit into memory, and does without them where they do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from ldmseg_fast import distributed
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.training.disk import size_text

SHARE = 0.8  # of the free memory; the rest is for activations and for what else runs
GROUP = Path("/sys/fs/cgroup")  # where a container sees its own memory limit


def free_memory(system: Path = Path("/proc/meminfo"), group: Path = GROUP) -> int | None:
    """Reads how many bytes of main memory are free, within a container's limit; None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        found.append(_numbers(system)["MemAvailable:"] << 10)
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((group / "memory.max").read_text(encoding="utf-8"))  # ValueError where it is "max": no limit
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        found.append(max(limit - used + _numbers(group / "memory.stat")["inactive_file"], 0))  # of pages given back
    return min(found, default=None)


def _numbers(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}


def cache_need(train_sets: Iterable[CocoPanoptic], val_sets: Iterable[CocoPanoptic], workers: int) -> tuple[int, int]:
    """Tells what the caches of a rank take once they are full: pictures, and bytes in all processes of this machine.

    Args:
        train_sets: which each loader process keeps for itself, or the rank where there are none.
        val_sets: which the rank reads.
        workers: loader processes of a rank.
    """
    train, val = list(train_sets), list(val_sets)
    size = sum(part.cache_bytes for part in train) * max(workers, 1) + sum(part.cache_bytes for part in val)
    pictures = sum(len(part) for part in (*train, *val) if part.cache_bytes)
    return pictures, size * distributed.local_size()


def fit_caches(
    train_sets: Iterable[CocoPanoptic], val_sets: Iterable[CocoPanoptic], workers: int, free: int | None = None
) -> str:
    """Drops the caches of all sets where they would fill the memory before the first pass over the pictures ends.

    Args:
        train_sets, val_sets, workers: see `cache_need`.
        free: bytes of memory; default `free_memory()`.

    Returns:
        What `data.cache` takes, or why it is off, as a line; "" without a cache.
    """
    train, val = list(train_sets), list(val_sets)
    pictures, need = cache_need(train, val, workers)
    free = free_memory() if free is None else free
    if not need:
        return ""
    processes = max(workers, 1) * distributed.local_size()
    each = f" in {processes} processes together" if processes > 1 else ""
    takes = f"{pictures:,} pictures would take {size_text(need)}{each}"
    if free is None or need <= SHARE * free:
        return f"data.cache: {takes.replace('would take', 'take')}"
    for part in (*train, *val):
        part.drop_cache()
    return (
        f"warning: data.cache is off: {takes}, of {size_text(free)} that are free; pictures are decoded in each "
        f"epoch, and data.num_workers or smaller pictures on disk make that faster"
    )
