"""What a setting may be beside its type: written as `Annotated[type, limit]` where the setting is declared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


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
