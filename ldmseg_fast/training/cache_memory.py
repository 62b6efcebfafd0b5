"""Asks whether the pictures that `data.cache` keeps fit into memory, and does without them where they do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ldmseg_fast import distributed
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.training.disk import size_text

SHARE = 0.8  # of the free memory; the rest is for activations and for what else runs


def memory_left(root: Path = Path("/")) -> int | None:
    """Reads how many bytes of main memory this process can still take; None where the system does not tell.

    Limits of its control groups count, of both versions: a container's or a job's.

    Args:
        root: of the file system that has proc and sys.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        found.append(_numbers(root / "proc/meminfo")["MemAvailable:"] << 10)
    groups = root / "sys/fs/cgroup"
    for folder in _groups(root / "proc/self/cgroup"):
        found += _left(groups / folder, "memory.max", "memory.current", "")
        found += _left(groups / "memory" / folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    return min(found, default=None)


def _groups(file: Path) -> list[str]:
    """Lists the control groups of this process and those around them, as paths below the mount; "" is the root."""
    found = {""}
    with contextlib.suppress(OSError):
        for line in file.read_text(encoding="utf-8").splitlines():
            number, controllers, path = [*line.split(":", 2), "", ""][:3]
            if number == "0" or "memory" in controllers.split(","):
                group = PurePosixPath(path.strip("/"))
                found |= {str(each) for each in (group, *group.parents) if ".." not in each.parts}
    return sorted(found - {"."})


def _left(group: Path, limit: str, used: str, prefix: str) -> list[int]:
    """Reads what a control group leaves, as a list of one number; none where there is no group or no limit."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        total, taken = (int((group / name).read_text(encoding="utf-8")) for name in (limit, used))
        pages = _numbers(group / "memory.stat")  # of files, which the system takes back
        return [max(total - taken + pages[f"{prefix}inactive_file"] + pages[f"{prefix}active_file"], 0)]
    return []


def _numbers(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}


def cache_need(
    train_sets: Iterable[CocoPanoptic], val_sets: Iterable[CocoPanoptic], workers: int, num_categories: int = 0
) -> int:
    """Tells what the caches of a rank and its loader processes take once they are full, in bytes.

    Args:
        train_sets: which each loader process keeps for itself, or the rank where there are none.
        val_sets: which the rank reads.
        workers: loader processes of a rank.
        num_categories: of the model.
    """
    train, val = ([part.cache_bytes(num_categories) for part in sets] for sets in (train_sets, val_sets))
    return sum(train) * max(workers, 1) + sum(val)


def fit_caches(
    train_sets: Iterable[CocoPanoptic],
    val_sets: Iterable[CocoPanoptic],
    workers: int,
    num_categories: int = 0,
    free: int | None = None,
) -> str:
    """Drops the caches of all sets where they would fill the memory before the first pass over the pictures ends.

    Args:
        train_sets, val_sets, workers, num_categories: see `cache_need`.
        free: bytes of memory; default `memory_left()`.

    Returns:
        What `data.cache` takes on this machine, or why it is off, as a line; "" without a cache.
    """
    train, val = list(train_sets), list(val_sets)
    need = cache_need(train, val, workers, num_categories) * distributed.local_size()
    free = memory_left() if free is None else free
    if not need:
        return ""
    processes = max(workers, 1) * distributed.local_size()
    each = f" in {processes} processes together" if processes > 1 else ""
    pictures = f"{sum(len(part) for part in (*train, *val) if part.caches):,} pictures"
    size = f"{size_text(need)}{each}"
    if free is None or need <= SHARE * free:
        return f"data.cache: {pictures} take {size}"
    for part in (*train, *val):
        part.drop_cache()
    return (
        f"warning: data.cache is off: {pictures} would take {size}, of {size_text(free)} that are free; pictures are "
        f"decoded in each epoch, and data.num_workers or smaller pictures on disk make that faster"
    )
