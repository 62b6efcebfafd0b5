"""Holds the comparisons of a parity report, each with its limit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldmseg_fast.files import read_text


@dataclass(frozen=True)
class Row:
    """Holds one comparison.

    Attributes:
        what: its name.
        value: what was measured.
        limit: the tolerance; None only reports.
        at_least: the value must reach the limit instead of staying below.
    """

    what: str
    value: float
    limit: float | None = None
    at_least: bool = False

    @property
    def ok(self) -> bool:
        """Tells whether the value keeps its limit."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class ParityReport:
    """Holds every comparison; `latency` is in milliseconds for one denoising step at batch 1 on this CPU, or empty."""

    precision: str
    images: int
    source: str
    rows: list[Row]
    latency: dict[str, float]

    @property
    def ok(self) -> bool:
        """Tells whether every value keeps its limit."""
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        rows = [asdict(row) | {"ok": row.ok} for row in self.rows]
        return {key: value for key, value in vars(self).items() if key != "rows"} | {"ok": self.ok, "rows": rows}

    @classmethod
    def read(cls, path: Path) -> ParityReport:
        """Reads what `to_dict` returned from a JSON file."""
        values = json.loads(read_text(path))
        rows = [Row(*(row[item.name] for item in fields(Row))) for row in values["rows"]]
        return cls(rows=rows, **{key: values[key] for key in ("precision", "images", "source", "latency")})

    def table(self) -> str:
        """Formats the report, one comparison a line."""
        width = max(len(row.what) for row in self.rows)
        lines = [f"parity of {self.precision} with PyTorch float32, {self.images} images of {self.source}"]
        for row in self.rows:
            sign = ">=" if row.at_least else "<="
            limit = "" if row.limit is None else f"  {sign} {row.limit:g}"
            lines.append(f"{'ok ' if row.ok else 'NO '} {row.what:<{width}}  {row.value:11.6g}{limit}")
        if "ratio" in self.latency:  # there is none where the graphs take no single image
            times = [f"{name} {value:.1f} ms" for name, value in self.latency.items() if name != "ratio"]
            lines.append(f"one step at batch 1: {', '.join(times)}, ratio {self.latency['ratio']:.2f}")
        return "\n".join(lines)
