"""The README's tables, from the result files: python benchmarks/report.py [--check]

Each table stands between `<!-- results:SUITE -->` and `<!-- end -->`; of every suite the newest full run of a case is
shown. With --check nothing is written and the exit code is 1 where a table is not current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKERS = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def load_rows(suite: str, folder: Path = ROOT / "benchmarks" / "results") -> list[Row]:
    """Rows of a suite's full runs, oldest first; a later row replaces an earlier one of the same name and case."""
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob(f"{suite}-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["quick"]:
            continue
        for row in record["results"]:
            key = json.dumps([row["name"], row["variant"], row["case"]], sort_keys=True)
            rows.pop(key, None)
            rows[key] = row | {"environment": record["environment"]}
    return list(rows.values())


def machine(rows: list[Row]) -> str:
    """Where the rows were measured, one line."""
    found = []
    for row in rows:
        env = row["environment"]
        name = env["gpu"]["name"] or f"{env['cpu']['name']}, {env['cpu']['cores']} cores"
        found.append(f"{name}, PyTorch {env['packages'].get('torch', '?')}, {env['time'][:10]}")
    return "; ".join(dict.fromkeys(found))


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


def quality(rows: list[Row]) -> str:
    """A line per trained model, then a line per baseline and data set."""
    models, baselines = [], {}
    for row in rows:
        case = row["case"]
        data = f"{case['data']} {case['split']}, {case['images']}"
        numbers = [f"{row[key]:.1f}" for key in ("value", "sq", "rq")]
        if "cpu_minutes" in row:
            how = f"{case['steps']} steps" if "steps" in case else f"{case['ids']} ids, {case['size']} px"
            models.append([row["variant"], data, how, *numbers, f"{row['cpu_minutes']:g}"])
        else:
            baselines[row["variant"], data] = [row["variant"], data, "", *numbers, ""]
    header = ["class-agnostic, %", "data, images", "sampling", "PQ", "SQ", "RQ", "training, CPU minutes"]
    return table(header, [*models, *baselines.values()])


def timings(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        case = ", ".join(f"{key} {value}" for key, value in row["case"].items())
        if "value" in row:
            lines.append([row["name"], case, row["variant"], f"{row['value']:.4g} {row['unit']}", "", ""])
        else:
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
            target = "" if row["target"] is None else f"{row['target']:g}"
            lines.append([row["name"], case, row["variant"], f"{row['p50']:.4g} ms", ratio, target])
    return table(["what", "case", "variant", "median", "ratio to baseline", "target"], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {"quality": quality}


def render(text: str) -> str:
    """`text` with every table between markers made anew."""

    def fill(match: re.Match[str]) -> str:
        rows = load_rows(match[2])
        if not rows:
            return match[1] + match[3]
        return f"{match[1]}\n{TABLES.get(match[2], timings)(rows)}\nMeasured on {machine(rows)}.\n\n{match[3]}"

    return MARKERS.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table is not current")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        if new != old:
            print("README.md: tables are not current; run python benchmarks/report.py", file=sys.stderr)
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
