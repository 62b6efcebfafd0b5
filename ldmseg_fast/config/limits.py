"""What a setting may be beside its type: written as `Annotated[type, limit]` where the setting is declared.

Numbers on a command line have their ranges here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ldmseg_fast.errors import ArgumentError


@dataclass(frozen=True)
class Range:
    """Admits numbers from `least` to `most`; with `under`, `most` itself is too much. NaN and infinity never pass."""

    least: float
    most: float
    under: bool = False

    def admits(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.under and value == self.most)

    def __str__(self) -> str:
        return f"at least {self.least} and under {self.most}" if self.under else f"from {self.least} to {self.most}"


@dataclass(frozen=True)
class Form:
    """Admits text that matches the regular expression `pattern` as a whole; `name` says so in words."""

    pattern: str
    name: str

    def admits(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Length:
    """Admits lists of `least` to `most` values."""

    least: int
    most: int

    def admits(self, value: tuple[Any, ...]) -> bool:
        return self.least <= len(value) <= self.most

    def __str__(self) -> str:
        return f"{self.least} to {self.most} values"


# What a number may be, by the option's name, in every command and script that has it. Upper ends are far beyond any
# use: they catch a slip before it allocates memory or starts processes.
OPTION_RANGES = {
    "agreement": Range(0, 10**9),
    "autoencoder_steps": Range(0, 10**9),
    "batch_size": Range(1, 4096),
    "block": Range(1, 16384),
    "cache_interval": Range(1, 10**6),
    "connected": Range(0, 2**28),
    "count_th": Range(0, 2**30),
    "diffusion_steps": Range(0, 10**9),
    "edges": Range(0, 16),
    "images": Range(0, 10**7),
    "instances": Range(0, 1024),
    "limit": Range(0, 10**9),
    "lora_scale": Range(-1000, 1000),
    "max_batch": Range(0, 4096),
    "max_pixels": Range(1, 2**28),
    "max_upload": Range(1, 2**20),
    "max_side": Range(0, 65536),
    "min_batch": Range(0, 4096),
    "minutes": Range(0, 10**6),
    "opt_batch": Range(0, 4096),
    "parity_images": Range(0, 10**6),
    "port": Range(0, 65535),
    "queue": Range(1, 10**6),
    "queue_delay": Range(0, 10**9),
    "random": Range(0, 10**4),
    "ranks": Range(0, 1024),
    "samples": Range(0, 1000),
    "scenes": Range(0, 10**7),
    "seed": Range(0, 2**63 - 1),
    "seeds": Range(1, 1000),
    "size": Range(1, 16384),
    "steps": Range(1, 10**6),
    "threads": Range(1, 1024),
    "timeout": Range(0.01, 10**7),
    "unknown_id": Range(0, 2**24 - 1),
    "workers": Range(0, 256),
    "workspace": Range(0, 10**6),
    "worst": Range(0, 10**4),
}


def check_ranges(args: argparse.Namespace, ranges: Mapping[str, Range] = MappingProxyType(OPTION_RANGES)) -> None:
    """Checks every number of a command line against `ranges`, by the option's name.

    Raises:
        ArgumentError: names the first option that is out of range.
    """
    for name, value in vars(args).items():
        limit = ranges.get(name)
        for number in value if isinstance(value, list) else [value]:
            if limit is not None and isinstance(number, (int, float)) and not limit.admits(number):
                raise ArgumentError(f"--{name.replace('_', '-')} {number}: {limit} expected")
