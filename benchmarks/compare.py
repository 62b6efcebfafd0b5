"""Compares two result files of one suite: python benchmarks/compare.py BEFORE AFTER [--ratios] [--force] [--all]

A time is a regression where its p20 is over the p80 of before and its median is more than 3 % longer. With --ratios
each time is first divided by its baseline's median in the same run, so that a load on the whole machine cancels.
Values without a spread of their own (bytes, PQ, images/s of one sample) are shown and not judged. Exit code 1 on a
regression, 2 where the files cannot be compared: another suite, or another machine (unless --force).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.harness import BenchmarkError, read_results
from ldmseg_fast.distributed.ending import run_command

TOLERANCE = 1.03  # what an A/A comparison stays within


@dataclass(frozen=True)
class Change:
    """Holds one row of both files. `ratio`: after over before."""

    name: str
    unit: str
    before: float
    after: float
    verdict: str  # "slower", "faster", "within the spread", or "" for a value without spread

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("nan")


def machine(environment: dict[str, Any]) -> str:
    """Returns what must be equal for times to be comparable."""
    if environment["gpu"]["name"]:
        return str(environment["gpu"]["name"])
    cpu = environment["cpu"]
    return f"{cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} threads"


def compare(before: dict[str, Any], after: dict[str, Any], ratios: bool = False) -> tuple[list[Change], list[str]]:
    """Returns the rows that both records have, and the names of those that one lacks. `ratios`: times relative to the
    baseline of their own run; rows without one, and the baselines, are left out."""
    old, new = (_keyed(record) for record in (before, after))
    if ratios:
        old, new = ({key: _relative(row) for key, row in rows.items() if _has_ratio(row)} for rows in (old, new))
    changes = [_change(key, old[key], new[key]) for key in old if key in new]
    lone = [f"only before: {key}" for key in old if key not in new] + [f"only after: {k}" for k in new if k not in old]
    return changes, lone


def _has_ratio(row: dict[str, Any]) -> bool:
    return bool(row.get("ratio")) and row["variant"] != row["baseline"]


def _relative(row: dict[str, Any]) -> dict[str, Any]:
    baseline = row["p50"] * row["ratio"]
    return row | {"unit": "x time"} | {key: row[key] / baseline for key in ("p20", "p50", "p80")}


def _keyed(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    keyed = {}
    for row in record["results"]:
        if "red" in row:
            continue
        case = " ".join(f"{key}={json.dumps(value)}" for key, value in sorted(row["case"].items()))
        unit = f"in {row['unit']}" if row["unit"] != "ms" else ""  # the same quantity in another unit is another row
        keyed[" | ".join(part for part in (row["name"], case, row["variant"], unit) if part)] = row
    return keyed


def _change(name: str, old: dict[str, Any], new: dict[str, Any]) -> Change:
    if "value" in old or "value" in new:
        values = [float(row["value"] if "value" in row else row["p50"]) for row in (old, new)]
        return Change(name, new["unit"], values[0], values[1], "")
    verdict = "within the spread"
    if new["p20"] > old["p80"] and new["p50"] > TOLERANCE * old["p50"]:
        verdict = "slower"
    elif new["p80"] < old["p20"] and old["p50"] > TOLERANCE * new["p50"]:
        verdict = "faster"
    return Change(name, new["unit"], old["p50"], new["p50"], verdict)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--ratios", action="store_true", help="times relative to the baseline of the same run")
    parser.add_argument("--force", action="store_true", help="compare runs of different machines")
    parser.add_argument("--all", action="store_true", help="also rows that stayed within the spread")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 nothing is slower, 1 something is. Raises BenchmarkError where the files cannot be compared."""
    before, after = (read_results(path) for path in (args.before, args.after))
    machines = [machine(record["environment"]) for record in (before, after)]
    if before["suite"] != after["suite"]:
        raise BenchmarkError(f"{args.after}: suite {after['suite']}, {args.before} has {before['suite']}")
    if machines[0] != machines[1] and not args.force:
        raise BenchmarkError(f"measured on {machines[0]} and on {machines[1]}; --force compares them all the same")
    changes, lone = compare(before, after, args.ratios)
    for change in changes:
        if args.all or change.verdict != "within the spread":
            numbers = f"{change.before:>10.4g} -> {change.after:<10.4g} {change.unit:<9} {change.ratio:6.2f}x"
            print(f"{numbers}  {change.verdict:<18} {change.name}")
    print(*lone, sep="\n", end="\n" if lone else "")
    slower = sum(change.verdict == "slower" for change in changes)
    judged = sum(bool(change.verdict) for change in changes)
    print(f"{slower} of {judged} times slower, {sum(c.verdict == 'faster' for c in changes)} faster, on {machines[1]}")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
