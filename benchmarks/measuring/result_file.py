"""Writes one validated JSON file per run: never over another, never after a red check.

Rows are on disk, in a journal beside that file, the moment they are measured: a run that is killed keeps them.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measuring.environment import ROOT, environment
from benchmarks.measuring.timing import Timing
from ldmseg_fast.errors import UserError

RESULTS = Path(__file__).resolve().parents[1] / "results"
SCHEMA_VERSION = 1
PERCENTILES = (5, 20, 50, 80, 95, 99)


class BenchmarkError(UserError):
    """A red check or a record that does not follow the schema."""


@dataclass
class Run:
    """Collects one run of one suite. Construct it before any work, so that the load before the run is recorded.

    folder: where the run will be saved. With it, every row is also a line of `SUITE-TIME.jsonl` there from the moment
    it is measured, until `save` writes the whole.
    """

    suite: str
    quick: bool = False
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    results: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    folder: Path | None = None
    _journal: Path | None = None

    def check(self, name: str, passed: bool) -> None:
        """Records a correctness test that stands beside the numbers; raises `BenchmarkError` if it is red."""
        self.checks[name] = bool(passed)
        self._note({"check": name, "passed": bool(passed)})
        if not passed:
            raise BenchmarkError(f"{self.suite}: check failed, nothing is recorded: {name}")

    def add(
        self,
        name: str,
        timings: Mapping[str, Timing],
        *,
        baseline: str | None = None,
        case: Mapping[str, Any] | None = None,
        items: int = 1,
        bytes_moved: float | None = None,
        flops: float | None = None,
        floor_ms: float | None = None,
        target: float | None = None,
        quality: Mapping[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Adds one row per timing, and prints it. `items` calls' worth of work (images) is divided out of the times.

        `ratio` is the baseline's median over the row's; `target` is the ratio wanted (of a row without baseline: the
        milliseconds); `floor_share` is floor_ms over the median.
        """
        rows = []
        for variant, timing in timings.items():
            scaled = {f"p{percent}": timing.percentile(percent) / items for percent in PERCENTILES}
            row = {
                "name": name,
                "variant": variant,
                "case": dict(case or {}),
                "unit": "ms",
                **scaled,
                "samples": len(timing.samples),
                "spread": timing.spread,
                "peak_memory_bytes": timing.peak_memory_bytes,
                "baseline": baseline,
                "ratio": timings[baseline].median / timing.median if baseline else None,
                "bytes": bytes_moved,
                "flops": flops,
                "floor_share": floor_ms / scaled["p50"] if floor_ms else None,
                "target": target if variant != baseline else None,
                "quality": dict(quality or {}),
            }
            rows.append(row)
            self._keep(row)
        return rows

    def add_value(
        self, name: str, value: float, unit: str, *, case: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """Adds a number that is no distribution of times (a ratio, bytes, a PQ), and prints it."""
        row = {
            "name": name,
            "variant": more.pop("variant", "ours"),
            "case": dict(case or {}),
            "unit": unit,
            "value": value,
            **more,
        }
        self._keep(row)

    def add_red(
        self, name: str, variant: str, reason: str, *, case: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """Adds a row without a number for what failed, with its reason, and prints it. The run goes on."""
        self._keep({"name": name, "variant": variant, "case": dict(case or {}), "unit": "", "red": reason, **more})

    @property
    def red(self) -> list[dict[str, Any]]:
        """The rows of what failed."""
        return [row for row in self.results if "red" in row]

    def _keep(self, row: dict[str, Any]) -> None:
        self.results.append(row)
        self._note({"row": row})
        print(format_row(row), flush=True)

    def _note(self, entry: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        lines = [self._head(), entry] if self._journal is None else [entry]
        if self._journal is None:
            self._journal = self._new_file(self.folder, "jsonl")
        with self._journal.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def _head(self) -> dict[str, Any]:
        head = {"schema": SCHEMA_VERSION, "suite": self.suite, "quick": self.quick}
        return head | {"environment": self.environment}

    def _new_file(self, folder: Path, ending: str) -> Path:
        """Makes an empty file named by suite and time, and a number where another run began in the same second."""
        stamp = self.environment["time"].replace("-", "").replace(":", "")
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = folder / f"{self.suite}-{stamp}{f'-{number}' if number > 1 else ''}.{ending}"
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
        raise AssertionError("itertools.count ends")

    def save(self, folder: Path = RESULTS) -> Path:
        """Writes the run as a new file that no later run touches; raises `BenchmarkError` if it breaks the schema."""
        if not self.results:
            raise BenchmarkError(f"{self.suite}: nothing was measured; give it more --minutes, or ask for other parts")
        record = self._head() | {"checks": self.checks, "results": self.results}
        validate(record)
        path = self._new_file(folder, "json")
        with path.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.write("\n")
        if self._journal is not None:
            self._journal.unlink(missing_ok=True)
        print(f"saved {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
        return path


def reason_of(error: BaseException) -> str:
    """Describes an error in one line, for a red row."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def validate(record: Mapping[str, Any]) -> None:
    """Checks a run's record against the schema.

    Raises:
        BenchmarkError: a field breaks it; the message names the first.
    """
    kinds: dict[str, type] = {
        "schema": int,
        "suite": str,
        "quick": bool,
        "environment": dict,
        "checks": dict,
        "results": list,
    }
    if not isinstance(record, Mapping):
        raise BenchmarkError(f"an object expected, got {record!r:.80}")
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise BenchmarkError(f"`{key}` must be a {kind.__name__}, got {record.get(key)!r:.80}")
    env = record["environment"]
    for key in ("time", "command", "commit", "python"):
        if not isinstance(env.get(key), str) or not env[key]:
            raise BenchmarkError(f"`environment.{key}` must be a non-empty string, got {env.get(key)!r}")
    if "cuda" not in env or not isinstance(env.get("gpu"), Mapping) or "name" not in env["gpu"]:
        raise BenchmarkError("`environment.cuda` and `environment.gpu.name` must be there (null on a CPU)")
    if not all(record["checks"].values()):
        raise BenchmarkError(f"red checks: {[name for name, passed in record['checks'].items() if not passed]}")
    if not record["results"]:
        raise BenchmarkError("`results` is empty")
    for index, row in enumerate(record["results"]):
        if not isinstance(row, Mapping):
            raise BenchmarkError(f"`results[{index}]` must be an object, got {row!r:.80}")
        wanted: tuple[str, ...] = ("value",) if "value" in row else tuple(f"p{percent}" for percent in PERCENTILES)
        wanted = () if "red" in row else wanted
        for key in ("name", "variant", "unit", *(("red",) if "red" in row else ())):
            if not isinstance(row.get(key), str):
                raise BenchmarkError(f"`results[{index}].{key}` must be a string, got {row.get(key)!r}")
        for key in wanted:
            if not isinstance(row.get(key), int | float) or not math.isfinite(row[key]):
                raise BenchmarkError(f"`results[{index}].{key}` must be a finite number, got {row.get(key)!r}")


def format_row(row: Mapping[str, Any]) -> str:
    """Returns one line of a table for people."""
    case = " ".join(f"{key}={value}" for key, value in row["case"].items())
    head = f"{row['name']:<28} {case:<28} {row['variant']:<22}"
    if "red" in row:
        return f"{head} RED: {row['red']}"
    if "value" in row:
        return f"{head} {row['value']:>10.4g} {row['unit']}"
    ratio = f" {row['ratio']:6.2f}x" if row["ratio"] is not None else ""
    floor = f" floor {row['floor_share']:4.0%}" if row["floor_share"] is not None else ""
    memory = row["peak_memory_bytes"]
    peak = f" +{memory / 2**20:.1f} MiB" if memory is not None else ""
    return f"{head} {row['p50']:>10.4f} ms  p80/p20 {row['spread']:.2f}{ratio}{floor}{peak}"


def read_results(path: Path) -> dict[str, Any]:
    """Returns a result file's record.

    Raises:
        BenchmarkError: the file, which it names, cannot be read or breaks the schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        validate(record)
    except (OSError, ValueError, RecursionError, BenchmarkError) as error:
        raise BenchmarkError(f"{path}: no result file ({error}); name one of {RESULTS.name}/*.json") from None
    return record


def read_journal(path: Path) -> dict[str, Any]:
    """Returns the record of a run that did not end, from its journal; half a line at the end is left out.

    Raises:
        BenchmarkError: the file, which it names, is no journal, or has no row.
    """
    lines = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                lines.append(json.loads(line))
        record = {**lines[0], "checks": {}, "results": [line["row"] for line in lines[1:] if "row" in line]}
        record["checks"] = {line["check"]: line["passed"] for line in lines[1:] if line.get("passed")}
        validate(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, BenchmarkError) as error:
        raise BenchmarkError(f"{path}: no journal of a run ({error})") from None
    return record
